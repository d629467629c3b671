"""Random numbers that depend on names alone: a seed, a document's row and a slot, never on batches or workers.

A stateful generator gives a document other numbers whenever batch size, worker count or order change. Here every number
is a hash of where it is used, so any worker can compute any document's numbers on its own, and again after a crash.
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

# Increment and multipliers of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
WORD = 0xFFFFFFFFFFFFFFFF


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from any number of names and numbers: `derive_seed(seed, "spans", epoch)`.

    blake2b of the parts as canonical JSON: the same on every machine and Python, and 1 differs from "1". Raises
    TypeError for a part that is neither int nor str (NumPy integers too).
    """
    for part in parts:
        if not isinstance(part, (int, str)) or isinstance(part, bool):
            raise TypeError(f"a seed is derived from int and str, not {type(part).__name__}")
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big") >> 1


def uniforms(seed: int, rows: NDArray[np.int64], num: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2^-53: result[i, j] is a hash of (seed, rows[i], j) and of nothing else.

    rows[N] are not negative; the result is [N, num]. Raises ValueError for a seed outside [0, 2^64).
    """
    if not 0 <= seed <= WORD:
        raise ValueError(f"seed is {seed}; it must be in [0, 2^64), such as derive_seed gives")
    # A hash after each part: one hash of a plain sum would give (seed, row + 1) the numbers of (seed + 1, row).
    # Integer arrays wrap around silently, NumPy scalars warn: hence a Python int for the seed, arrays for the rest.
    keys = _mix(rows.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(_mix_int(seed + GOLDEN)))
    steps = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    bits = _mix(keys[:, None] + steps)
    bits >>= np.uint64(11)
    return bits * np.float64(2.0**-53)


def ragged_uniforms(
    seeds: NDArray[np.uint64], rows: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`uniforms` of rows that differ in seed and in number, one after another: [sum of lengths].

    Of row i the first lengths[i] numbers of `uniforms(seeds[i], rows[i : i + 1], ...)`; all three are [N].
    """
    keys = _mix(rows.astype(np.uint64) * np.uint64(GOLDEN) + _mix(seeds + np.uint64(GOLDEN)))
    starts = (np.cumsum(lengths) - lengths).astype(np.uint64)
    # Slot j of a row stands at start + j: a row's part of the steps is taken out of its key, one product serves all.
    bits = np.arange(1, int(lengths.sum()) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    bits += np.repeat(keys - starts * np.uint64(GOLDEN), lengths)
    bits = _mix(bits)
    bits >>= np.uint64(11)
    return bits * np.float64(2.0**-53)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, in place: each bit of the input changes each bit of the output about half the time."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(MULTIPLIER_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(MULTIPLIER_2)
    words ^= words >> np.uint64(31)
    return words


def _mix_int(word: int) -> int:
    """`_mix` of one Python int, modulo 2^64."""
    word &= WORD
    word = (word ^ (word >> 30)) * MULTIPLIER_1 & WORD
    word = (word ^ (word >> 27)) * MULTIPLIER_2 & WORD
    return word ^ (word >> 31)
