"""Arms under several targets: which dominate which, and how crowded they stand (NSGA-II: Deb et al. 2002)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rank_fronts(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """ranks[N] of values[N, K], larger better: 0 where no row dominates, 1 where only rows of rank 0 do, and so on.

    A row dominates another if it is nowhere worse and somewhere better.
    """
    if values.shape[1] == 1:
        return np.unique(-values[:, 0], return_inverse=True)[1]
    above = values[:, None]
    dominates: NDArray[np.bool_] = np.all(above >= values, axis=-1) & np.any(above > values, axis=-1)
    ranks = np.full(len(values), -1)
    rank = 0
    while (left := ranks < 0).any():
        ranks[left & ~dominates[left].any(0)] = rank
        rank += 1
    return ranks


def compute_crowding(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """distances[N] of values[N, K]: the gap between the two neighbours in each column over its width, summed.

    The ends of a column have infinite distance; a column of equal values counts nothing.
    """
    distances = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        width = ordered[-1] - ordered[0]
        if width > 0:
            gaps = np.full(len(values), np.inf)
            gaps[1:-1] = (ordered[2:] - ordered[:-2]) / width
            distances[order] += gaps
    return distances


def order_best(values: Sequence[Sequence[float]]) -> list[int]:
    """The rows of values[N, K], larger better, best first: by rank, within one the least crowded, then as they came.

    With one column: by value.
    """
    if not values:
        return []
    table = np.asarray(values, dtype=np.float64)
    ranks, crowding = rank_fronts(table), np.zeros(len(table))
    for rank in range(ranks.max() + 1):
        crowding[ranks == rank] = compute_crowding(table[ranks == rank])
    return [int(row) for row in np.lexsort((-crowding, ranks))]
