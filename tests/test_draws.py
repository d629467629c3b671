import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylab.draws import draw_shots

KEY = {"seed": 3, "task": "severity", "draw": 1}
# Few groups and classes, so that classes run out and compete for groups in many of the cases.
ROWS = st.lists(st.tuples(st.integers(-1, 3), st.integers(-2, 12)), max_size=40)


def build_rows(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@given(ROWS, st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_draw_is_valid_and_as_large_as_groups_allow(rows, shots, seed):
    labels, groups = build_rows(rows)
    chosen = draw_shots(labels, groups, shots, seed=seed, task="t", draw=0)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert (labels[chosen] >= 0).all()
    assert len(np.unique(groups[chosen])) == len(chosen)
    used = set(groups[chosen])
    for label in set(labels[labels >= 0]):
        count = int((labels[chosen] == label).sum())
        assert count <= shots
        if count < shots:
            assert set(groups[labels == label]) <= used


@given(ROWS, st.integers(1, 6), st.integers(0, 6), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_fewer_shots_lie_inside_more(rows, shots, extra, seed):
    labels, groups = build_rows(rows)
    few = draw_shots(labels, groups, shots, seed=seed, task="t", draw=0)
    more = draw_shots(labels, groups, shots + extra, seed=seed, task="t", draw=0)
    every = draw_shots(labels, groups, None, seed=seed, task="t", draw=0)
    assert set(few) <= set(more) <= set(every)


def test_no_shortage_gives_exactly_shots_a_class():
    labels = np.repeat(np.arange(5), 40)
    chosen = draw_shots(labels, np.arange(200), 16, **KEY)
    assert np.bincount(labels[chosen]).tolist() == [16] * 5


def test_a_class_that_runs_out_gives_fewer_rows_and_takes_none_from_others():
    labels = np.array([0] * 3 + [1] * 30)
    chosen = draw_shots(labels, np.arange(33), 8, **KEY)
    assert np.bincount(labels[chosen]).tolist() == [3, 8]


def test_every_labelled_row_without_shots():
    labels = np.array([1, -1, 0, 0, -1])
    assert draw_shots(labels, np.zeros(5, dtype=np.int64), None, **KEY).tolist() == [0, 2, 3]


def test_unlabelled_rows_use_up_no_group():
    labels = np.array([-1, -1, 0, 1])
    assert draw_shots(labels, np.array([0, 1, 0, 1]), 1, **KEY).tolist() == [2, 3]


def test_same_key_same_rows_other_key_other_rows():
    labels, groups = np.arange(400) % 4, np.arange(400)
    first = draw_shots(labels, groups, 8, **KEY)
    assert first.tolist() == draw_shots(labels.copy(), groups.copy(), 8, **KEY).tolist()
    for change in ({"seed": 4}, {"task": "cause"}, {"draw": 2}):
        assert first.tolist() != draw_shots(labels, groups, 8, **{**KEY, **change}).tolist()


def test_draw_is_the_same_in_every_version_and_process():
    # Written down once: a change here silently changes every published few-shot score.
    labels, groups = np.arange(60) % 3, np.arange(60) // 2
    assert draw_shots(labels, groups, 2, **KEY).tolist() == [24, 34, 38, 49, 57, 59]


def test_rows_and_contested_groups_are_drawn_fairly():
    # Two classes share one group: each should win it about half the time, and each row come up equally often.
    labels, groups = np.array([0, 1]), np.array([0, 0])
    wins = sum(int(draw_shots(labels, groups, 1, seed=s, task="t", draw=0)[0]) for s in range(400))
    assert 150 < wins < 250
    counts = np.zeros(10)
    for seed in range(1000):
        counts[draw_shots(np.zeros(10, dtype=np.int64), np.arange(10), 2, seed=seed, task="t", draw=0)] += 1
    assert counts.min() > 140
    assert counts.max() < 260


@pytest.mark.parametrize("shots", [0, -1])
def test_wrong_shots_are_refused(shots):
    with pytest.raises(ValueError, match="shots is"):
        draw_shots(np.zeros(3, dtype=np.int64), np.arange(3), shots, **KEY)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        draw_shots(np.zeros(3, dtype=np.int64), np.arange(4), 1, **KEY)


def test_large_tables_are_fast():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 250_000)
    one_large_group = np.where(labels == 7, 0, rng.integers(0, 100_000, 250_000))
    start = time.perf_counter()
    draw_shots(labels, one_large_group, 32, **KEY)
    assert time.perf_counter() - start < 2.0
