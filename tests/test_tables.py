"""Tables: declared columns, one for each setting, and files that are replaced whole."""

import json
import multiprocessing
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylab.job.settings import SETTINGS, list_settings
from raylab.job.specs import Job
from raylab.results.queries import open_tables
from raylab.results.tables import (
    SCHEMAS,
    SETTING_COLUMNS,
    list_trials,
    now,
    plain_value,
    read_rows,
    read_trial,
    same_measures,
    table_path,
    write_rows,
)

TABLE = {"path": "notes.parquet", "text": "text"}
JOB = Job.model_validate(
    {
        "name": "study",
        "corpus": {"documents": TABLE, "tasks": {"kind": TABLE | {"label": "kind"}}},
        "encoder": {"config": {}, "tokenizer": {}},
        "pretrain": {"objective": "declutr"},
    }
)
TIME = pa.timestamp("us", tz="UTC")
EXPECTED = {
    "trials": {
        "job": "string", "trial_id": "string", "arm": "string", "phase": "string", "seed": "int64", "status": "string",
        "rung": "int64", "num_rungs": "int64", "target_values": "string", "rung_values": "string",
        "search.targets": "string", "measures": "string",
        "supervised_by": "string",
        "effective_spans": "string",
        "attempts": "int64", "wall_seconds": "double", "gpu_seconds": "double", "device": "string",
        "precision": "string",
        "peak_memory_bytes": "int64", "num_steps": "int64", "num_tokens": "int64", "num_documents": "int64",
        "flops": "double", "data_digest": "string", "code_version": "string", "error": "string",
        "started_at": str(TIME), "updated_at": str(TIME),
    },
    "scores": {
        "job": "string", "trial_id": "string", "rung": "int64", "task": "string", "split": "string", "shots": "int64",
        "frozen_layers": "string", "probe": "string", "draw": "int64", "metric": "string", "class": "string",
        "value": "double", "num_train": "int64", "num_eval": "int64",
        "selection": "string", "parameters_updated": "int64", "train_seconds": "double",
    },
    "confusions": {
        "job": "string", "trial_id": "string", "rung": "int64", "task": "string", "split": "string", "shots": "int64",
        "frozen_layers": "string", "probe": "string", "draw": "int64", "class": "string", "predicted": "string",
        "count": "int64",
    },
    "geometry": {
        "job": "string", "trial_id": "string", "rung": "int64", "task": "string", "split": "string",
        "metric": "string", "parameter": "double", "value": "double", "num_points": "int64", "reference": "double",
        "low": "double", "high": "double",
    },
    "curves": {
        "job": "string", "trial_id": "string", "step": "int64", "tokens": "int64", "metric": "string",
        "value": "double",
    },
    "stages": {
        "job": "string", "stage_id": "string", "kind": "string", "trial_id": "string", "reused": "bool",
        "wall_seconds": "double", "gpu_seconds": "double", "saved_seconds": "double",
    },
    "hygiene": {
        "job": "string", "trial_id": "string", "table_name": "string", "check_name": "string", "split": "string",
        "class": "string", "num_rows": "int64", "num_checked": "int64", "share": "double", "value": "double",
        "look_above": "double", "problem_above": "double", "verdict": "string", "evidence": "string",
        "row_ids": "string",
    },
    "unseals": {"job": "string", "trial_id": "string", "at": str(TIME), "by": "string", "reason": "string"},
}  # fmt: skip


def write_trial(results: Path, trial_id: str = "a-0", **columns: Any) -> None:
    row = {"arm": "a", "seed": 0, "status": "running", "started_at": now(), "updated_at": now()}
    write_rows(results, "study", "trials", trial_id, [row | columns])


@pytest.mark.parametrize("table", list(SCHEMAS))
def test_columns_have_their_declared_types(tmp_path: Path, table: str) -> None:
    write_rows(tmp_path, "study", table, "a-0", [{}])
    for schema in (SCHEMAS[table], pq.read_schema(table_path(tmp_path, "study", table, "a-0"))):
        fixed = {field.name: str(field.type) for field in schema if field.name not in SETTING_COLUMNS}
        assert fixed == EXPECTED[table]


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("corpus.split.vary", "bool"),
        ("pretrain.declutr.max_span", "int64"),
        ("pretrain.declutr.min_document_length", "int64"),
        ("pretrain.learning_rate", "double"),
        ("pretrain.metadata.field", "string"),
        ("encoder.config.dropout", "double"),
        ("encoder.config.hidden_size", "int64"),
        ("pretrain.objective", "string"),
        ("evaluate.shots", "string"),
        ("evaluate.geometry.thresholds", "string"),
        ("corpus.tasks", "string"),
        ("corpus.split.values", "string"),
    ],
)
def test_settings_keep_the_type_of_their_field(setting: str, kind: str) -> None:
    assert str(SCHEMAS["trials"].field(setting).type) == kind


def test_every_setting_is_a_column_and_comes_back(tmp_path: Path) -> None:
    settings = list_settings(JOB)
    assert set(settings) == set(SETTINGS) == set(SETTING_COLUMNS)
    assert SCHEMAS["trials"].names.index("search.targets") + 1 == SCHEMAS["trials"].names.index(next(iter(SETTINGS)))
    write_trial(tmp_path, **settings)
    row = read_trial(tmp_path, "study", "a-0")
    assert row is not None
    for name, value in settings.items():
        assert row[name] == plain_value(value)
        assert type(row[name]) is type(plain_value(value))
    assert row["pretrain.declutr.max_span"] == 128
    assert row["pretrain.metadata.loss"] is None  # declutr does not read it
    assert row["evaluate.shots"] == "[8,32]"
    assert json.loads(row["corpus.tasks"]) == settings["corpus.tasks"]
    assert ": " not in row["corpus.tasks"]
    assert same_measures(row, settings)
    assert not same_measures(row, settings | {"evaluate.draws": 6})
    assert not same_measures(row, settings | {"pretrain.rungs": 2})
    assert same_measures(row, settings | {"pretrain.learning_rate": 1.0})


def test_job_and_trial_are_filled_in_and_lists_become_json(tmp_path: Path) -> None:
    write_trial(tmp_path, "baseline:majority-0", job="other", target_values=[0.5, None])
    path = table_path(tmp_path, "study", "trials", "baseline:majority-0")
    assert path.name == "baseline_majority-0.parquet"
    row = read_trial(tmp_path, "study", "baseline:majority-0")
    assert row is not None
    assert (row["job"], row["trial_id"], row["target_values"]) == ("study", "baseline:majority-0", "[0.5,null]")
    assert isinstance(row["started_at"], datetime)
    assert row["started_at"].utcoffset() is not None
    assert row["phase"] is None


def test_an_unknown_column_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no such columns in scores: \['vlaue'\]"):
        write_rows(tmp_path, "study", "scores", "a-0", [{"vlaue": 1.0}])
    assert not (tmp_path / "study").exists()


def test_rows_are_replaced_whole_and_twice_is_once(tmp_path: Path) -> None:
    rows = [{"metric": "loss", "step": step, "value": float(step)} for step in range(5)]
    for count in (3, 5, 5):
        write_rows(tmp_path, "study", "curves", "a-0", rows[:count])
        assert [row["step"] for row in read_rows(tmp_path, "study", "curves", "a-0")] == list(range(count))
    write_rows(tmp_path, "study", "curves", "a-0", [])
    assert read_rows(tmp_path, "study", "curves", "a-0") == []
    assert [path.name for path in (tmp_path / "study" / "curves").iterdir()] == ["a-0.parquet"]


def test_what_is_not_there_reads_as_nothing(tmp_path: Path) -> None:
    assert read_trial(tmp_path, "study", "a-0") is None
    assert read_rows(tmp_path, "study", "scores", "a-0") == []
    assert list(list_trials(tmp_path, "study")) == []


def test_suffixes_are_files_of_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path, "study", "scores", "a-0", [{"value": 1.0}])
    write_rows(tmp_path, "study", "scores", "a-0", [{"value": 2.0}], suffix=".test")
    assert [row["value"] for row in read_rows(tmp_path, "study", "scores", "a-0")] == [1.0]
    assert [row["value"] for row in read_rows(tmp_path, "study", "scores", "a-0", ".test")] == [2.0]
    with open_tables(tmp_path) as tables:
        assert tables.execute("select value from scores order by value").fetchall() == [(1.0,), (2.0,)]


def test_trials_are_listed_by_their_start(tmp_path: Path) -> None:
    for trial_id in ("c-0", "a-0", "b-0"):
        write_trial(tmp_path, trial_id)
    scratch = table_path(tmp_path, "study", "trials", "a-0").with_name(".a-0.parquet.1")
    scratch.write_bytes(b"half")
    assert [row["trial_id"] for row in list_trials(tmp_path, "study")] == ["c-0", "a-0", "b-0"]


def test_a_writer_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trial(tmp_path, rung=1)

    write = Path.write_bytes

    def die(path: Path, data: Any) -> None:
        write(path, bytes(data)[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", die)
    with pytest.raises(KeyboardInterrupt):
        write_trial(tmp_path, rung=2)
    monkeypatch.undo()
    row = read_trial(tmp_path, "study", "a-0")
    assert row is not None
    assert row["rung"] == 1
    with open_tables(tmp_path) as tables:
        assert tables.execute("select rung from trials").fetchall() == [(1,)]


def rewrite_curves(results: Path) -> None:
    for number in range(1, 201):
        rows = [{"step": step, "tokens": number, "metric": "loss"} for step in range(20 * number)]
        write_rows(results, "study", "curves", "a-0", rows)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    write_rows(tmp_path, "study", "curves", "a-0", [{"step": 0, "tokens": 0}])
    # spawn: a fork of a process with DuckDB's threads in it may crash.
    child = multiprocessing.get_context("spawn").Process(target=rewrite_curves, args=(tmp_path,))
    child.start()
    last, reads, seen = 0, 0, set()
    while child.is_alive():
        rows = read_rows(tmp_path, "study", "curves", "a-0")
        (number,) = {row["tokens"] for row in rows}
        assert len(rows) == max(1, 20 * number)
        assert number >= last
        last, reads = number, reads + 1
        seen.add(number)
        if reads % 10 == 0:
            with open_tables(tmp_path) as tables:
                ((least, most, count),) = tables.execute(
                    "select min(tokens), max(tokens), count(*) from curves"
                ).fetchall()
            assert least == most
            assert count == max(1, 20 * most)
    child.join()
    assert child.exitcode == 0
    assert len(seen) > 5
    assert len(read_rows(tmp_path, "study", "curves", "a-0")) == 4000


def write_older(results: Path, without: list[str], extra: dict[str, Any]) -> None:
    """A trials file as another version would have written it."""
    names = [name for name in SCHEMAS["trials"].names if name not in without]
    rows = pa.Table.from_pylist(
        [{"job": "study", "trial_id": "old-0", "arm": "old", "status": "complete", "started_at": now()}],
        schema=pa.schema([SCHEMAS["trials"].field(name) for name in names]),
    )
    for name, value in extra.items():
        rows = rows.append_column(name, pa.array([value]))
    pq.write_table(rows, table_path(results, "study", "trials", "old-0"))


def test_files_of_other_versions_are_read_by_name(tmp_path: Path) -> None:
    write_trial(tmp_path, "new-0", **list_settings(JOB), flops=2.0)
    write_older(tmp_path, ["flops", "pretrain.learning_rate", "evaluate.draws"], {"pretrain.forgotten": "yes"})
    with open_tables(tmp_path) as tables:
        found = tables.execute(
            'select trial_id, flops, "pretrain.learning_rate", "pretrain.forgotten" from trials order by trial_id'
        ).fetchall()
    assert found == [("new-0", 2.0, 5e-5, None), ("old-0", None, None, "yes")]

    old = read_trial(tmp_path, "study", "old-0")
    assert old is not None
    assert list(old) == SCHEMAS["trials"].names
    assert old["flops"] is None
    assert not same_measures(old, list_settings(JOB))
    assert {row["trial_id"] for row in list_trials(tmp_path, "study")} == {"new-0", "old-0"}
    write_rows(tmp_path, "study", "trials", "old-0", [old | {"status": "running"}])


def test_a_folder_called_like_a_column_is_only_a_folder(tmp_path: Path) -> None:
    results = tmp_path / "seed=7"
    write_trial(results, seed=3)
    row = read_trial(results, "study", "a-0")
    assert row is not None
    assert row["seed"] == 3
    with open_tables(results) as tables:
        assert tables.execute("select seed from trials").fetchall() == [(3,)]
