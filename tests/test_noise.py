import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy import stats

from raylab.base.noise import GOLDEN, _mix, _mix_int, derive_seed, ragged_uniforms, uniforms


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def test_derived_seed_is_fixed_by_its_parts():
    # A literal: if it changes, every stored result changes with it.
    assert derive_seed(0, "spans", 3) == 71087471474643934
    code = "from raylab.base.noise import derive_seed; print(derive_seed(0, 'spans', 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(0, "spans", 3)


def test_derived_seeds_differ():
    parts = [(), (0,), ("0",), (0, 0), (1, 11), (11, 1), ("1", "11"), ("111",), ("a", "b"), ("ab",), ("a,b",), ("é",)]
    seeds = [derive_seed(*part) for part in parts] + [derive_seed("row", row) for row in range(10_000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.mark.parametrize("part", [1.0, None, np.int64(1), True, b"a"])
def test_derive_seed_refuses_other_types(part):
    with pytest.raises(TypeError, match=type(part).__name__):
        derive_seed("a", part)


def test_hash_is_splitmix64():
    # The generator's published first output for the state 1234567.
    assert _mix_int(1234567 + GOLDEN) == 6457827717110365317
    words = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    assert [_mix_int(int(word)) for word in words] == _mix(words.copy()).tolist()


def test_uniforms_are_fixed():
    # Literals for the same reason as above.
    values = uniforms(derive_seed("fixed"), np.array([0, 7]), 2)
    np.testing.assert_array_equal(
        values, [[0.15796333506901938, 0.7413194820346909], [0.5502377273201778, 0.0013800838419137929]]
    )


def test_uniforms_depend_on_seed_row_and_slot_alone():
    rows = np.random.default_rng(0).permutation(1000)
    whole = uniforms(5, rows, 12)
    assert whole.shape == (1000, 12)
    assert whole.dtype == np.float64
    np.testing.assert_array_equal(uniforms(5, rows, 3), whole[:, :3])
    for index in (0, 1, 999):
        np.testing.assert_array_equal(uniforms(5, rows[index : index + 1], 12)[0], whole[index])
    order = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(uniforms(5, rows[order], 12), whole[order])


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**64 - 1])
def test_uniforms_are_uniform(seed):
    values = uniforms(seed, np.arange(20_000), 10)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    # Bounds of about five standard errors for 200,000 values.
    assert abs(values.mean() - 0.5) < 0.0033
    assert abs(values.var() - 1 / 12) < 0.0009
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-4
    for slot in range(10):
        assert stats.kstest(values[:, slot], "uniform").pvalue > 1e-4
    # Low bits too, by which a weak hash shows first.
    low = (values * 2.0**20) % 1.0
    assert stats.kstest(low.ravel(), "uniform").pvalue > 1e-4


def test_neighbours_are_uncorrelated():
    values = uniforms(3, np.arange(20_001), 11)
    # Five standard errors for 200,000 pairs.
    assert abs(correlate(values[:-1], values[1:])) < 0.0112
    assert abs(correlate(values[:, :-1], values[:, 1:])) < 0.0112
    assert abs(correlate(values[1:, :-1], values[:-1, 1:])) < 0.0112
    for step in (1, 2, 2**32):
        assert abs(correlate(values, uniforms(3 + step, np.arange(20_001), 11))) < 0.0112


def test_no_value_repeats_between_small_seeds_rows_and_slots():
    values = np.concatenate([uniforms(seed, np.arange(300), 20).ravel() for seed in range(30)])
    assert len(np.unique(values)) == len(values)


def test_large_rows_and_empty_input_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uniforms(2**64 - 1, np.array([0, 2**63 - 1]), 4).shape == (2, 4)
        assert uniforms(0, np.array([], dtype=np.int64), 4).shape == (0, 4)
        assert uniforms(0, np.arange(3), 0).shape == (3, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_uniforms_refuse_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        uniforms(seed, np.arange(3), 1)


def test_ragged_uniforms_are_the_rows_own():
    seeds, rows = np.array([7, 0, 7, 2**64 - 1, 7], np.uint64), np.array([3, 2**63 - 1, 0, 5, 3])
    lengths = np.array([4, 1, 0, 6, 2])
    direct = [uniforms(int(s), rows[[i]], n)[0] for i, (s, n) in enumerate(zip(seeds, lengths, strict=True))]
    before = seeds.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(ragged_uniforms(seeds, rows, lengths), np.concatenate(direct))
        assert ragged_uniforms(seeds[:0], rows[:0], lengths[:0]).shape == (0,)
    np.testing.assert_array_equal(seeds, before)


def test_rows_are_left_alone():
    rows = np.arange(5)
    uniforms(0, rows, 2)
    np.testing.assert_array_equal(rows, np.arange(5))
