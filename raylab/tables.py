"""The result tables: their columns, and whole-file writes that readers never see half of."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylab.explanations import inner_types
from raylab.identity import canonical, digest
from raylab.mistakes import DamagedError
from raylab.settings import SETTINGS
from raylab.storage import publish, pull_files
from raylab.summary import COLUMNS, KEY, TIMES, encode_summary, read_summary

_text, _int, _float = pa.string(), pa.int64(), pa.float64()
_time = pa.timestamp("us", tz="UTC")


def _setting_type(annotation: Any) -> pa.DataType:
    """Scalars keep their type; lists and mappings are canonical JSON text."""
    kinds = {t for t in inner_types(annotation) if t is not type(None)}
    scalars = {frozenset({bool}): pa.bool_(), frozenset({int}): _int, frozenset({float}): _float}
    return scalars.get(frozenset(kinds), _text)


SETTING_COLUMNS = {name: _setting_type(field.annotation) for name, field in SETTINGS.items()}

SCHEMAS: dict[str, pa.Schema] = {
    "trials": pa.schema(
        {
            "job": _text, "trial_id": _text, "arm": _text, "phase": _text, "seed": _int, "status": _text, "rung": _int,
            "num_rungs": _int, "target_values": _text, "rung_values": _text, "measures": _text,
            "search.targets": _text, **SETTING_COLUMNS,
            "supervised_by": _text, "effective_spans": _text, "attempts": _int,
            "wall_seconds": _float, "gpu_seconds": _float, "device": _text, "peak_memory_bytes": _int,
            "num_steps": _int, "num_tokens": _int, "num_documents": _int, "flops": _float,
            "data_digest": _text, "code_version": _text, "error": _text, "started_at": _time, "updated_at": _time,
        }
    ),
    "scores": pa.schema(
        {
            "job": _text, "trial_id": _text, "rung": _int, "task": _text, "split": _text, "shots": _int,
            "frozen_layers": _text, "probe": _text, "draw": _int, "metric": _text, "class": _text, "value": _float,
            "num_train": _int, "num_eval": _int,
            "selection": _text, "parameters_updated": _int, "train_seconds": _float,
        }
    ),
    "confusions": pa.schema(
        {
            "job": _text, "trial_id": _text, "rung": _int, "task": _text, "split": _text, "shots": _int,
            "frozen_layers": _text, "probe": _text, "draw": _int, "class": _text, "predicted": _text, "count": _int,
        }
    ),
    "geometry": pa.schema(
        {
            "job": _text, "trial_id": _text, "rung": _int, "task": _text, "split": _text, "metric": _text,
            "parameter": _float, "value": _float, "num_points": _int, "reference": _float, "low": _float,
            "high": _float,
        }
    ),
    "curves": pa.schema(
        {"job": _text, "trial_id": _text, "step": _int, "tokens": _int, "metric": _text, "value": _float}
    ),
    "stages": pa.schema(
        {
            "job": _text, "stage_id": _text, "kind": _text, "trial_id": _text, "reused": pa.bool_(),
            "wall_seconds": _float, "gpu_seconds": _float, "saved_seconds": _float,
        }
    ),
    "hygiene": pa.schema(
        {
            "job": _text, "trial_id": _text, "table_name": _text, "check_name": _text, "split": _text, "class": _text,
            "num_rows": _int, "num_checked": _int, "share": _float, "value": _float, "look_above": _float,
            "problem_above": _float, "verdict": _text, "evidence": _text, "row_ids": _text,
        }
    ),
    "unseals": pa.schema({"job": _text, "trial_id": _text, "at": _time, "by": _text, "reason": _text}),
}  # fmt: skip


def now() -> datetime:
    """The time, as tables hold it."""
    return datetime.now(UTC)


def _decides_measures(name: str) -> bool:
    return name.startswith("evaluate.") or name in ("pretrain.rungs", "search.targets")


def digest_measures(settings: Mapping[str, Any], searched: Collection[str]) -> str:
    """Digest of what is measured at which budget, without what an arm itself decides: equal ones compare by rung."""
    names = [name for name in settings if _decides_measures(name) or name == "pretrain.num_tokens"]
    return digest({name: plain_value(settings[name]) for name in names if name not in searched})


def same_measures(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a row of `trials` was measured at the same rungs and cells, for the same targets, as settings ask for."""
    return all(row[name] == plain_value(value) for name, value in settings.items() if _decides_measures(name))


def table_path(results: Path, job: str, table: str, trial_id: str, suffix: str = "") -> Path:
    """The file that holds a trial's rows of a table."""
    return results / job / table / f"{trial_id.replace(':', '_')}{suffix}.parquet"


def plain_value(value: Any) -> Any:
    """A value as its cell holds it: lists and mappings as canonical JSON text."""
    return canonical(value) if isinstance(value, list | dict | tuple) else value


def write_rows(
    results: Path, job: str, table: str, trial_id: str, rows: Sequence[Mapping[str, Any]], suffix: str = ""
) -> None:
    """Replaces a trial's rows of a table, whole: written beside, then renamed. `job` and `trial_id` are filled in.

    Lists and mappings become canonical JSON text. A key that is no column is our own mistake (AssertionError).
    """
    schema = SCHEMAS[table]
    unknown = {key for row in rows for key in row} - set(schema.names)
    assert not unknown, f"no such columns in {table}: {sorted(unknown)}"
    plain = [{k: plain_value(v) for k, v in row.items()} | {"job": job, "trial_id": trial_id} for row in rows]
    path = table_path(results, job, table, trial_id, suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    summary = encode_summary(plain[0]) if table == "trials" and plain else None
    try:
        scratch.write_bytes(_encode_rows(plain, schema, summary))
        publish(results, scratch, path)
    except OSError:
        # A disk that is full stays usable.
        scratch.unlink(missing_ok=True)
        raise


def _encode_rows(rows: list[dict[str, Any]], schema: pa.Schema, summary: str | None) -> pa.Buffer:
    """A Parquet file in memory: writing it piece by piece to disk takes longer."""
    stream = pa.BufferOutputStream()
    # Of a file of one row, dictionaries, statistics and Arrow's own copy of the schema are most of the bytes.
    packed: dict[str, Any] = {"use_dictionary": len(rows) > 1, "compression": "snappy" if len(rows) > 1 else "none"}
    packed |= {"write_statistics": False, "store_schema": False, "write_page_checksum": True}
    with pq.ParquetWriter(stream, schema, **packed) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        if summary is not None:
            writer.add_key_value_metadata({KEY: summary})
    return stream.getvalue()


def read_file(path: Path, table: str) -> pa.Table:
    """A file's rows: today's columns first, null where an older raylab did not write them, then columns it had more.

    The file is opened once, so that rows are never of two versions; and without pyarrow's datasets, which load pandas.
    Raises DamagedError where it is not the file that was written.
    """
    schema = SCHEMAS[table]
    try:
        # Threads cost more than they bring in files of a few rows.
        found = pq.ParquetFile(path, page_checksum_verification=True).read(use_threads=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(path) from error
    if found.schema.equals(schema):
        return found
    more = [field for field in found.schema if field.name not in schema.names]
    columns = [
        found[field.name].cast(field.type)
        if field.name in found.column_names
        else pa.chunked_array([pa.nulls(len(found), field.type)])
        for field in (*schema, *more)
    ]
    # Not pa.table(): to see whether it was given a data frame, it loads pandas.
    return pa.Table.from_arrays(columns, schema=pa.schema([*schema, *more]))


def _read_file(path: Path, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_file(path, table).select(SCHEMAS[table].names).to_pylist()
    return rows


def pull_trial(results: Path, job: str, trial_id: str) -> None:
    """Brings a trial's rows up to date where the results mirror a URL."""
    pull_files(results, [table_path(results, job, table, trial_id) for table in SCHEMAS if table != "unseals"])


def read_trial(results: Path, job: str, trial_id: str) -> dict[str, Any] | None:
    """A trial's row of `trials`, or None."""
    path = table_path(results, job, "trials", trial_id)
    if not path.is_file():
        return None
    return _read_file(path, "trials")[0]


def read_rows(results: Path, job: str, table: str, trial_id: str, suffix: str = "") -> list[dict[str, Any]]:
    """A trial's rows of a table; none where it has not written yet."""
    path = table_path(results, job, table, trial_id, suffix)
    return _read_file(path, table) if path.is_file() else []


def summarise_trial(path: Path) -> dict[str, Any]:
    """What is looked at often of a trial (`summary.COLUMNS`), from its file of `trials`; times are numbers.

    Raises DamagedError.
    """
    found = read_summary(path)
    if found is None:  # of an older raylab
        rows = read_file(path, "trials").select(COLUMNS)
        # Arrow loads pandas to make Python's times of its own.
        found = {name: (rows[name].cast("int64") if name in TIMES else rows[name])[0].as_py() for name in COLUMNS}
    return found


def list_summaries(results: Path, job: str, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """A job's trials as `summarise_trial` tells of them, in the order of their start."""
    paths = [path for path in (results / job / "trials").glob("*.parquet") if not path.name.startswith(".")]
    found = []
    for path in paths:
        with contextlib.suppress(*([DamagedError] if skip_damaged else [])):
            found.append(summarise_trial(path))
    return sorted(found, key=lambda row: (row["started_at"] or 0, row["trial_id"]))


def list_trials(results: Path, job: str) -> Iterator[dict[str, Any]]:
    """Every row of a job's `trials`, in the order of their start."""
    rows = [
        row
        for path in sorted((results / job / "trials").glob("*.parquet"))
        if not path.name.startswith(".")
        for row in _read_file(path, "trials")
    ]
    yield from sorted(rows, key=lambda row: (row["started_at"], row["trial_id"]))
