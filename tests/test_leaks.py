"""Labels that the opening words or one word give away, planted and not."""

import numpy as np
import pyarrow as pa
import pytest

from raylab.data import leaks
from raylab.data.leaks import draw_rows, read_openings, read_single_words
from raylab.data.overlaps import read_words

NUM_ROWS, NUM_CLASSES = 600, 3
TRAIN = np.arange(NUM_ROWS) % 4 > 0


def write_texts(seed=0):
    """Texts of 60 random words, of which some tell the class, all over the text; and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, NUM_ROWS)
    telling = rng.random((NUM_ROWS, 60)) < 0.1
    words = np.where(telling, 300 + 40 * labels[:, None] + rng.integers(0, 40, (NUM_ROWS, 60)), 0)
    words = np.where(telling, words, rng.integers(0, 300, (NUM_ROWS, 60)))
    return [[f"w{word}" for word in row] for row in words], labels.astype(np.int64)


def read(rows):
    return read_words(pa.chunked_array([pa.array([" ".join(row) for row in rows], pa.large_string())]))


def test_a_label_in_the_opening_words_is_found_and_one_all_over_the_text_is_not():
    rows, labels = write_texts()
    (clean,) = read_openings(read(rows), labels, TRAIN)
    headed = [["topic", f"h{label}", *row] for row, label in zip(rows, labels, strict=True)]
    (leak,) = read_openings(read(headed), labels, TRAIN)
    assert clean.class_code is leak.class_code is None
    assert clean.evidence["f1_macro_whole"] > 0.9
    assert clean.value < 0.75
    assert leak.value > 0.98
    assert leak.num_checked == (~TRAIN).sum()
    assert not set(leak.rows) & set(np.flatnonzero(TRAIN))
    assert leak.evidence["f1_macro_majority"] < 0.3


def test_a_label_that_nothing_tells_is_no_leak():
    rows, labels = write_texts()
    labels = np.random.default_rng(1).permutation(labels)
    (leak,) = read_openings(read(rows), labels, TRAIN)
    # The better of both counts as whole, and a small difference as SMALLEST_GAIN.
    assert leak.evidence["f1_macro_opening"] < 0.45
    assert all(single.value < 0.3 for single in read_single_words(read(rows), labels, TRAIN))


@pytest.mark.parametrize("rule", ["present", "absent"])
def test_a_label_that_is_one_words_presence_is_found(rule):
    rows, _ = write_texts()
    there = np.array([("w7" in row) == (rule == "present") for row in rows])
    found = {leak.class_code: leak for leak in read_single_words(read(rows), there.astype(np.int64), TRAIN)}
    assert set(found) == {0, 1}
    for code, leak in found.items():
        assert leak.value == leak.evidence["f1"] == leak.evidence["accuracy"] == 1.0
        assert leak.evidence["rule"] == (rule if code else {"present": "absent", "absent": "present"}[rule])
        assert list(leak.rows) == list(np.flatnonzero(there == code))
        assert leak.evidence["rows_with_word"] == sum("w7" in row for row, t in zip(rows, TRAIN, strict=True) if t)


def test_single_words_equal_a_direct_search():
    rows, labels = write_texts()
    all_words = sorted({word for row in rows for word in row})
    there = np.array([[word in row for word in all_words] for row in map(set, rows)])
    often = there[TRAIN].sum(axis=0) >= leaks.MIN_WORD_ROWS
    for leak in read_single_words(read(rows), labels, TRAIN):
        mine = (labels == leak.class_code)[TRAIN, None]
        best = 0.0
        for has in (there[TRAIN][:, often], ~there[TRAIN][:, often]):
            best = max(best, (2 * (has & mine).sum(axis=0) / (has.sum(axis=0) + mine.sum())).max())
        assert leak.evidence["f1_train"] == pytest.approx(best)


def test_the_words_are_left_as_they_are():
    rows, labels = write_texts()
    words = read(rows)
    codes = words.codes.copy()
    list(read_openings(words, labels, TRAIN))
    list(read_single_words(words, labels, TRAIN))
    assert (words.codes == codes).all()


def test_a_common_class_is_not_found_by_a_word_that_all_rows_have():
    rows, _ = write_texts()
    labels = (np.random.default_rng(2).random(NUM_ROWS) < 0.95).astype(np.int64)
    found = {leak.class_code: leak for leak in read_single_words(read(rows), labels, TRAIN)}
    assert found[1].evidence["f1"] > 0.9
    assert found[1].value < 0.3


def test_several_labels_are_asked_one_by_one_and_missing_ones_are_left_out():
    rows, labels = write_texts()
    several = np.stack([["w7" in row for row in rows], labels == 1], axis=1).astype(np.int8)
    several[:100, 0] = -1
    single = {leak.class_code: leak for leak in read_single_words(read(rows), several, TRAIN)}
    assert set(single) == {0, 1}
    assert single[0].value == 1.0
    assert single[0].rows.min() >= 100
    assert single[0].num_checked == (several[:, 0] == 1).sum()
    assert single[1].value < 0.7
    opening = {leak.class_code: leak for leak in read_openings(read(rows), several, TRAIN)}
    assert opening[0].num_checked == (~TRAIN)[100:].sum()
    assert opening[1].num_checked == (~TRAIN).sum()


def test_validation_rows_are_not_learned_from():
    """With other words in the validation rows the same word is chosen, and is found to tell nothing."""
    rows, _ = write_texts()
    labels = np.array(["w7" in row for row in rows]).astype(np.int64)
    other = [row if train else ["other"] * 60 for row, train in zip(rows, TRAIN, strict=True)]
    one = {leak.class_code: leak.evidence for leak in read_single_words(read(rows), labels, TRAIN)}
    two = {leak.class_code: leak.evidence for leak in read_single_words(read(other), labels, TRAIN)}
    assert one[1]["f1_train"] == two[1]["f1_train"] == 1.0
    assert two[1]["f1"] == 0.0


def test_large_tables_are_drawn_from(monkeypatch):
    monkeypatch.setattr(leaks, "MAX_TRAIN", 50)
    monkeypatch.setattr(leaks, "MAX_VALIDATION", 20)
    rows = draw_rows(TRAIN)
    assert (TRAIN[rows].sum(), (~TRAIN[rows]).sum()) == (50, 20)
    assert list(rows) == sorted(set(rows))
    assert list(draw_rows(TRAIN)) == list(rows)
