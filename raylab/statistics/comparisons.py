"""Paired comparisons of arms: the seed is the unit, draws are averaged within it, and only shared seeds count.

A claim needs the sign-flip test after Holm's correction and an interval without 0. Where draws are shared between the
seeds (folds of one partition), an arm that suits those draws wins on every seed: then it must hold for others too.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from raylab.base.mistakes import JobError
from raylab.statistics.variances import Mixed, fit_crossed, fit_nested, vary_together

Floats = npt.NDArray[np.float64]
# An arm's values: seed -> draw -> value. Draws of one name are the same choice for both arms of a seed.
Scores = Mapping[Any, Mapping[Any, float]]

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
POWER = 0.8
# From here on the interval is a BCa bootstrap: below, it is too narrow.
BCA_FROM = 20
RESAMPLES = 9999
# Up to here the sign-flip test looks at every assignment of signs, beyond at so many of them.
EXACT_UP_TO = 20
SAMPLED_FLIPS = 99_999
MOST_SEEDS = 1000


class Comparison(NamedTuple):
    """Arm `a` minus arm `b`. Intervals are of 95 %; what so few seeds leave undefined is NaN."""

    a: str
    b: str
    num_seeds: int
    num_draws: int
    difference: float
    low: float
    high: float
    interval: str
    sd: float
    p: float
    p_draws: float | None
    p_holm: float
    num_comparisons: int
    test: str
    superiority: float
    mixed: Mixed | None
    better: Literal["a", "b"] | None
    smallest_p: float
    seeds_at_least: int
    seeds_needed: int | None
    detectable: float


def pair_draws(a: Scores, b: Scores) -> dict[Any, dict[Any, float]]:
    """Seed -> draw -> a minus b, of the draws that both arms have on a seed; seeds without one are left out."""
    paired = {
        seed: {draw: a[seed][draw] - b[seed][draw] for draw in a[seed] if draw in b[seed]} for seed in a if seed in b
    }
    return {seed: found for seed, found in paired.items() if found}


def flip_signs(differences: Floats) -> tuple[float, bool]:
    """Two-sided sign-flip test of differences[S] (Fisher's randomisation of pairs), by their sum; and if it is exact.

    Under the null each difference is as likely as its negative. Up to 20 seeds all 2^S assignments count, else 99,999
    random ones of a fixed seed and the one observed (Phipson and Smyth 2010).
    """
    observed = abs(float(differences.sum()))
    # Sums that are equal but for rounding count as equal.
    slack = 1e-10 * float(np.abs(differences).sum())
    if len(differences) <= EXACT_UP_TO:
        sums = np.array([0.0])
        for index, value in enumerate(differences):
            # The first sign is held: the other half of the assignments mirrors these.
            sums = np.concatenate([sums + value, sums - value]) if index else sums + value
        return float((np.abs(sums) >= observed - slack).mean()), True
    rng, count = np.random.default_rng(0), 0
    for size in (9_999, *[10_000] * (SAMPLED_FLIPS // 10_000)):
        signs = rng.integers(0, 2, (size, len(differences))) * 2.0 - 1.0
        count += int((np.abs(signs @ differences) >= observed - slack).sum())
    return (1 + count) / (1 + SAMPLED_FLIPS), False


def compute_bounds(differences: Floats) -> tuple[float, float, str]:
    """The 95 % interval of the mean of differences[S]: Student's t, from 20 seeds on a BCa bootstrap; and its name."""
    mean, num = float(differences.mean()), len(differences)
    if num < 2:
        return math.nan, math.nan, "none"
    if num < BCA_FROM or np.ptp(differences) == 0:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1) * stats.sem(differences))
        return mean - half, mean + half, "t"
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high), "BCa"


def adjust_holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down p-values, in the order given; NaN where there is none, which still counts in the family."""
    order = np.argsort([1.0 if math.isnan(value) else value for value in values], kind="stable")
    adjusted, largest = [math.nan] * len(values), 0.0
    for rank, index in enumerate(order):
        if not math.isnan(values[index]):
            largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
            adjusted[index] = largest
    return adjusted


def find_smallest_p(num_seeds: int) -> float:
    """The smallest p that so many seeds can give: 2 of the 2^S assignments of signs, or those sampled."""
    return 2.0 ** (1 - num_seeds) if num_seeds <= EXACT_UP_TO else 1 / (1 + SAMPLED_FLIPS)


def count_least_seeds(num_comparisons: int = 1) -> int:
    """The fewest seeds with which every comparison of a family could be shown: 6 for one, 9 for nine, 11 for 45."""
    return math.ceil(math.log2(2 * max(1, num_comparisons) / ALPHA) - 1e-9)


def compute_superiority(differences: Floats) -> float:
    """The share of the shared seeds on which a's value is larger, ties counted half: paired, not over all pairs."""
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def compute_power(effect: float, num_seeds: int, alpha: float) -> float:
    """Power of the two-sided paired t-test at an effect of so many SDs of the differences.

    The noncentral t, integrated over the observed SD: SciPy's is NaN where the power nears 1.
    """
    df, shift = num_seeds - 1, abs(effect) * math.sqrt(num_seeds)
    spreads, weights = _list_spreads(df)
    critical = float(special.stdtrit(df, 1 - alpha / 2)) * spreads
    return float(weights @ (special.ndtr(shift - critical) + special.ndtr(-shift - critical)))


@functools.lru_cache(4096)
def _list_spreads(df: int) -> tuple[Floats, Floats]:
    """Quantiles of the observed SD, of one that is 1, at Gauss-Legendre nodes of their probability; and the weights."""
    nodes, weights = _list_nodes()
    return np.sqrt(special.chdtri(df, (1 - nodes) / 2) / df), weights / 2


def estimate_seeds(difference: float, sd: float, num_comparisons: int = 1) -> int | None:
    """Seeds for 80 % power if difference and SD are as observed, at 0.05 over the family; None: over 1,000.

    An estimate: the observed effect of few seeds is itself uncertain, and of a chosen arm too large.
    """
    least, alpha = max(2, count_least_seeds(num_comparisons)), ALPHA / max(1, num_comparisons)
    if sd == 0 or math.isnan(sd):
        return least if sd == 0 and difference else None
    effect, most = difference / sd, MOST_SEEDS
    if compute_power(effect, most, alpha) < POWER:
        return None
    while least < most:
        middle = (least + most) // 2
        least, most = (middle + 1, most) if compute_power(effect, middle, alpha) < POWER else (least, middle)
    return least


@functools.cache
def _list_nodes() -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights: to find them takes longer than all else of a comparison."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return nodes, weights


@functools.cache
def _find_effect(num_seeds: int, num_comparisons: int) -> float:
    """The effect, in SDs of the differences, at which so many seeds have 80 % power."""
    alpha = ALPHA / max(1, num_comparisons)
    return float(optimize.brentq(lambda effect: compute_power(effect, num_seeds, alpha) - POWER, 0.0, 100.0, xtol=1e-8))


def compute_detectable(sd: float, num_seeds: int, num_comparisons: int = 1) -> float:
    """The difference that so many seeds would show with 80 % power at such an SD; NaN where they can show none."""
    if num_seeds < count_least_seeds(num_comparisons) or math.isnan(sd):
        return math.nan
    return _find_effect(num_seeds, num_comparisons) * sd


def compare_arms(
    scores: Mapping[str, Scores],
    pairs: Sequence[tuple[str, str]],
    *,
    mode: Literal["max", "min"] = "max",
    draws: Literal["nested", "shared"] = "nested",
    num_comparisons: int | None = None,
) -> list[Comparison]:
    """Each pair of arms compared; Holm over the pairs, or over a family of `num_comparisons` that holds them.

    `draws`: nested in seeds, as those of raylab, or shared between them where they have the same names; nested ones
    that yet go the same way on all seeds are taken as shared. Raises
    JobError where two arms share no seed.
    """
    apart = [f"{a} and {b} share no seed and draw; compare arms that ran on the same seeds"
             for a, b in pairs if not pair_draws(scores[a], scores[b])]  # fmt: skip
    if apart:
        raise JobError(apart)
    paired = [pair_draws(scores[a], scores[b]) for a, b in pairs]
    return compare_paired(list(pairs), paired, mode=mode, draws=draws, num_comparisons=num_comparisons)


def compare_paired(
    names: Sequence[tuple[str, str]],
    paired: Sequence[Scores],
    *,
    mode: Literal["max", "min"] = "max",
    draws: Literal["nested", "shared"] = "nested",
    num_comparisons: int | None = None,
) -> list[Comparison]:
    """As `compare_arms`, of differences by seed and draw that are there already."""
    family = max(len(names), num_comparisons or 0)
    found = [_compare(*pair, rows, family, mode, draws) for pair, rows in zip(names, paired, strict=True)]
    # Both tests must reject: their larger p is that of the claim.
    claims = [row.p if row.p_draws is None else max(row.p, row.p_draws) for row in found]
    adjusted = adjust_holm([*claims, *[math.nan] * (family - len(claims))])[: len(claims)]
    return [_decide(row._replace(p_holm=p), mode) for row, p in zip(found, adjusted, strict=True)]


def _compare(a: str, b: str, rows: Scores, family: int, mode: str, draws: str) -> Comparison:
    seeds = np.array([np.mean(list(values.values())) for values in rows.values()])
    num, mean = len(seeds), float(seeds.mean())
    sd = float(seeds.std(ddof=1)) if num > 1 else math.nan
    p, exact = flip_signs(seeds)
    low, high, interval = compute_bounds(seeds)
    crossed = fit_crossed(rows) if draws == "shared" or vary_together(rows) else None
    mixed = crossed or fit_nested([list(values.values()) for values in rows.values()])
    if crossed is not None and crossed.high - crossed.low > high - low:
        low, high, interval = crossed.low, crossed.high, "t over seeds and draws"
        mean = crossed.mean
    # Where the draws are in doubt, more seeds of the same draws would not decide it.
    of_draws = crossed is not None and crossed.p > ALPHA >= p
    return Comparison(
        a=a, b=b, num_seeds=num, num_draws=max(len(values) for values in rows.values()), difference=mean, low=low,
        high=high, interval=interval, sd=sd, p=p if num > 1 else math.nan,
        p_draws=crossed.p if crossed is not None else None, p_holm=math.nan, num_comparisons=family,
        test="sign-flip, exact" if exact else "sign-flip, sampled",
        superiority=compute_superiority(seeds if mode == "max" else -seeds), mixed=mixed, better=None,
        smallest_p=find_smallest_p(num), seeds_at_least=count_least_seeds(family),
        seeds_needed=None if of_draws else estimate_seeds(mean, sd, family),
        detectable=math.nan if of_draws else compute_detectable(sd, num, family),
    )  # fmt: skip


def _decide(row: Comparison, mode: str) -> Comparison:
    """With the better arm named, if it is shown."""
    if not row.p_holm <= ALPHA or not (row.low > 0 or row.high < 0):
        return row
    return row._replace(better="a" if (row.difference > 0) == (mode == "max") else "b")
