"""Results: SQL over all jobs that reads nothing else and harms nothing, states, and the cells that are ranked."""

import json
import multiprocessing
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from raylab.base.mistakes import JobError
from raylab.results.queries import (
    SeedValue,
    find_job,
    hold_tables,
    list_jobs,
    open_tables,
    query,
    read_cell,
    read_heldout,
    summarise_jobs,
)
from raylab.results.tables import SCHEMAS, write_rows

SECRET = "SECRETPATIENT"
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CELL = {"task": "kind", "metric": "f1_macro", "shots": 8, "frozen_layers": "all", "probe": "logistic"}
HEAVY = ("torch", "ray", "sklearn", "optuna")


def write_trial(results: Path, trial_id: str, job: str = "study", **columns: Any) -> None:
    arm, _, seed = trial_id.rpartition("-")
    row = {
        "arm": arm, "seed": int(seed), "phase": "fixed", "status": "complete", "rung": 2, "num_rungs": 2,
        "wall_seconds": 1.5, "started_at": START, "updated_at": START,
    }  # fmt: skip
    write_rows(results, job, "trials", trial_id, [row | columns])


def write_scores(results: Path, trial_id: str, values: list[float], job: str = "study", **columns: Any) -> None:
    """A score for each draw."""
    cell = CELL | {"rung": 2, "split": "validation"} | columns
    rows = [cell | {"draw": draw, "value": value} for draw, value in enumerate(values)]
    write_rows(results, job, "scores", trial_id, rows)


def keep_job(results: Path, name: str) -> None:
    (results / name).mkdir(parents=True, exist_ok=True)
    (results / name / "job.yaml").write_text(f"name: {name}\n")


def test_tables_are_there_before_any_row(tmp_path: Path) -> None:
    for name, schema in SCHEMAS.items():
        found = query(tmp_path, f"from {name}")
        assert found.column_names == schema.names
        assert found.num_rows == 0
    (tmp_path / "study" / "trials").mkdir(parents=True)
    assert query(tmp_path, "from trials").num_rows == 0


def test_a_view_holds_all_jobs_with_declared_types(tmp_path: Path) -> None:
    for job in ("one", "two"):
        write_trial(tmp_path, "a-0", job=job)
        write_trial(tmp_path, "b-1", job=job)
    write_trial(tmp_path, "z-0", job="_stages")  # a folder of raylab's own, not a job
    found = query(tmp_path, "select job, trial_id, seed, wall_seconds, updated_at from trials order by all")
    rows = found.to_pylist()
    assert [(row["job"], row["trial_id"]) for row in rows] == [
        ("one", "a-0"), ("one", "b-1"), ("two", "a-0"), ("two", "b-1"),
    ]  # fmt: skip
    assert {row["updated_at"] for row in rows} == {START}
    types = {row["column_name"]: row["column_type"] for row in query(tmp_path, "describe trials").to_pylist()}
    assert types["seed"] == "BIGINT"
    assert types["corpus.split.vary"] == "BOOLEAN"
    assert types["pretrain.learning_rate"] == "DOUBLE"
    assert types["evaluate.shots"] == "VARCHAR"


def test_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such folder; give the one that 'raylab run' wrote to"):
        query(tmp_path / "nothing", "select 1")


@pytest.mark.parametrize(
    "name", ["o'clock", 'say "so"', "two words", "a,b", "{a,b}", "é", "seed=3", "br[1]", "st*r?", "back\\slash"]
)
@pytest.mark.parametrize("relative", [False, True])
def test_folders_of_odd_names_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, relative: bool) -> None:
    results = tmp_path / name
    write_trial(results, "a-0")
    monkeypatch.chdir(tmp_path)
    results = Path(name) if relative else results
    assert query(results, "select trial_id, seed from trials").to_pylist() == [{"trial_id": "a-0", "seed": 0}]


def test_a_link_to_the_folder_works(tmp_path: Path) -> None:
    write_trial(tmp_path / "real", "a-0")
    (tmp_path / "link").symlink_to("real")
    assert query(tmp_path / "link", "from trials").num_rows == 1


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Results beside a file that no query may read."""
    write_trial(tmp_path / "results", "a-0")
    (tmp_path / "notes.csv").write_text(f"text,label\n{SECRET},1\n{SECRET} two,x\n")
    return tmp_path


@pytest.mark.parametrize(
    "sql",
    [
        "from '{root}/notes.csv'",
        "from read_csv('{root}/notes.csv', columns={{'text': 'int'}})",
        "from read_text('{root}/notes.csv')",
        "from read_blob('{root}/results/../notes.csv')",
        "from glob('{root}/*')",
        "select (select content from read_text('{root}/notes.csv'))::int",
        "from trials where arm in (select text from '{root}/notes.csv')",
        "copy trials to '{root}/out.csv'",
        "copy trials to '{root}/results/out.csv'",
        "copy trials to '{root}/results/study/trials/a-0.parquet'",
        "copy (pivot trials on status using count(*)) to '{root}/results/out.csv'",
        "explain analyze copy trials to '{root}/results/out.csv'",
        "export database '{root}/results/copy'",
        "attach '{root}/out.duckdb'",
        "attach '{root}/results/out.duckdb'",
        "select 1; copy trials to '{root}/results/out.csv'",
        "create table t as from '{root}/notes.csv'",
        "set enable_external_access=true",
        "set allowed_directories=['/']",
        "install httpfs",
        "load httpfs",
        "from parquet_scan('{root}/results/study/trials/a-0.parquet')",
        "from read_json('{root}/notes.csv')",
        "from sniff_csv('{root}/notes.csv')",
        "from parquet_metadata('{root}/results/study/trials/a-0.parquet')",
        "create view v as from '{root}/notes.csv'",
        "from query($$from '{root}/notes.csv'$$)",
        "from query_table('{root}/notes.csv')",
        "with x as (from '{root}/notes.csv') from x",
        "select * from arms where arm in (from '{root}/notes.csv')",
        "select getenv('HOME')",
        "copy (from arms) to '{root}/out.parquet'",
        "copy trials from '{root}/notes.csv'",
        "import database '{root}/results'",
        "pragma enable_external_access=true",
        "set temp_directory='{root}/out'",
        "set home_directory='{root}'",
        "set profiling_output='{root}/out.json'",
        "reset enable_external_access",
        "checkpoint; attach '{root}/out.duckdb' as x",
        "",
        "-- nothing",
    ],
)
def test_a_query_reads_nothing_else_and_writes_nothing(outside: Path, sql: str) -> None:
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    with pytest.raises(JobError) as caught:
        query(outside / "results", sql.format(root=outside))
    (problem,) = caught.value.problems
    assert problem.startswith("query: ")
    assert "\n" not in problem
    assert SECRET not in problem
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_open_tables_itself_has_no_way_out(outside: Path) -> None:
    import duckdb

    for sql in ("from '{root}/notes.csv'", "copy trials to '{root}/out.csv'", "set enable_external_access=true"):
        with open_tables(outside / "results") as tables, pytest.raises(duckdb.Error) as caught:
            tables.execute(sql.format(root=outside)).fetchall()
        assert SECRET not in str(caught.value)
    local = query(outside / "results", "select 1 as x")  # a variable of ours is no table
    assert local.num_rows == 1
    with pytest.raises(JobError, match="local does not exist"):
        query(outside / "results", "from local")


@pytest.mark.parametrize(
    "sql",
    ["from trials", "select 1;", "-- why\nselect 1", "values (1)", "describe trials", "show tables", "summarize trials",
     "with t as (from trials) select * from t", "pivot trials using count(*)", "explain from trials"],
)  # fmt: skip
def test_ways_of_asking(outside: Path, sql: str) -> None:
    assert query(outside / "results", sql).num_columns


def test_a_wrong_query_is_one_line(tmp_path: Path) -> None:
    for sql in ("selct 1", "select nothing from trials", "from trails"):
        with pytest.raises(JobError, match=r"^query: .*'raylab query --list' shows the tables"):
            query(tmp_path, sql)


def test_an_error_in_the_rows_quotes_no_cell(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        query(tmp_path, "select cast(x as int) from (values ('SECRET')) as t(x)")
    assert "ConversionException" in str(caught.value)
    assert "SECRET" not in str(caught.value)


UNSTARTED = {
    "job": "unstarted", "driver": False, "disk_bytes": None,
    "complete": 0, "running": 0, "stopped": 0, "failed": 0, "infeasible": 0, "arms": 0,
    "trial_seconds": 0.0, "last_error": None, "updated_at": None,
}  # fmt: skip


def test_states_are_counted_by_job(tmp_path: Path) -> None:
    for number, status in enumerate(["complete", "complete", "running", "stopped", "failed", "failed", "infeasible"]):
        errors = {"error": f"error {number}"} if status == "failed" else {}
        later = START + timedelta(minutes=10 - number)
        write_trial(tmp_path, f"arm{number % 3}-{number}", status=status, updated_at=later, **errors)
    write_trial(tmp_path, "baseline:majority-0", wall_seconds=100.0)
    write_trial(tmp_path, "a-0", job="it's")
    keep_job(tmp_path, "study")
    keep_job(tmp_path, "it's")
    keep_job(tmp_path, "unstarted")
    rows = {row["job"]: row for row in summarise_jobs(tmp_path)}
    assert rows["study"] == {
        "job": "study", "driver": False, "disk_bytes": None,
        "complete": 2, "running": 1, "stopped": 1, "failed": 2, "infeasible": 1, "arms": 3,
        "trial_seconds": 10.5, "last_error": "error 4", "updated_at": START + timedelta(minutes=10),
    }  # fmt: skip
    assert rows["it's"]["complete"] == 1
    assert rows["it's"]["last_error"] is None
    assert rows["unstarted"] == UNSTARTED
    assert [row["job"] for row in summarise_jobs(tmp_path, "it's")] == ["it's"]
    assert summarise_jobs(tmp_path, "unstarted") == [UNSTARTED]


def test_kept_jobs_are_found_by_name(tmp_path: Path) -> None:
    keep_job(tmp_path, "beta")
    keep_job(tmp_path, "alpha")
    keep_job(tmp_path, "_stages")
    assert list_jobs(tmp_path) == ["alpha", "beta"]
    assert find_job(tmp_path, "beta") == tmp_path / "beta" / "job.yaml"
    for ask in (find_job, summarise_jobs):
        with pytest.raises(JobError, match=r"no job 'gamma' under .*; jobs there: alpha, beta"):
            ask(tmp_path, "gamma")


def test_a_cell_is_the_mean_over_draws_by_seed(tmp_path: Path) -> None:
    for trial_id, values in {"a-0": [0.1, 0.3], "a-1": [0.5, 0.5], "b-0": [0.8]}.items():
        write_trial(tmp_path, trial_id)
        write_scores(tmp_path, trial_id, values)
    write_trial(tmp_path, "a-0", job="other")
    write_scores(tmp_path, "a-0", [1.0], job="other")
    found = read_cell(tmp_path, "study", "scores", CELL)
    assert found == [
        SeedValue("a", 0, pytest.approx(0.2)),
        SeedValue("a", 1, pytest.approx(0.5)),
        SeedValue("b", 0, pytest.approx(0.8)),
    ]


@pytest.mark.parametrize(
    ("columns", "counts"),
    [
        ({}, True),
        ({"phase": "confirm"}, True),
        ({"phase": "search"}, False),
        ({"status": "running"}, False),
        ({"status": "stopped", "rung": 1}, False),
        ({"status": "failed"}, False),
        ({"num_rungs": 3, "status": "running"}, False),
    ],
)
def test_only_complete_trials_of_ranked_phases_count(tmp_path: Path, columns: dict[str, Any], counts: bool) -> None:
    write_trial(tmp_path, "a-0", **columns)
    write_scores(tmp_path, "a-0", [0.5])
    assert bool(read_cell(tmp_path, "study", "scores", CELL)) is counts


def test_only_the_last_rung_and_the_asked_split_count(tmp_path: Path) -> None:
    write_trial(tmp_path, "a-0")
    rows = [
        CELL | {"rung": rung, "split": split, "draw": 0, "value": value}
        for rung, split, value in [
            (1, "validation", 0.1), (2, "validation", 0.2), (2, "test", 0.9), (3, "validation", 0.7),
        ]
    ]  # fmt: skip
    write_rows(tmp_path, "study", "scores", "a-0", rows)
    assert read_cell(tmp_path, "study", "scores", CELL) == [SeedValue("a", 0, 0.2)]
    assert read_cell(tmp_path, "study", "scores", CELL, split="test") == [SeedValue("a", 0, 0.9)]


@pytest.mark.parametrize(
    "other",
    [{"task": "sex"}, {"metric": "accuracy"}, {"shots": 32}, {"shots": None}, {"frozen_layers": "4"}, {"probe": "mlp"}],
)
def test_cells_do_not_mix(tmp_path: Path, other: dict[str, Any]) -> None:
    write_trial(tmp_path, "a-0")
    rows = [
        cell | {"rung": 2, "split": "validation", "draw": 0, "value": value}
        for cell, value in ((CELL, 0.25), (CELL | other, 0.75))
    ]
    write_rows(tmp_path, "study", "scores", "a-0", rows)
    assert read_cell(tmp_path, "study", "scores", CELL) == [SeedValue("a", 0, 0.25)]
    assert read_cell(tmp_path, "study", "scores", CELL | other) == [SeedValue("a", 0, 0.75)]


def test_baselines_have_no_depth_and_no_probe(tmp_path: Path) -> None:
    write_trial(tmp_path, "baseline:majority-0")
    write_scores(tmp_path, "baseline:majority-0", [0.5], frozen_layers=None, probe=None)
    assert read_cell(tmp_path, "study", "scores", CELL) == [SeedValue("baseline:majority", 0, 0.5)]
    assert read_cell(tmp_path, "study", "scores", CELL | {"shots": 32}) == []


def test_held_tables_are_of_one_moment_and_of_the_asked_trials(tmp_path: Path) -> None:
    for trial_id in ("a-0", "a-1", "baseline:tfidf-0"):
        write_trial(tmp_path, trial_id)
        write_scores(tmp_path, trial_id, [0.1, 0.2])

    def ask(trials: list[str] | None = None, job: str = "study") -> list[str]:
        connection = open_tables(tmp_path, "scores", job, trials)
        return [row[0] for row in connection.execute("select distinct trial_id from scores order by all").fetchall()]

    asked: list[list[str] | None] = [None, ["a-1", "baseline:tfidf-0"], []]
    before = [ask(trials) for trials in asked]
    assert before == [["a-0", "a-1", "baseline:tfidf-0"], ["a-1", "baseline:tfidf-0"], []]
    with hold_tables():
        assert [ask(trials) for trials in asked] == before
        write_trial(tmp_path, "a-2")
        write_scores(tmp_path, "a-2", [0.3])
        assert ask() == before[0]
        assert ask(["a-2"]) == []
        assert "a-2" in ask(job="*")  # over all jobs nothing is held
    assert "a-2" in ask()


def test_geometry_cells_and_missing_values(tmp_path: Path) -> None:
    write_trial(tmp_path, "a-0")
    write_trial(tmp_path, "b-0")
    cell = {"task": "kind", "metric": "graph_components", "parameter": 0.7}
    for trial_id, value in (("a-0", 3.0), ("b-0", None)):
        rows = [cell | {"rung": 2, "split": "validation", "parameter": p, "value": value} for p in (0.5, 0.7, None)]
        write_rows(tmp_path, "study", "geometry", trial_id, rows)
    assert read_cell(tmp_path, "study", "geometry", cell) == [SeedValue("a", 0, 3.0)]
    assert read_cell(tmp_path, "study", "geometry", cell | {"parameter": None}) == [SeedValue("a", 0, 3.0)]


def test_heldout_measures_start_and_end(tmp_path: Path) -> None:
    for trial_id, status in (("a-0", "complete"), ("b-0", "stopped")):
        write_trial(tmp_path, trial_id, status=status)
        rows = [{"step": step, "metric": "heldout_mlm_loss", "value": 9.0 - step} for step in (4, 0, 8)]
        write_rows(tmp_path, "study", "curves", trial_id, [*rows, {"step": 0, "metric": "loss", "value": 1.0}])
    assert read_heldout(tmp_path, "study") == {("a", 0): {"heldout_mlm_loss": (9.0, 1.0)}}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_importing_reads_no_heavy_library() -> None:
    found = run_python(
        f"import sys, raylab.cli, raylab.results.queries; print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert (found.stdout, found.stderr) == ("[]\n", "")


RUN = f"""
import sys
import time
from raylab.cli import main
try:
    main(sys.argv[1:])
finally:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, loaded
"""


def test_query_and_status_run_without_heavy_libraries(tmp_path: Path) -> None:
    write_trial(tmp_path, "a-0")
    write_trial(tmp_path, "b-0", status="failed", error="NotFiniteError")
    keep_job(tmp_path, "study")
    where = ["--results", str(tmp_path), "--format", "json"]
    asked = run_python(RUN, "query", "select trial_id, status from trials order by 1", *where)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert json.loads(asked.stdout) == [
        {"trial_id": "a-0", "status": "complete"}, {"trial_id": "b-0", "status": "failed"},
    ]  # fmt: skip
    state = run_python(RUN, "status", "study", *where)
    assert (state.returncode, state.stderr) == (0, "")
    (row,) = json.loads(state.stdout)
    assert (row["complete"], row["failed"], row["last_error"]) == (1, 1, "NotFiniteError")
    wrong = run_python(RUN, "query", f"from '{tmp_path}/notes.csv'", *where)
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)


def rewrite_curves(results: Path) -> None:
    for number in range(1, 60):
        rows = [{"step": step, "tokens": number} for step in range(50 * number)]
        write_rows(results, "study", "curves", "a-0", rows)
        time.sleep(0.03)


def test_a_query_that_meets_a_replaced_file_asks_again(tmp_path: Path) -> None:
    write_rows(tmp_path, "study", "curves", "a-0", [{"step": 0, "tokens": 0}])
    # spawn: a fork of a process with DuckDB's threads in it may crash.
    child = multiprocessing.get_context("spawn").Process(target=rewrite_curves, args=(tmp_path,))
    child.start()
    while child.is_alive():
        found = query(tmp_path, "select count(*) as joined from curves a join curves b using (step)")
        assert found["joined"][0].as_py() > 0
    child.join()
    assert child.exitcode == 0
