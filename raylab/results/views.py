"""Ready views for queries: arms with intervals, the best of them, their effects, and what they cost."""

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from raylab.base.mistakes import JobError
from raylab.job.jobs import load_job
from raylab.job.settings import label_values, list_settings
from raylab.measures.definitions import DEFINITIONS
from raylab.results.snapshot import read_table
from raylab.results.statement import list_columns
from raylab.results.tables import SCHEMAS, plain_value

CONFIDENCE = 0.95
# Quantiles for more seeds come from a series that is right to seven digits there.
MOST_SEEDS = 100


class View(NamedTuple):
    """A view: what a row of it is, the tables and views that it is made from, and its SQL."""

    text: str
    needs: tuple[str, ...]
    sql: str


_CELL = ("task", "split", "shots", "frozen_layers", "probe", "metric", "class", "parameter")
CELL = ", ".join(_CELL)
# Baselines have no depth and no probe: they are set beside the base arm at each of its own.
_SAME = " and ".join(f"b.{n} is not distinct from v.{n}" for n in _CELL if n not in ("frozen_layers", "probe"))
_SAME_PROBE = "b.frozen_layers is not distinct from v.frozen_layers and b.probe is not distinct from v.probe"
_INTERVAL = """avg(value) as mean,
    avg(value) - t_quantile(count(*)) * stddev_samp(value) / sqrt(count(*)) as low,
    avg(value) + t_quantile(count(*)) * stddev_samp(value) / sqrt(count(*)) as high,
    count(*) as seeds"""
# As `ranking` has it: of an adaptive search only what was confirmed.
_RANKED = "t.status = 'complete' and t.phase in ('fixed', 'confirm')"


def _quote(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


_LOWER = _quote(["calibration_error", *(n for n, d in DEFINITIONS.items() if d.direction == "min")])
_NEITHER = _quote([n for n, d in DEFINITIONS.items() if d.direction == "none"])

VIEWS: dict[str, View] = {
    "seeds": View(
        "an arm, a seed and a cell: its value, mean over draws; last rung, only trials that are ranked",
        ("trials", "scores", "geometry"),
        f"""
        select s.job, t.arm, t.seed, s.task, s.split, s.shots, s.frozen_layers, s.probe, s.metric, s.class,
            null::double as parameter, avg(s.value) as value, count(s.value) as draws
        from scores s join trials t using (job, trial_id)
        where {_RANKED} and s.rung = t.num_rungs
        group by all having count(s.value) > 0
        union all
        select g.job, t.arm, t.seed, g.task, g.split, null, null, null, g.metric, null, g.parameter, g.value, 1
        from geometry g join trials t using (job, trial_id)
        where {_RANKED} and g.rung = t.num_rungs and g.value is not null
        """,
    ),
    "arms": View(
        "an arm in a cell: mean over seeds, 95 % t interval, number of seeds; label: what sets the arm apart",
        ("seeds", "labels"),
        f"""
        select v.job, v.arm, l.label, {CELL}, {_INTERVAL}
        from seeds v left join labels l on l.job = v.job and l.arm = v.arm group by all
        """,
    ),
    "best": View(
        "the arm of a job with the best mean in a cell; no baselines, no metrics that have no better side",
        ("arms",),
        f"""
        select job, arm, label, {CELL}, mean, low, high, seeds from arms
        where arm not like 'baseline:%' and metric not in ({_NEITHER})
        qualify row_number() over (
            partition by job, {CELL} order by case when metric in ({_LOWER}) then mean else -mean end, arm
        ) = 1
        """,
    ),
    "effects": View(
        "an arm's difference to the job's base arm in a cell, paired by seed: mean, 95 % t interval, shared seeds",
        ("seeds", "labels"),
        f"""
        select d.job, d.arm, d.label, {CELL}, {_INTERVAL} from (
            select v.job, v.arm, l.label, v.seed, {", ".join(f"b.{name}" for name in _CELL)},
                v.value - b.value as value
            from seeds v
            join labels o on o.job = v.job and o.base and o.arm <> v.arm
            join seeds b on b.job = v.job and b.arm = o.arm and b.seed = v.seed and {_SAME}
                and (v.arm like 'baseline:%' or {_SAME_PROBE})
            left join labels l on l.job = v.job and l.arm = v.arm
        ) d group by all
        """,
    ),
    "cost": View(
        "an arm: trials, wall and GPU seconds, tokens, FLOPs, stages used, reused, and the seconds that saved",
        ("trials", "stages", "labels"),
        """
        select t.job, t.arm, any_value(l.label) as label, count(*) as trials,
            sum(t.wall_seconds) as wall_seconds, sum(t.gpu_seconds) as gpu_seconds,
            sum(t.num_tokens)::bigint as num_tokens, sum(t.flops) as flops,
            coalesce(sum(u.stages), 0)::bigint as stages, coalesce(sum(u.reused), 0)::bigint as reused,
            coalesce(sum(u.saved_seconds), 0) as saved_seconds
        from trials t
        left join (
            select job, trial_id, count(*) as stages, count(*) filter (where reused) as reused,
                sum(saved_seconds) as saved_seconds
            from stages group by job, trial_id
        ) u on u.job = t.job and u.trial_id = t.trial_id
        left join labels l on l.job = t.job and l.arm = t.arm
        group by t.job, t.arm
        """,
    ),
}
# What a row of each table is.
TEXTS = {
    "trials": "a trial or baseline: arm, seed, phase, status, every setting, cost",
    "scores": "a score of a trial by task, split, shots, freeze depth, probe, draw and class",
    "confusions": "rows of a class that were predicted as another, in the cells of scores",
    "geometry": "an embedding metric at a parameter",
    "curves": "a point of a training curve",
    "stages": "a stage that a trial used",
    "hygiene": "a check of the corpus",
    "unseals": "an access to the test split",
}
# As Arrow calls them, which is how the tables' columns are told.
_TYPES = {"VARCHAR": "string", "BIGINT": "int64", "INTEGER": "int32", "DOUBLE": "double"}
LABELS = pa.schema({"job": pa.string(), "arm": pa.string(), "label": pa.string(), "base": pa.bool_()})


def is_named(name: str, sql: str) -> bool:
    """Whether a query may name a table or view."""
    return re.search(rf"\b{name}\b", sql, re.IGNORECASE) is not None


def list_needs(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, set[str] | None]:
    """The tables that a query needs, also by views -> the names that may be columns of it; None: all columns."""
    named = [name for name in SCHEMAS if is_named(name, sql)]
    words = list_columns(connection, sql) if named else set()
    needs: dict[str, set[str] | None] = dict.fromkeys(named, words)
    for view in list_views(sql):
        for name in VIEWS[view].needs:
            if name in SCHEMAS and (known := needs.get(name, set())) is not None:
                needs[name] = known | (list_columns(connection, VIEWS[view].sql) or set())
    return needs


def need_labels(names: list[str]) -> bool:
    """Whether some of the views show what sets arms apart."""
    return any("labels" in VIEWS[name].needs for name in names)


def list_views(sql: str) -> list[str]:
    """The views that a query names and those that they are made from, in an order in which they can be made."""
    wanted = {name for name in VIEWS if is_named(name, sql)}
    for name in reversed(VIEWS):
        if name in wanted:
            wanted |= {need for need in VIEWS[name].needs if need in VIEWS}
    return [name for name in VIEWS if name in wanted]


def add_views(connection: duckdb.DuckDBPyConnection, labels: pa.Table | None, names: list[str]) -> None:
    """Makes views in a connection that has the tables they need; `labels` where `need_labels` says so."""
    if not names:
        return
    listed = ", ".join(repr(quantile) for quantile in list_quantiles())
    more = " + ".join(f"{factor!r} / (n - 1) ** {power}" for power, factor in enumerate(_SERIES))
    connection.execute(
        f"create macro t_quantile(n) as case when n < 2 then null else coalesce([{listed}][n - 1], {more}) end"
    )
    if labels is not None:
        connection.register("labels", labels)
    for name in names:
        connection.execute(f"create view {name} as {VIEWS[name].sql}")


def describe_tables() -> list[dict[str, Any]]:
    """Every column of the tables and views; `about` says at the first of each what a row is."""
    found = [(table, field.name, str(field.type)) for table, schema in SCHEMAS.items() for field in schema]
    connection = duckdb.connect()
    for table, schema in SCHEMAS.items():
        connection.register(table, pa.Table.from_batches([], schema=schema))
    add_views(connection, pa.Table.from_batches([], schema=LABELS), list(VIEWS))
    for view in VIEWS:
        described = connection.execute(f"describe {view}").fetchall()
        found += [(view, str(name), _TYPES[kind]) for name, kind, *_ in described]
    texts = TEXTS | {name: view.text for name, view in VIEWS.items()}
    return [
        {"table": name, "column": column, "type": kind, "about": texts.pop(name, None)} for name, column, kind in found
    ]


def label_arms(results: Path) -> pa.Table:
    """What sets each arm of each job apart, by the settings that its kept job file searches; and which is the base.

    Where the data changed, arms of equal settings differ: the one that was started last is the base. Raises
    DamagedError.
    """
    columns = ("job", "arm", "trial_id", "started_at")
    rows = read_table(results, "trials", columns=columns)
    rows = rows.set_column(3, "started_at", rows["started_at"].cast(pa.int64()))  # Arrow loads pandas to make times
    latest: dict[str, dict[str, tuple[int, str]]] = {}
    for job, arm, trial_id, started in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        arms = latest.setdefault(job, {})
        arms[arm] = max(arms.get(arm, (-1, "")), (started or 0, trial_id))
    found = [row for job, arms in sorted(latest.items()) for row in _label_job(results, job, arms)]
    return pa.Table.from_arrays(
        [pa.array([row[field.name] for row in found], field.type) for field in LABELS], schema=LABELS
    )


def _label_job(results: Path, name: str, arms: dict[str, tuple[int, str]]) -> list[dict[str, Any]]:
    """The rows of LABELS of a job's arms, each with the start and the id of its last trial."""
    try:
        job = load_job(results / name / "job.yaml")
    except (JobError, OSError):  # of another version, or without one: nothing is known of its space
        return [{"job": name, "arm": arm, "label": None, "base": False} for arm in arms]
    own = {arm: trial for arm, trial in arms.items() if not arm.startswith("baseline:")}
    searched, settings = list(job.search.space), list_settings(job)
    ids = [trial_id for _, trial_id in own.values()]
    rows = read_table(results, "trials", name, ids, ["arm", *searched]).to_pylist()
    base = {name: plain_value(settings[name]) for name in searched}
    alike = [row["arm"] for row in rows if all(row[name] == value for name, value in base.items())]
    first = max(alike, key=lambda arm: own[arm], default=None)
    labels = {row["arm"]: label_values({name: row[name] for name in searched}) for row in rows}
    return [{"job": name, "arm": arm, "label": labels.get(arm) or arm, "base": arm == first} for arm in arms]


# z and what follows it in powers of 1 / degrees of freedom (Abramowitz and Stegun 26.7.5), for 95 %.
_Z = 1.959963984540054
_SERIES = (
    _Z,
    (_Z**3 + _Z) / 4,
    (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
    (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
)


@functools.cache
def list_quantiles() -> tuple[float, ...]:
    """The 97.5 % quantile of Student's t for 1 to MOST_SEEDS - 1 degrees of freedom, without SciPy, which loads slowly.

    By bisection of the closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    return tuple(_find_quantile(degrees) for degrees in range(1, MOST_SEEDS))


def _find_quantile(degrees: int) -> float:
    low, high = 1.9, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _share_within(t: float, degrees: int) -> float:
    """The probability that |T| < t."""
    theta = math.atan(t / math.sqrt(degrees))
    square, odd = math.cos(theta) ** 2, degrees % 2
    term = total = math.cos(theta) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    if not odd:
        return math.sin(theta) * total
    return 2 / math.pi * (theta + (math.sin(theta) * total if degrees > 1 else 0.0))
