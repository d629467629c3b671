"""Mixed models of paired differences: a mean, and how much of their spread comes from seeds and how much from draws."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

# Low, as draws that are each seed's own would lose power by it.
SHARED_BELOW = 0.001


class Mixed(NamedTuple):
    """A mean difference with its 95 % t interval and p, and the SDs of what seeds and draws add to it."""

    mean: float
    low: float
    high: float
    p: float
    sd_seed: float
    sd_draw: float


def _conclude(mean: float, error: float, df: float, sd_seed: float, sd_draw: float) -> Mixed:
    half = float(stats.t.ppf(0.975, df)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, df)) if error > 0 else float(mean == 0)
    return Mixed(mean, mean - half, mean + half, p, sd_seed, sd_draw)


def fit_nested(groups: Sequence[Sequence[float]]) -> Mixed | None:
    """REML of y = mean + seed + draw within seed, over the draws of each seed; t with one less df than seeds.

    What is equal for both arms (the seed, the draw) has cancelled in the differences: the two terms are how the arms'
    difference varies over seeds, and over the draws of one. None with one seed, or one draw on every seed. In
    a balanced design with a seed term above 0 it is the paired t-test of the seeds' means.
    """
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    if len(sizes) < 2 or sizes.max() < 2:
        return None
    means, total = np.array([np.mean(group) for group in groups]), sizes.sum()
    within = float(sum(np.square(np.asarray(group) - np.mean(group)).sum() for group in groups))

    def solve(ratio: float) -> tuple[float, float, float, float]:
        """-2 log restricted likelihood, mean, variance of a draw and precision, at seed variance / draw variance."""
        weights = sizes / (1 + sizes * ratio)
        precision = float(weights.sum())
        mean = float(weights @ means) / precision
        variance = (within + float(weights @ np.square(means - mean))) / (total - 1)
        if variance <= 0:
            return -math.inf, mean, 0.0, precision
        likelihood = (total - 1) * math.log(variance) + float(np.log1p(sizes * ratio).sum()) + math.log(precision)
        return likelihood, mean, variance, precision

    found = optimize.minimize_scalar(lambda x: solve(math.exp(x))[0], bounds=(-14.0, 14.0), method="bounded",
                                     options={"xatol": 1e-9})  # fmt: skip
    ratio = math.exp(found.x)
    if solve(0.0)[0] <= solve(ratio)[0]:
        ratio = 0.0
    _, mean, variance, precision = solve(ratio)
    error = math.sqrt(variance / precision)
    return _conclude(mean, error, len(sizes) - 1, math.sqrt(ratio * variance), math.sqrt(variance))


def vary_together(rows: Mapping[Any, Mapping[Any, float]]) -> bool:
    """Whether draws of one name go the same way on all seeds, by an F-test at 0.001 of draws against the rest.

    Draws that each seed makes anew don't: the guard against names that mean the same draw after all.
    """
    found = _split_squares(rows)
    if found is None:
        return False
    _, (_, num_seeds, num_draws), (_, of_draws, of_rest) = found
    df = (num_draws - 1, (num_seeds - 1) * (num_draws - 1))
    if of_rest == 0:
        return of_draws > 0
    return float(stats.f.sf(of_draws / of_rest, *df)) < SHARED_BELOW


def fit_crossed(rows: Mapping[Any, Mapping[Any, float]]) -> Mixed | None:
    """y = mean + seed + draw + rest, of draws that all seeds share: the mean for other seeds and other draws.

    From mean squares, with Satterthwaite's df at most. Only draws of every seed count, where there are two of them;
    None otherwise, or with one seed. Never narrower than seeds alone or draws alone would have it.
    """
    found = _split_squares(rows)
    if found is None:
        return None
    mean, (size, num_seeds, num_draws), (of_seeds, of_draws, of_rest) = found
    df_rest = (num_seeds - 1) * (num_draws - 1)
    squares = max(of_seeds + of_draws - of_rest, of_seeds, of_draws)
    if squares == 0:
        return _conclude(mean, 0.0, num_seeds - 1, 0.0, 0.0)
    parts = ((of_seeds, num_seeds - 1), (of_draws, num_draws - 1), (of_rest, df_rest))
    # With few draws Satterthwaite's df alone would claim too often: never more than the larger part has.
    df = min(squares**2 / sum(square**2 / part for square, part in parts), max(parts[:2])[1])
    sds = (math.sqrt(max(0.0, of_seeds - of_rest) / num_draws), math.sqrt(max(0.0, of_draws - of_rest) / num_seeds))
    return _conclude(mean, math.sqrt(squares / size), df, *sds)


def _split_squares(
    rows: Mapping[Any, Mapping[Any, float]],
) -> tuple[float, tuple[int, int, int], tuple[float, float, float]] | None:
    """Mean; values, seeds and draws; mean squares of seeds, draws and the rest, over the draws that every seed has."""
    names = [draw for draw in next(iter(rows.values())) if all(draw in values for values in rows.values())]
    if len(rows) < 2 or len(names) < 2:
        return None
    table = np.array([[values[name] for name in names] for values in rows.values()])
    num_seeds, num_draws = table.shape
    mean, seeds, draws = float(table.mean()), table.mean(1), table.mean(0)
    rest = np.square(table - seeds[:, None] - draws + mean).sum() / ((num_seeds - 1) * (num_draws - 1))
    squares = (num_draws * float(seeds.var(ddof=1)), num_seeds * float(draws.var(ddof=1)), float(rest))
    return mean, (table.size, num_seeds, num_draws), squares
