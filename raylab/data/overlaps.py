"""Text that rows have in common: equal texts, near-duplicates, and runs of words that many groups share.

Rows are compared by their words, whatever their case, white space and punctuation. Nothing here returns a word.
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylab.base.noise import GOLDEN, MULTIPLIER_1, MULTIPLIER_2

SHINGLE_WORDS = 3
JACCARD = 0.8
# Bands of MinHash values: rows of a Jaccard of 0.8 meet in one of 20 bands of 5 with a chance of 0.9996, of 0.9 with
# one over 0.99999999. What meets is then compared exactly.
BANDS, BAND_VALUES, MINHASH_SEED = 20, 5, 1
# Of what meets, less is compared: texts of a Jaccard of 0.8 agree in fewer of 100 values with a chance of 0.000001.
LEAST_AGREEING = 60
MAX_CANDIDATES = 5_000_000  # pairs that meet; beyond them counts are lower bounds, and say so
RUN_WORDS = 10
READ_ROWS = 5_000
BLOCK_WORDS = 4_000_000  # hashed at a time: bounds the memory

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


class Words(NamedTuple):
    """Rows as numbers of words: row i is `codes[offsets[i]:offsets[i + 1]]`, each number below `num_distinct`."""

    codes: NDArray[np.int32]
    offsets: Ints
    num_distinct: int

    @property
    def lengths(self) -> Ints:
        """Words a row."""
        return np.diff(self.offsets)


class Near(NamedTuple):
    """Near-duplicates: pairs of texts (numbers of `number_texts`), and whether those are all, or too many met."""

    left: Ints
    right: Ints
    complete: bool


class Shared(NamedTuple):
    """Runs of words in many groups: how many there are, and the words of each row that stand in one."""

    num_runs: int
    words: Ints


def read_words(texts: pa.ChunkedArray) -> Words:
    """Cuts texts into words: letters, marks and digits, in lower case. Holds 4 bytes a word and each word once."""
    known: dict[str, int] = {}
    codes, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for start in range(0, len(texts), READ_ROWS):
        rows = texts.slice(start, READ_ROWS).combine_chunks()
        plain = pc.replace_substring_regex(pc.utf8_lower(rows), r"[^\p{L}\p{M}\p{N}]+", " ")
        cut = pc.split_pattern(pc.utf8_trim_whitespace(plain), " ")
        words = cut.flatten()
        # A text without a word is cut into one empty word.
        empty = pc.equal(pc.binary_length(words), 0).to_numpy(zero_copy_only=False)
        found = pc.list_value_length(cut).to_numpy(zero_copy_only=False).astype(np.int64)
        if empty.any():
            found[np.repeat(np.arange(len(found)), found)[empty]] = 0
            words = words.filter(pa.array(~empty))
        encoded = words.dictionary_encode()
        numbers = [known.setdefault(word, len(known)) for word in encoded.dictionary.to_pylist()]
        codes.append(np.array(numbers, dtype=np.int32)[encoded.indices.to_numpy()])
        lengths.append(found)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return Words(np.concatenate(codes), offsets, len(known))


def take_rows(words: Words, rows: Ints) -> Words:
    """Some rows, in the order given."""
    lengths = words.lengths[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    codes = np.zeros(offsets[-1], np.int32)
    for start, end in _cut_blocks(offsets):
        some, first = slice(start, end), offsets[start]
        moves = np.repeat(words.offsets[rows[some]] - offsets[some], lengths[some])
        codes[first : offsets[end]] = words.codes[moves + np.arange(first, offsets[end])]
    return Words(codes, offsets, words.num_distinct)


def _mix(values: Hashes) -> Hashes:
    """splitmix64's finaliser: equal numbers stay equal, near ones come to lie anywhere."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))


def _hash_runs(words: Words, rows: Ints, size: int) -> tuple[Hashes, Ints, Ints]:
    """64-bit hashes of all runs of `size` words of some neighbouring rows, with their row and first word.

    A row of fewer words has none.
    """
    first, last = words.offsets[rows[0]], words.offsets[rows[-1] + 1]
    codes = words.codes[first:last].astype(np.uint64)
    num = max(len(codes) - size + 1, 0)
    hashes = np.zeros(num, np.uint64)
    for place in range(size):
        hashes = _mix(hashes + codes[place : num + place] * np.uint64(GOLDEN) + np.uint64(place + 1))
    of_row = np.repeat(rows, words.lengths[rows])[:num]
    starts = np.arange(first, first + num)
    whole = starts + size <= words.offsets[of_row + 1]
    return hashes[whole], of_row[whole], starts[whole]


def _cut_blocks(offsets: Ints) -> Iterator[tuple[int, int]]:
    """From and to of neighbouring rows that have about BLOCK_WORDS together."""
    last = len(offsets) - 1
    edges = [0, *np.searchsorted(offsets, np.arange(BLOCK_WORDS, offsets[-1], BLOCK_WORDS)), last]
    return itertools.pairwise(sorted({int(edge) for edge in edges}))


def number_texts(words: Words) -> Ints:
    """A number for each row, equal for rows of the same words in the same order: [rows], by first appearance."""
    known: dict[bytes, int] = {}
    raw, edges = words.codes, words.offsets.tolist()
    numbers = [
        known.setdefault(hashlib.blake2b(raw[start:end].tobytes(), digest_size=16).digest(), len(known))
        for start, end in itertools.pairwise(edges)
    ]
    return np.array(numbers, dtype=np.int64)


def _list_shingles(words: Words, rows: Ints) -> tuple[Hashes, Ints]:
    """The distinct shingles of each of some rows, sorted within the row: their hashes, and [rows + 1] offsets.

    A text of fewer words than a shingle has none, and is near nothing.
    """
    picked = take_rows(words, rows)
    if not len(rows):
        return np.zeros(0, np.uint64), np.zeros(1, np.int64)
    hashes, of_row, _ = _hash_runs(picked, np.arange(len(rows)), SHINGLE_WORDS)
    order = np.lexsort((hashes, of_row))
    hashes, of_row = hashes[order], of_row[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (of_row[1:] != of_row[:-1])
    counts = np.bincount(of_row[new], minlength=len(rows))
    return hashes[new], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _sign(words: Words) -> NDArray[np.uint32]:
    """MinHash values of every row's shingles: uint32 [rows, BANDS x BAND_VALUES]."""
    from datasketch import MinHash

    permutations = MinHash(BANDS * BAND_VALUES, seed=MINHASH_SEED).permutations
    signatures = np.zeros((len(words.offsets) - 1, BANDS * BAND_VALUES), np.uint32)
    for rows in itertools.starmap(np.arange, _cut_blocks(words.offsets)):
        hashes, edges = _list_shingles(words, rows)
        low = (hashes >> np.uint64(32)).tolist()
        for place, row in enumerate(rows):
            sketch = MinHash(BANDS * BAND_VALUES, permutations=permutations, scheme="affine32", hashfunc=int)
            sketch.update_batch(low[edges[place] : edges[place + 1]])
            signatures[row] = sketch.hashvalues
    return signatures


def _meet(signatures: NDArray[np.uint32], wanted: NDArray[np.bool_], sides: NDArray[np.int64]) -> tuple[Ints, bool]:
    """Pairs of texts that share a band and have rows on two sides, as left * texts + right; False where too many met.

    sides: a bit for each part in which a text has rows. Texts that are not `wanted` meet nothing.
    """
    num, texts = len(signatures), np.flatnonzero(wanted)
    pending, num_pairs, looked = [np.zeros(0, np.int64)], 0, 0
    for band in range(BANDS):
        keys = np.zeros(len(texts), np.uint64)
        for value in range(band * BAND_VALUES, (band + 1) * BAND_VALUES):
            keys = _mix(keys * np.uint64(GOLDEN) + signatures[texts, value] + np.uint64(1))
        order = np.argsort(keys, kind="stable")
        keys, here = keys[order], texts[order]
        # Neighbours in a bucket, then those one further apart, until no bucket is that long.
        places, apart = np.arange(len(here)), 1
        while True:
            places = places[places + apart < len(here)]
            places = places[keys[places] == keys[places + apart]]
            looked += len(places)
            if num_pairs > MAX_CANDIDATES:  # many of them met before, in another band
                pending = [np.unique(np.concatenate(pending))]
                num_pairs = len(pending[0])
            if not len(places) or num_pairs > MAX_CANDIDATES or looked > BANDS * MAX_CANDIDATES:
                break
            left, right = here[places], here[places + apart]
            across = (sides[left] != sides[right]) | (sides[left] & (sides[left] - 1) != 0)
            pending.append(left[across] * num + right[across])
            num_pairs, apart = num_pairs + len(pending[-1]), apart + 1
        if len(places):
            return np.unique(np.concatenate(pending)), False
    return np.unique(np.concatenate(pending)), True


def find_near(words: Words, sides: NDArray[np.int64]) -> Near:
    """Pairs of different texts with a Jaccard of JACCARD or more, of which two parts have one each.

    words: each text once. sides: int64 [texts], a bit for each part in which the text has rows. Jaccard: shared over
    all distinct shingles of SHINGLE_WORDS words. Time grows with the words and the pairs that meet.
    """
    signatures = _sign(words)
    pairs, complete = _meet(signatures, words.lengths >= SHINGLE_WORDS, sides)
    left, right = np.divmod(pairs, max(len(sides), 1))
    alike = [_agree(signatures, *some) >= LEAST_AGREEING for some in _cut_pairs(left, right, BLOCK_WORDS // 10)]
    likely = np.concatenate([np.zeros(0, dtype=bool), *alike])
    left, right = left[likely], right[likely]
    kept = np.zeros(len(left), dtype=bool)
    # As many pairs at once as their words fit into a block.
    sizes = np.cumsum(words.lengths[left] + words.lengths[right])
    for start, end in _cut_blocks(np.concatenate([[0], sizes])):
        kept[start:end] = _compare(words, left[start:end], right[start:end]) >= JACCARD
    return Near(left[kept], right[kept], complete)


def _cut_pairs(left: Ints, right: Ints, size: int) -> Iterator[tuple[Ints, Ints]]:
    """Some pairs at a time."""
    for start in range(0, len(left), size):
        yield left[start : start + size], right[start : start + size]


def _agree(signatures: NDArray[np.uint32], left: Ints, right: Ints) -> Ints:
    """In how many of their MinHash values the texts of each pair agree."""
    found: Ints = (signatures[left] == signatures[right]).sum(axis=1)
    return found


def _compare(words: Words, left: Ints, right: Ints) -> NDArray[np.float64]:
    """The exact Jaccard of pairs of rows."""
    from scipy import sparse

    rows, at = np.unique(np.concatenate([left, right]), return_inverse=True)
    hashes, edges = _list_shingles(words, rows)
    columns = np.unique(hashes, return_inverse=True)[1]
    has = sparse.csr_matrix((np.ones(len(columns), np.int32), columns, edges))
    sizes, at_left, at_right = np.diff(edges), at[: len(left)], at[len(left) :]
    shared = np.asarray(has[at_left].multiply(has[at_right]).sum(axis=1)).ravel()
    return shared / (sizes[at_left] + sizes[at_right] - shared)


def find_shared(words: Words, groups: Ints, more_than: int) -> Shared:
    """Runs of RUN_WORDS words that stand in more than `more_than` groups.

    groups: int64 [rows], from 0. The runs are counted in as many passes as their number needs, so that memory does
    not grow with it: a pass sorts about 3 x BLOCK_WORDS hashes.
    """
    passes = max(1, int(np.ceil(words.offsets[-1] / (3 * BLOCK_WORDS))))
    shared = [np.zeros(0, np.uint64)]
    for turn in range(passes):
        hashes, of_group = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for rows in itertools.starmap(np.arange, _cut_blocks(words.offsets)):
            found, of_row, _ = _hash_runs(words, rows, RUN_WORDS)
            mine = found % np.uint64(passes) == turn
            hashes.append(found[mine])
            of_group.append(groups[of_row[mine]])
        shared.append(_find_frequent(np.concatenate(hashes), np.concatenate(of_group), more_than))
    runs = np.sort(np.concatenate(shared))
    inside = np.zeros(len(words.offsets) - 1, dtype=np.int64)
    for rows in itertools.starmap(np.arange, _cut_blocks(words.offsets)):
        found, _, starts = _hash_runs(words, rows, RUN_WORDS)
        first = words.offsets[rows[0]]
        starts = starts[np.isin(found, runs)] - first
        edges = np.zeros(words.offsets[rows[-1] + 1] - first + 1, dtype=np.int32)
        edges[starts] += 1
        edges[starts + RUN_WORDS] -= 1
        so_far = np.concatenate([[0], np.cumsum(np.cumsum(edges[:-1]) > 0)])
        inside[rows] = np.diff(so_far[words.offsets[rows[0] : rows[-1] + 2] - first])
    return Shared(len(runs), inside)


def _find_frequent(hashes: Hashes, groups: Ints, more_than: int) -> Hashes:
    """The hashes that stand in more than `more_than` groups."""
    values, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    often = counts[inverse] > more_than  # few: only they are counted by group
    number, of_group = inverse[often], groups[often]
    order = np.lexsort((of_group, number))
    number, of_group = number[order], of_group[order]
    new = np.ones(len(number), dtype=bool)
    new[1:] = (number[1:] != number[:-1]) | (of_group[1:] != of_group[:-1])
    return values[np.bincount(number[new], minlength=len(values)) > more_than]
