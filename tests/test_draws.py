import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylab.evaluation.draws import draw_shots

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


@st.composite
def multi_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n, L] of 1, 0 and -1, and groups, few of each so that needs compete."""
    num_labels = draw(st.integers(1, 3))
    row = st.tuples(
        st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=num_labels, max_size=num_labels), st.integers(0, 9)
    )
    rows = draw(st.lists(row, max_size=40))
    labels = np.array([labels for labels, _ in rows], dtype=np.int8).reshape(-1, num_labels)
    return labels, np.array([group for _, group in rows], dtype=np.int64)


def list_needs(labels: np.ndarray) -> list[np.ndarray]:
    """Which rows serve each need: having a label; being known to lack it, with no other."""
    none = ~(labels == 1).any(axis=1)
    return [need for column in labels.T for need in (column == 1, (column == 0) & none)]


@given(multi_rows(), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_multi_label_draw_serves_every_label_as_far_as_groups_allow(rows, shots, seed):
    labels, groups = rows
    chosen = draw_shots(labels, groups, shots, seed=seed, task="t", draw=0)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert len(np.unique(groups[chosen])) == len(chosen)
    used = set(groups[chosen])
    needs = list_needs(labels)
    assert all(any(need[row] for need in needs) for row in chosen)
    assert len(chosen) <= shots * len(needs)
    for need in needs:
        if need[chosen].sum() < shots:
            assert set(groups[need]) <= used


@given(multi_rows(), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_fewer_multi_label_shots_lie_inside_more(rows, shots, extra, seed):
    few, more, every = (draw_shots(*rows, n, seed=seed, task="t", draw=0) for n in (shots, shots + extra, None))
    assert set(few) <= set(more) <= set(every)
    assert every.tolist() == np.flatnonzero((rows[0] >= 0).any(axis=1)).tolist()


def test_rows_of_several_labels_count_for_each():
    labels = np.array([[1, 1]] * 20 + [[0, 0]] * 20, dtype=np.int8)
    chosen = draw_shots(labels, np.arange(40), 8, **KEY)
    assert labels[chosen].sum(axis=0).tolist() == [8, 8]
    assert len(chosen) == 16


def test_a_row_where_a_label_is_not_known_counts_only_for_the_others():
    labels = np.array([[0, -1]] * 10 + [[-1, 0]] * 10 + [[1, -1]] * 10 + [[-1, 1]] * 10, dtype=np.int8)
    chosen = draw_shots(labels, np.arange(40), 3, **KEY)
    assert [int(need[chosen].sum()) for need in list_needs(labels)] == [3, 3, 3, 3]


def test_multi_label_draw_is_the_same_in_every_version_and_process():
    labels = (np.arange(180).reshape(60, 3) * 7919 % 5 == 0).astype(np.int8)
    assert draw_shots(labels, np.arange(60) // 2, 1, **KEY).tolist() == [5, 26, 38, 49]


def test_large_multi_label_tables_are_drawn():
    labels = (np.random.default_rng(0).random((100_000, 50)) < 0.03).astype(np.int8)
    chosen = draw_shots(labels, np.arange(100_000) // 3, 32, **KEY)
    assert labels[chosen].sum(axis=0).min() >= 32
    assert (labels[chosen].sum(axis=1) == 0).sum() >= 32


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
