"""Non-dominated ranks and crowding against Optuna, a direct count, and numbers worked by hand."""

import numpy as np
import optuna
import pytest

from raylab.results.fronts import compute_crowding, order_best, rank_fronts


def draw(num, columns, seed):
    """Values with ties: whole numbers from 0 to 5."""
    return np.random.default_rng(seed).integers(0, 6, (num, columns)).astype(float)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_peeling_front_by_front(columns, seed):
    values = draw(40, columns, seed)
    ranks = rank_fronts(values)
    left, rank = list(range(40)), 0
    while left:
        front = [
            i for i in left
            if not any((values[j] >= values[i]).all() and (values[j] > values[i]).any() for j in left)
        ]  # fmt: skip
        assert sorted(np.flatnonzero(ranks == rank)) == front
        left, rank = [i for i in left if i not in front], rank + 1


@pytest.mark.parametrize("columns", [2, 3])
def test_the_first_front_is_optunas(columns):
    values = draw(60, columns, 7)
    study = optuna.create_study(directions=["maximize"] * columns)
    for row in values:
        study.tell(study.ask(), list(row))
    assert sorted(trial.number for trial in study.best_trials) == list(np.flatnonzero(rank_fronts(values) == 0))


def test_crowding_by_hand():
    values = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [10.0, 0.0]])
    assert compute_crowding(values) == pytest.approx([np.inf, 4 / 10 + 5 / 10, 9 / 10 + 6 / 10, np.inf])
    assert list(compute_crowding(np.array([[3.0, 1.0], [3.0, 2.0], [3.0, 4.0]]))) == [np.inf, 1.0, np.inf]
    assert list(compute_crowding(np.array([[1.0, 1.0]]))) == [0.0]


def test_the_best_come_by_rank_then_the_least_crowded_then_in_order():
    front = [[1.0, 6.0], [0.0, 10.0], [10.0, 0.0], [4.0, 5.0]]
    behind = [[0.5, 5.5], [0.5, 5.5]]
    assert order_best(behind + front) == [3, 4, 5, 2, 0, 1]
    assert order_best([[0.1], [0.3], [0.2], [0.3]]) == [1, 3, 2, 0]
    assert order_best([]) == []
