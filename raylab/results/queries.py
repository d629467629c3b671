"""Reading the result tables: SQL over all jobs, states, and arms ranked. Without torch, Ray or scikit-learn."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raylab.base.mistakes import DamagedError, JobError
from raylab.results.packs import choose_rows, list_folders, list_loose
from raylab.results.summary import COLUMNS, read_summary
from raylab.store.disk import read_disk
from raylab.store.driver import is_driven
from raylab.store.storage import is_empty, name_results

# `status` needs neither Arrow nor DuckDB: they are imported where rows are read.
if TYPE_CHECKING:
    from collections.abc import Collection

    import duckdb
    import pyarrow as pa


# What `hold_tables` has read: (results, job, table, trials or None) -> its rows; None where nothing is held.
_held: ContextVar["dict[Any, pa.Table] | None"] = ContextVar("held", default=None)


@contextlib.contextmanager
def hold_tables() -> Iterator[None]:
    """Within it `open_tables` of a job reads each table once: all that is asked is told of the rows of that moment."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def open_tables(
    results: Path, sql: str | None = None, job: str = "*", trials: "Collection[str] | None" = None
) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection with one view a table over all jobs, that can reach no file, nor write any.

    The rows are those of one moment. With `sql`, only the tables that it names are read; with `job` only its files,
    with `trials` only theirs. Columns are joined by name, so rows of older versions stay readable. Raises JobError
    without a results folder, or where a file is damaged.
    """
    _check_folder(results)
    import duckdb

    from raylab.results.tables import SCHEMAS

    connection = duckdb.connect()
    for table in SCHEMAS:
        if sql is None or table in sql.lower():
            connection.register(table, _read(results, table, None if job == "*" else job, trials))
    return _close_in(connection)


def open_views(results: Path, sql: str | None = None, *, every: bool = False) -> "duckdb.DuckDBPyConnection":
    """As `open_tables`, with the ready views too.

    With `sql`, only the tables and views that it names, and of them the columns it needs, or `every` one. Raises
    JobError, and duckdb.Error for SQL that is none.
    """
    _check_folder(results)
    import duckdb

    from raylab.results.tables import SCHEMAS
    from raylab.results.views import VIEWS, add_views, label_arms, list_needs, list_views, need_labels

    connection = duckdb.connect()
    needs = dict.fromkeys(SCHEMAS) if sql is None else list_needs(connection, sql)
    for table in SCHEMAS:
        if table in needs:
            words = None if every else needs[table]
            # One column at least, or the rows could not be counted.
            columns = None if words is None else [n for n in SCHEMAS[table].names if n == "job" or n.lower() in words]
            connection.register(table, _read(results, table, columns=columns))
    views = list(VIEWS) if sql is None else list_views(sql)
    try:
        add_views(connection, label_arms(results) if need_labels(views) else None, views)
    except DamagedError as error:
        raise JobError([str(error)]) from None
    return _close_in(connection)


def _close_in(connection: "duckdb.DuckDBPyConnection") -> "duckdb.DuckDBPyConnection":
    connection.execute("set enable_external_access=false")
    connection.execute("set lock_configuration=true")
    return connection


def _read(
    results: Path,
    table: str,
    job: str | None = None,
    trials: "Collection[str] | None" = None,
    columns: "Collection[str] | None" = None,
) -> "pa.Table":
    """A table's rows. Raises JobError at a file that is damaged: an answer without it would be another one."""
    from raylab.results.snapshot import read_table

    held = _held.get()
    try:
        if held is None or job is None or columns is not None:
            return read_table(results, table, job, trials, columns)
        whole, chosen = ((results, job, table, some) for some in (None, None if trials is None else frozenset(trials)))
        if whole not in held:
            held[whole] = read_table(results, table, job)
        if chosen not in held:
            held[chosen] = _choose(held[whole], trials or ())
        return held[chosen]
    except DamagedError as error:
        raise JobError([str(error)]) from None


def _choose(rows: "pa.Table", trials: "Collection[str]") -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    return rows.filter(pc.is_in(rows["trial_id"], value_set=pa.array(list(trials), pa.string())))


def query(results: Path, sql: str) -> "pa.Table":
    """The answer to a query, in which settings need no quotes. Raises JobError where it is wrong, in one line."""
    import duckdb

    from raylab.results.statement import quote_settings
    from raylab.results.tables import SETTING_COLUMNS

    sql = quote_settings(sql, [*SETTING_COLUMNS, "search.targets"])
    try:
        try:
            answer = open_views(results, sql).sql(sql)
        except duckdb.BinderException:  # what it names is no column, or one that only files of other versions have
            answer = open_views(results, sql, every=True).sql(sql)
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise JobError([f"query: {first}; 'raylab query --list' shows the tables and their columns"]) from None
    if answer is None:
        raise JobError(["query: it asks for no rows; begin it with select or from"])
    try:
        return answer.to_arrow_table()
    except duckdb.Error as error:
        # An error in the rows themselves: its message could quote a cell.
        raise JobError([f"query: {type(error).__name__} while reading the rows; check casts and arithmetic"]) from None


def list_jobs(results: Path) -> list[str]:
    """The jobs with a kept job file."""
    return sorted(path.parent.name for path in results.glob("*/job.yaml") if not path.parent.name.startswith("_"))


def find_job(results: Path, name: str) -> Path:
    """The kept job file of a job. Raises JobError naming the jobs there are."""
    path = results / name / "job.yaml"
    if not path.is_file():
        known = ", ".join(list_jobs(results)) or "none"
        where = name_results(results)
        raise JobError([f"no job '{name}' under {where}; jobs there: {known} (--results DIR names another folder)"])
    return path


def summarise_jobs(results: Path, name: str | None = None) -> list[dict[str, Any]]:
    """A row a job: trials by state, arms, their seconds, last failure and last change.

    Without DuckDB, and from the files' summaries where they have one: people look at it often.
    """
    _check_folder(results)
    if name is not None:
        find_job(results, name)
    names = {*list_jobs(results), *list_folders(results, "trials")} if name is None else {name}
    found = {job: _read_summaries(results, job) for job in sorted(names)}
    kept = set(list_jobs(results))
    return [_summarise(results, job, rows) for job, rows in found.items() if rows or job in kept]


def _read_summaries(results: Path, job: str) -> list[dict[str, Any]]:
    """The summaries of a job's trials; what is damaged is told as a trial's last error."""
    found = {}
    for path in list_loose(results, job, "trials"):
        with contextlib.suppress(FileNotFoundError):  # packed meanwhile
            found[path.stem] = _read_summary(path)
    rows = list(found.values())
    try:
        for pack, names in choose_rows(results, job, "trials", found):
            rows += [pack.summaries[name] for name in names]
    except DamagedError as error:
        rows.append(_describe_damage(error))
    return rows


def _read_summary(path: Path) -> dict[str, Any]:
    found = read_summary(path)
    if found is not None:
        return found
    from raylab.results.tables import summarise_trial

    try:
        return summarise_trial(path)
    except DamagedError as error:
        return _describe_damage(error)


def _describe_damage(error: DamagedError) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"arm": error.path.stem, "error": str(error), "updated_at": 2**62}


STATES = ("complete", "running", "stopped", "failed", "infeasible")


def _summarise(results: Path, job: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    trials = [row for row in rows if not row["arm"].startswith("baseline:")]
    failures = [row for row in trials if row["error"] is not None]
    last = max((row["updated_at"] for row in trials if row["status"]), default=None)
    disk = read_disk(results, job)
    return {
        "job": job,
        "driver": is_driven(results, job),
        **{state: sum(row["status"] == state for row in trials) for state in STATES},
        "arms": len({row["arm"] for row in trials}),
        "trial_seconds": round(sum(row["wall_seconds"] or 0.0 for row in trials), 1),
        "last_error": max(failures, key=lambda row: row["updated_at"])["error"] if failures else None,
        "disk_bytes": disk["tables_bytes"] + disk["stages_bytes"] if disk else None,
        "updated_at": None if last is None else datetime.fromtimestamp(last / 1e6, UTC),
    }


def _check_folder(results: Path) -> None:
    if is_empty(results):
        raise JobError([f"--results {name_results(results)}: no such folder; give the one that 'raylab run' wrote to"])


def list_ranked(results: Path, job: str) -> list[dict[str, Any]]:
    """The summaries of a job's trials that count in a ranking: complete, of a fixed design or a confirmation."""
    from raylab.results.tables import list_summaries

    return [
        row
        for row in list_summaries(results, job)
        if row["status"] == "complete" and row["phase"] in ("fixed", "confirm")
    ]


class SeedValue(NamedTuple):
    """A trial's value of a cell, mean over draws."""

    arm: str
    seed: int
    value: float


def match_cell(cell: "Collection[str]") -> str:
    """SQL that a row `s` of a trial `t` is of a cell, whose values follow in its order.

    Baselines have no depth and no probe, so for them those parts of the cell are left out.
    """
    return " and ".join(
        f"(t.arm like 'baseline:%' or s.{key} is not distinct from ?)"
        if key in ("frozen_layers", "probe")
        else f"s.{key} is not distinct from ?"
        for key in cell
    )


def read_cell(results: Path, job: str, table: str, cell: dict[str, Any], split: str = "validation") -> list[SeedValue]:
    """The values of a cell of `scores` or `geometry` by arm and seed: last rung, ranked phases, mean over draws.

    Only trials that ran to the end count; of an adaptive search only confirmed ones.
    """
    ranked = [row["trial_id"] for row in list_ranked(results, job)]
    connection = open_tables(results, f"trials {table}", job, ranked)
    rows = connection.execute(
        f"""
        select t.arm, t.seed, avg(s.value) as value
        from {table} s join trials t using (job, trial_id)
        where job = ? and s.split = ? and s.rung = t.num_rungs and {match_cell(cell)}
        group by t.arm, t.seed order by t.arm, t.seed
        """,
        [job, split, *cell.values()],
    ).fetchall()
    return [SeedValue(*row) for row in rows if row[2] is not None]


def read_heldout(results: Path, job: str) -> dict[tuple[str, int], dict[str, tuple[float, float]]]:
    """(arm, seed) -> held-out measure -> its value at the start and at the end of pre-training; of ranked trials."""
    ranked = [row["trial_id"] for row in list_ranked(results, job)]
    rows = (
        open_tables(results, "trials curves", job, ranked)
        .execute(
            """
            select t.arm, t.seed, c.metric, arg_min(c.value, c.step), arg_max(c.value, c.step)
            from curves c join trials t using (job, trial_id)
            where job = ? and c.metric like 'heldout%'
            group by t.arm, t.seed, c.metric
            """,
            [job],
        )
        .fetchall()
    )
    found: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for arm, seed, metric, first, last in rows:
        found.setdefault((arm, seed), {})[metric] = (first, last)
    return found
