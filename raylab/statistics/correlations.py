"""Geometry against scores over arms: where a space's measure goes with the score, and where that breaks down."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from raylab.base.mistakes import JobError
from raylab.job.specs import Job
from raylab.measures.definitions import BINS, DEFINITIONS
from raylab.results.queries import list_ranked, open_tables
from raylab.statistics.analysis import Arms, default_target, list_arms

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
# Under so many arms an interval over them means nothing.
FEWEST_ARMS = 6
ALL, WITHIN, BETWEEN = "all arms", "within objectives", "between objectives"


class Correlation(NamedTuple):
    """Spearman's rho over arms, its 95 % interval by bootstrap over arms (NaN for under 6), and what it shows."""

    scope: str
    num_arms: int
    rho: float
    low: float
    high: float
    verdict: str


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rho of x[N] and y[N], ties at mean ranks; NaN where one is constant, or for under two."""
    if len(x) < 2:
        return math.nan
    a, b = (_rank(np.asarray(values, dtype=np.float64).tobytes()) for values in (x, y))
    scale = math.sqrt((a * a).sum() * (b * b).sum())
    return min(1.0, max(-1.0, float((a * b).sum()) / scale)) if scale > 0 else math.nan


@functools.lru_cache(4)
def _draw_resamples(num: int) -> npt.NDArray[np.int64]:
    """The resamples of so many arms, of a fixed seed: rows of arms [R, N]."""
    return np.random.default_rng(0).integers(0, num, (RESAMPLES, num))


# Kept, as in a job each score is resampled for every metric: of 50 arms these are 50 MB.
@functools.lru_cache(256)
def _rank_resamples(values: bytes) -> npt.NDArray[np.float32]:
    """Ranks [R, N] of float64 values [N] in each resample, less their mean and of length 1; NaN where all are equal.

    Each value's rank follows from how often it and smaller ones were drawn: nothing is sorted again.
    """
    distinct, codes = np.unique(np.frombuffer(values), return_inverse=True)
    drawn = codes[_draw_resamples(len(codes))]
    places = drawn + len(distinct) * np.arange(len(drawn))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(drawn) * len(distinct)).reshape(len(drawn), -1)
    ranks = (counts.cumsum(axis=1) - (counts - 1) / 2).ravel()[places]
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks * ranks).sum(1, keepdims=True))
    return np.where(length > 0, ranks / np.where(length > 0, length, 1.0), np.nan).astype(np.float32)


@functools.lru_cache(256)
def _rank(values: bytes) -> Floats:
    """Ranks [N] of float64 values [N], less their mean."""
    ranks = stats.rankdata(np.frombuffer(values))
    found: Floats = ranks - ranks.mean()
    return found


def correlate_arms(x: Floats, y: Floats, scope: str = ALL) -> Correlation:
    """Spearman's rho of x[N] and y[N], with a percentile interval over 1,000 resamples of the arms, of a fixed seed."""
    num, rho = len(x), spearman(x, y)
    if num < FEWEST_ARMS:
        return Correlation(
            scope, num, rho, math.nan, math.nan, f"too few arms: {FEWEST_ARMS} are needed for an interval"
        )
    if math.isnan(rho):
        return Correlation(scope, num, rho, math.nan, math.nan, "does not vary over the arms")
    a, b = (_rank_resamples(np.asarray(values, dtype=np.float64).tobytes()) for values in (x, y))
    resampled = np.einsum("rn,rn->r", a, b)
    low, high = (float(end) for end in np.percentile(resampled[~np.isnan(resampled)], [2.5, 97.5]))
    verdict = "covers 0" if low <= 0 <= high else "rises with the score" if rho > 0 else "falls with the score"
    return Correlation(scope, num, rho, low, high, verdict)


def correlate_scopes(x: Sequence[float], y: Sequence[float], objectives: Sequence[str]) -> list[Correlation]:
    """Over all arms; and with several objectives within them (each arm less its objective's mean), within each, and
    between their means. The first one's verdict says where it breaks down."""
    a, b, groups = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), np.asarray(objectives)
    whole = correlate_arms(a, b)
    names = sorted(set(objectives))
    if len(names) < 2:
        return [whole]
    members = [groups == name for name in names]
    means = [np.array([values[chosen].mean() for chosen in members]) for values in (a, b)]
    of = np.searchsorted(names, groups)
    # An objective of one arm is its own mean: it says nothing of what is within.
    several = np.isin(groups, [name for name, chosen in zip(names, members, strict=True) if chosen.sum() > 1])
    inner = correlate_arms((a - means[0][of])[several], (b - means[1][of])[several], WITHIN)
    single = [
        correlate_arms(a[chosen], b[chosen], f"objective={name}") for name, chosen in zip(names, members, strict=True)
    ]
    return [
        whole._replace(verdict="; ".join([whole.verdict, *_find_breaks(whole, inner, single)])),
        inner, *single, correlate_arms(means[0], means[1], BETWEEN),
    ]  # fmt: skip


def _is_shown(row: Correlation) -> bool:
    return row.low > 0 or row.high < 0


def _find_breaks(whole: Correlation, inner: Correlation, single: Sequence[Correlation]) -> list[str]:
    """Where what holds over all arms does not hold."""
    found = []
    if _is_shown(inner) and inner.rho * whole.rho < 0:
        found.append("breaks down: the sign flips within objectives")
    elif _is_shown(whole) and not math.isnan(inner.low) and not _is_shown(inner):
        found.append("breaks down: not shown within objectives")
    elif _is_shown(whole) and math.isnan(inner.low):
        found.append("too few arms to tell within objectives")
    flipped = [row.scope for row in single if _is_shown(row) and row.rho * whole.rho < 0]
    signs = {row.rho > 0 for row in single if _is_shown(row)}
    if flipped or len(signs) == 2:
        found.append(f"the sign flips in {', '.join(flipped)}" if flipped else "the sign differs between objectives")
    return found


def correlate_job(results: Path, job: Job, metric: str | None = None, arms: Arms | None = None) -> list[dict[str, Any]]:
    """A row for each geometry metric, score of the same task, and scope: mean over seeds and draws, ranked arms.

    Scores are those of `metric` (by default the one in which arms are compared) at every number of shots, freeze depth
    and probe. `arms` is what `list_arms` gives, where it is known already. Raises JobError where there are none.
    """
    metric = metric or default_target(job).metric
    arms = arms or list_arms(results, job)
    ranked = [row["trial_id"] for row in list_ranked(results, job.name)]
    connection = open_tables(results, "trials geometry scores", job.name, ranked)
    condition = "job = ? and s.split = 'validation' and s.rung = t.num_rungs and s.value is not null"
    geometry = _gather(connection.execute(
        f"""select t.arm, avg(s.value), s.task, s.metric, s.parameter
            from geometry s join trials t using (job, trial_id)
            where {condition} and not isnan(s.value)
            group by all order by s.task, s.metric, s.parameter, t.arm""", [job.name],
    ).fetchall(), arms.rows)  # fmt: skip
    scores = _gather(connection.execute(
        f"""select t.arm, avg(s.value), s.task, s.shots, s.frozen_layers, s.probe, s.class
            from scores s join trials t using (job, trial_id)
            where {condition} and not isnan(s.value) and s.metric = ?
            group by all order by s.task, s.class, s.shots, s.frozen_layers, s.probe, t.arm""", [job.name, metric],
    ).fetchall(), arms.rows)  # fmt: skip
    geometry = {key: values for key, values in geometry.items() if DEFINITIONS.get(key[1]) is None
                or DEFINITIONS[key[1]].parameter != BINS}  # fmt: skip
    rows = []
    for (task, name, parameter), of in geometry.items():
        for (score_task, shots, depth, probe, label), reached in scores.items():
            both = [arm for arm in of if arm in reached]
            if task != score_task or len(both) < 2:
                continue
            objectives = [arms.rows[arm]["pretrain.objective"] for arm in both]
            for found in correlate_scopes([of[arm] for arm in both], [reached[arm] for arm in both], objectives):
                rows.append(
                    {"task": task, "metric": name, "parameter": parameter, "score": metric, "class": label,
                     "shots": shots, "frozen_layers": depth, "probe": probe} | found._asdict()
                )  # fmt: skip
    if not rows:
        raise JobError(
            [f"correlate: {job.name} has under two ranked arms with geometry and {metric}; run it to the end"]
        )
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]


def _gather(rows: Sequence[tuple[Any, ...]], arms: Mapping[str, Any]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Key -> arm -> value, of rows of an arm, a value and a key."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for arm, value, *key in rows:
        if arm in arms:
            found.setdefault(tuple(key), {})[arm] = value
    return found
