import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raylab.training.masks import mask_segments, mask_tokens

SPECIAL_IDS = [0, 1, 2, 3, 50, 99, 120]  # 120 lies beyond the vocabulary, as added tokens may
OPTIONS = {"fraction": 0.15, "mask_token_id": 3, "vocab_size": 100, "special_ids": SPECIAL_IDS}
ORDINARY = np.setdiff1d(np.arange(100), SPECIAL_IDS)


def build_batch(num: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.choice(ORDINARY, (num, length)), rng.random((num, length)) < 0.8


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
def test_shares_are_right(fraction):
    # Tokens of one kind, which a random replacement cannot equal, as it is special here.
    input_ids = np.full((400, 500), 2)
    maskable = np.random.default_rng(0).random(input_ids.shape) < 0.7
    masked, selected = mask_tokens(input_ids, maskable, np.arange(400), 1, **(OPTIONS | {"fraction": fraction}))
    assert masked.dtype == np.int64
    assert selected.dtype == np.bool_
    assert not selected[~maskable].any()
    assert stats.binomtest(int(selected.sum()), int(maskable.sum()), fraction).pvalue > 1e-4
    chosen = masked[selected]
    is_random = np.isin(chosen, ORDINARY)
    counts = np.array([(chosen == 3).sum(), is_random.sum(), (chosen == 2).sum()])
    assert counts.sum() == len(chosen)
    assert stats.chisquare(counts, len(chosen) * np.array([0.8, 0.1, 0.1])).pvalue > 1e-4
    assert stats.chisquare(np.bincount(chosen[is_random], minlength=100)[ORDINARY]).pvalue > 1e-4
    np.testing.assert_array_equal(masked[~selected], input_ids[~selected])


def test_choices_are_independent_between_neighbours():
    input_ids = np.full((400, 500), 10)
    _, selected = mask_tokens(input_ids, np.ones_like(input_ids, dtype=bool), np.arange(400), 2, **OPTIONS)
    for one, other in ((selected[:, 1:], selected[:, :-1]), (selected[1:], selected[:-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.0112  # five standard errors


@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(1, 6),
    length=st.integers(1, 40),
    padding=st.integers(0, 20),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_a_row_depends_on_itself_alone(num, length, padding, seed, data):
    input_ids, maskable = build_batch(num, length, seed % 1000)
    rows = np.array(data.draw(st.lists(st.integers(0, 10**9), min_size=num, max_size=num)))
    options = OPTIONS | {"fraction": data.draw(st.sampled_from([0.15, 0.6, 1.0]))}
    masked, selected = mask_tokens(input_ids, maskable, rows, seed, **options)

    wide = ((0, 0), (0, padding))
    padded, padded_selected = mask_tokens(
        np.pad(input_ids, wide, constant_values=1), np.pad(maskable, wide), rows, seed, **options
    )
    np.testing.assert_array_equal(padded[:, :length], masked)
    np.testing.assert_array_equal(padded_selected[:, :length], selected)
    assert (padded[:, length:] == 1).all()
    assert not padded_selected[:, length:].any()

    order = np.array(data.draw(st.permutations(range(num))))[: data.draw(st.integers(1, num))]
    part, part_selected = mask_tokens(input_ids[order], maskable[order], rows[order], seed, **options)
    np.testing.assert_array_equal(part, masked[order])
    np.testing.assert_array_equal(part_selected, selected[order])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    fraction=st.sampled_from([0.0, 0.15, 0.6, 1.0]),
    data=st.data(),
)
def test_segments_are_masked_as_padded_rows(lengths, fraction, data):
    num, width = len(lengths), max(lengths)
    draw = lambda top: np.array(data.draw(st.lists(st.integers(0, top), min_size=num, max_size=num)))  # noqa: E731
    rows, seeds = draw(2**40), draw(2**63 - 1).astype(np.uint64)
    input_ids = np.random.default_rng(int(seeds[0] % 1000)).integers(0, 100, (num, width))
    real = np.arange(width) < np.array(lengths)[:, None]
    options = OPTIONS | {"fraction": fraction}
    packed, places = mask_segments(input_ids[real], np.array(lengths), rows, seeds, **options)
    selected = np.zeros(int(real.sum()), dtype=bool)
    selected[places] = True
    start = 0
    for i, length in enumerate(lengths):
        row, ids = rows[[i]], input_ids[[i]]
        maskable = real[[i]] & ~np.isin(ids, SPECIAL_IDS)
        expected, chosen = mask_tokens(ids, maskable, row, int(seeds[i]), **options)
        np.testing.assert_array_equal(packed[start : start + length], expected[0, :length])
        np.testing.assert_array_equal(selected[start : start + length], chosen[0, :length])
        start += length


def test_what_is_maskable_elsewhere_changes_nothing():
    input_ids, maskable = build_batch(20, 200)
    masked, selected = mask_tokens(input_ids, maskable, np.arange(20), 3, **OPTIONS)
    everywhere, all_selected = mask_tokens(input_ids, np.ones_like(maskable), np.arange(20), 3, **OPTIONS)
    np.testing.assert_array_equal(all_selected & maskable, selected)
    np.testing.assert_array_equal(everywhere[maskable], masked[maskable])


def test_seeds_and_rows_change_the_mask():
    input_ids = np.full((2, 2000), 10)
    maskable = np.ones_like(input_ids, dtype=bool)
    _, first = mask_tokens(input_ids, maskable, np.array([4, 5]), 0, **OPTIONS)
    _, second = mask_tokens(input_ids, maskable, np.array([4, 5]), 1, **OPTIONS)
    assert (first[0] != first[1]).any()
    assert (first != second).any(axis=1).all()


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_fraction_of_none_and_all(fraction, expected):
    input_ids, maskable = build_batch(10, 100)
    original = input_ids.copy()
    masked, selected = mask_tokens(input_ids, maskable, np.arange(10), 0, **(OPTIONS | {"fraction": fraction}))
    assert selected[maskable].mean() == expected
    assert (masked == original).all() == (fraction == 0.0)
    np.testing.assert_array_equal(input_ids, original)


@pytest.mark.parametrize("special_ids", [[], [0], [9], [0, 9], [3, 4, 5], [0, 1, 2, 4, 5, 6, 7, 8, 9]])
def test_random_tokens_reach_exactly_the_ordinary_ones(special_ids):
    input_ids = np.full((50, 500), 77)
    masked, _ = mask_tokens(
        input_ids,
        input_ids > 0,
        np.arange(50),
        0,
        fraction=1.0,
        mask_token_id=88,
        vocab_size=10,
        special_ids=special_ids,
    )
    assert set(np.unique(masked)) == set(range(10)) - set(special_ids) | {77, 88}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fraction": 1.5}, "fraction is 1.5"), ({"fraction": float("nan")}, "fraction"), ({"vocab_size": 4}, "special")],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mask_tokens(*build_batch(2, 3), np.arange(2), 0, **(OPTIONS | changes))


def test_bad_shapes_are_refused():
    input_ids, maskable = build_batch(2, 3)
    for arguments in ((input_ids, maskable[:, :2], np.arange(2)), (input_ids, maskable, np.arange(3))):
        with pytest.raises(ValueError, match="must be"):
            mask_tokens(*arguments, 0, **OPTIONS)
    num, seeds = np.array([3, 3]), np.zeros(2, np.uint64)
    for packed in (
        (input_ids.ravel()[1:], num, num, seeds),
        (input_ids.ravel(), num, num[1:], seeds),
        (input_ids.ravel(), num, num, seeds[1:]),
    ):
        with pytest.raises(ValueError, match="must be"):
            mask_segments(*packed, **OPTIONS)
