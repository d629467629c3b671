"""Text that rows have in common, against direct counts over all pairs."""

import numpy as np
import pyarrow as pa
import pytest

from raylab.data import overlaps
from raylab.data.overlaps import JACCARD, RUN_WORDS, SHINGLE_WORDS, find_near, find_shared, number_texts, read_words


def read(texts):
    return read_words(pa.chunked_array([pa.array(texts, pa.large_string())]))


def list_runs(text, size):
    words = text.split()
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def write_texts(rng, *, copies, num_words=40, most_changed=4):
    """Families of texts: copies of one with up to `most_changed` words replaced."""
    texts = []
    for _ in range(25):
        base = [f"w{word}" for word in rng.integers(0, 300, num_words)]
        for _ in range(copies):
            changed = rng.choice(num_words, rng.integers(0, most_changed + 1), replace=False)
            texts.append(" ".join(f"z{rng.integers(99)}" if i in changed else w for i, w in enumerate(base)))
    return list(dict.fromkeys(texts))


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything in many blocks and passes."""

    def use():
        monkeypatch.setattr(overlaps, "BLOCK_WORDS", 70)
        monkeypatch.setattr(overlaps, "READ_ROWS", 3)

    return use


def test_words_are_read_without_case_space_and_punctuation():
    words = read(["Fever,  38.5 C", "fever 38 5\nc!", "--", "Été fini", "ÉTÉ (fini)"])
    assert list(number_texts(words)) == [0, 0, 1, 2, 2]
    assert list(words.lengths) == [4, 4, 0, 2, 2]
    assert words.num_distinct == len(np.unique(words.codes)) == 6


def test_no_rows_are_no_error():
    words = read([])
    assert len(number_texts(words)) == 0
    assert len(find_near(words, np.zeros(0, np.int64)).left) == 0
    assert find_shared(words, np.zeros(0, np.int64), 1).num_runs == 0


@pytest.mark.parametrize("seed", range(10))
def test_near_duplicates_are_those_of_a_direct_count(seed, small_blocks):
    rng = np.random.default_rng(seed)
    texts = write_texts(rng, copies=4)
    sides = rng.choice([1, 2, 4, 3], len(texts))
    found = find_near(read(texts), sides)
    sets = [set(list_runs(text, SHINGLE_WORDS)) for text in texts]
    wanted = {
        (i, j)
        for i in range(len(sets))
        for j in range(i + 1, len(sets))
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= JACCARD and (sides[i] != sides[j] or sides[i] == 3)
    }
    assert found.complete
    assert wanted
    assert set(zip(found.left.tolist(), found.right.tolist(), strict=True)) == wanted
    small_blocks()
    again = find_near(read(texts), sides)
    assert [list(part) for part in again[:2]] == [list(part) for part in found[:2]]


def test_a_known_jaccard_is_on_its_side_of_the_limit():
    """A word replaced in the middle of 40 takes 3 of 38 shingles: 35 / 41 = 0.85; two apart: 32 / 44 = 0.73."""
    words = [f"w{i}" for i in range(40)]
    one = " ".join([*words[:20], "other", *words[21:]])
    two = " ".join([*words[:10], "other", *words[11:30], "another", *words[31:]])
    found = find_near(read([" ".join(words), one, two]), np.array([1, 2, 4]))
    assert (found.left.tolist(), found.right.tolist()) == ([0], [1])


def test_texts_of_one_part_and_texts_without_a_shingle_are_near_nothing():
    texts = write_texts(np.random.default_rng(0), copies=4)
    assert len(find_near(read(texts), np.full(len(texts), 1)).left) == 0
    assert len(find_near(read(["a", "b", "", "c d"]), np.array([1, 2, 4, 1])).left) == 0


def test_too_many_pairs_are_cut_off_and_said_to_be(monkeypatch):
    texts = write_texts(np.random.default_rng(0), copies=8, most_changed=1)
    sides = np.arange(len(texts)) % 2 + 1
    whole = find_near(read(texts), sides)
    monkeypatch.setattr(overlaps, "MAX_CANDIDATES", 20)
    part = find_near(read(texts), sides)
    assert whole.complete
    assert not part.complete
    assert 0 < len(part.left) < len(whole.left)


@pytest.mark.parametrize("seed", range(5))
def test_shared_runs_are_those_of_a_direct_count(seed, small_blocks):
    rng = np.random.default_rng(seed)
    texts = write_texts(rng, copies=8, most_changed=2)
    groups = rng.integers(0, 12, len(texts))
    found = find_shared(read(texts), groups, 3)
    where = {}
    for text, group in zip(texts, groups, strict=True):
        for run in list_runs(text, RUN_WORDS):
            where.setdefault(run, set()).add(group)
    shared = {run for run, inside in where.items() if len(inside) > 3}
    covered = []
    for text in texts:
        inside = np.zeros(len(text.split()), dtype=bool)
        for start, run in enumerate(list_runs(text, RUN_WORDS)):
            inside[start : start + RUN_WORDS] |= run in shared
        covered.append(inside.sum())
    assert shared
    assert (found.num_runs, list(found.words)) == (len(shared), covered)
    small_blocks()
    again = find_shared(read(texts), groups, 3)
    assert (again.num_runs, list(again.words)) == (len(shared), covered)
