"""The result tables: their columns, and whole-file writes that readers never see half of."""

import contextlib
import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.parquet.core import ParquetReader

from raylab.base.identity import canonical, digest
from raylab.base.mistakes import DamagedError
from raylab.job.explanations import inner_types
from raylab.job.settings import SETTINGS
from raylab.results.packs import choose_rows, find_packed, identify, list_loose, open_pack, sharing
from raylab.results.summary import COLUMNS, KEY, TIMES, encode_summary, read_summary, read_whole
from raylab.store.storage import PACKS, publish, pull_files

# Rows that come out of a file at once: all, of a trial's file.
BATCH_ROWS = 65_536
# Up to here text takes less space, and less time to read and write, as it is than as codes of a dictionary.
FEW_ROWS = 128

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
            "wall_seconds": _float, "gpu_seconds": _float, "device": _text, "precision": _text,
            "peak_memory_bytes": _int, "num_steps": _int, "num_tokens": _int, "num_documents": _int, "flops": _float,
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

# Metrics of `curves` that are of a run, not of its trial: how fast it went and what it took, on that machine.
OF_A_RUN = (
    *("train_data_seconds", "train_tokens_per_second", "train_mfu", "train_peak_memory_gb"),
    *("train_padding", "train_attention_padding"),
)


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
        with sharing(results, job):
            publish(results, scratch, path)
    except OSError:
        # A disk that is full stays usable.
        scratch.unlink(missing_ok=True)
        raise


def _encode_rows(rows: list[dict[str, Any]], schema: pa.Schema, summary: str | None) -> pa.Buffer:
    """A Parquet file in memory: writing it piece by piece to disk takes longer."""
    stream = pa.BufferOutputStream()
    # Of a file of few rows, dictionaries, statistics and Arrow's own copy of the schema are much of the bytes.
    packed: dict[str, Any] = {
        "use_dictionary": len(rows) > FEW_ROWS,
        "compression": "snappy" if len(rows) > 1 else "none",
    }
    packed |= {"write_statistics": False, "store_schema": False, "write_page_checksum": True}
    with pq.ParquetWriter(stream, schema, **packed) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        if summary is not None:
            writer.add_key_value_metadata({KEY: summary})
    return stream.getvalue()


def read_file(path: Path, table: str, columns: Collection[str] | None = None) -> pa.Table:
    """A file's rows: today's columns first, null where an older raylab did not write them, then columns it had more.

    With `columns`, those alone. The file is opened once, so that rows are never of two versions; and without pyarrow's
    datasets, which load pandas. Raises DamagedError where it is not the file that was written.
    """
    try:
        data = pa.BufferReader(read_whole(path))
        found = _read_at(data, table, frozenset(columns)) if columns is not None else None
        if found is not None:
            return found
        # Threads cost more than they bring in files of a few rows.
        file = pq.ParquetFile(data, page_checksum_verification=True)
        found = file.read(columns=None if columns is None else list(columns), use_threads=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(path) from error
    return _arrange(found, SCHEMAS[table], columns)


@functools.lru_cache(maxsize=64)
def _place(table: str, columns: frozenset[str]) -> tuple[list[int], pa.Schema]:
    schema = SCHEMAS[table]
    places = [index for index, name in enumerate(schema.names) if name in columns]
    return places, pa.schema([schema.field(index) for index in places])


def _read_at(data: pa.BufferReader, table: str, columns: frozenset[str]) -> pa.Table | None:
    """Some columns, found by their places in today's files; None where they aren't there.

    Of a small file, what ParquetFile makes to find columns by name takes as long as to read them.
    """
    places, schema = _place(table, columns)
    try:
        reader = ParquetReader()
        reader.open(data, page_checksum_verification=True)
        # A tenth quicker than `read_all`, which makes a table of chunks.
        groups = range(reader.num_row_groups)
        batches = list(reader.iter_batches(BATCH_ROWS, groups, column_indices=places, use_threads=False))
    except (pa.ArrowException, OSError, IndexError):
        batches = []
    if batches and all(batch.schema.equals(schema) for batch in batches):
        return pa.Table.from_batches(batches, schema)
    data.seek(0)
    return None


def _arrange(found: pa.Table, schema: pa.Schema, columns: Collection[str] | None) -> pa.Table:
    if columns is not None:
        schema = pa.schema([field for field in schema if field.name in columns])
    if found.schema.equals(schema):
        return found
    more = [field for field in found.schema if field.name not in schema.names]
    arrays = [
        found[field.name].cast(field.type)
        if field.name in found.column_names
        else pa.chunked_array([pa.nulls(len(found), field.type)])
        for field in (*schema, *more)
    ]
    # Not pa.table(): to see whether it was given a data frame, it loads pandas.
    return pa.Table.from_arrays(arrays, schema=pa.schema([*schema, *more]))


def read_pack(path: Path, table: str, columns: Collection[str] | None = None) -> pa.Table:
    """A pack's rows, as `read_file` gives them, but text as codes of a dictionary: a tenth of the time and memory.

    Raises FileNotFoundError and DamagedError.
    """
    try:
        with path.open("rb") as stream:
            names = pq.ParquetFile(stream).schema_arrow
            texts = [field.name for field in names if pa.types.is_string(field.type)]
            stream.seek(0)
            file = pq.ParquetFile(stream, read_dictionary=texts, page_checksum_verification=True)
            found = file.read(columns=None if columns is None else [c for c in columns if c in names.names])
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(path) from error
    return _arrange(found, encode_schema(SCHEMAS[table]), columns)


def check_pack(path: Path, table: str) -> None:
    """Raises DamagedError where a pack can't be read as it was written."""
    if sum(count for _, count in open_pack(path).rows.values()) != len(read_pack(path, table)):
        raise DamagedError(path)


def encode_schema(schema: pa.Schema) -> pa.Schema:
    """A schema with text as codes of a dictionary."""
    coded = pa.dictionary(pa.int32(), _text)
    return pa.schema([field.with_type(coded) if pa.types.is_string(field.type) else field for field in schema])


@functools.lru_cache(maxsize=len(SCHEMAS))
def _read_whole_pack(path: Path, identity: tuple[int, int, int]) -> pa.Table:
    """A pack's rows, kept: who reads one trial of it reads others. Packs are never changed."""
    return read_pack(path, path.stem.split("-")[0])


def read_pieces(results: Path, job: str, table: str, name: str) -> pa.Table | None:
    """The rows of a file by its name, without ending: from the file, else from a pack; None where never written."""
    try:
        return read_file(results / job / table / f"{name}.parquet", table)
    except (FileNotFoundError, NotADirectoryError):
        pass
    while True:
        pack = find_packed(results, job, table, name)
        if pack is None:
            return None
        with contextlib.suppress(FileNotFoundError):  # else replaced by a newer one meanwhile
            return _read_whole_pack(pack.path, identify(pack.path)).slice(*pack.rows[name])


def list_names(results: Path, job: str, table: str) -> list[str]:
    """The names of all files of a table, without ending, loose or packed."""
    loose = {path.name.removesuffix(".parquet") for path in list_loose(results, job, table)}
    return sorted(loose.union(*(names for _, names in choose_rows(results, job, table, loose))))


def _to_rows(found: pa.Table, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = found.select(SCHEMAS[table].names).to_pylist()
    return rows


def pull_trial(results: Path, job: str, trial_id: str) -> None:
    """Brings a trial's rows up to date where the results mirror a URL."""
    paths = [table_path(results, job, table, trial_id) for table in SCHEMAS if table != "unseals"]
    pull_files(results, paths, results / job / PACKS)


def read_trial(results: Path, job: str, trial_id: str) -> dict[str, Any] | None:
    """A trial's row of `trials`, or None."""
    rows = read_rows(results, job, "trials", trial_id)
    return rows[0] if rows else None


def read_rows(results: Path, job: str, table: str, trial_id: str, suffix: str = "") -> list[dict[str, Any]]:
    """A trial's rows of a table; none where it has not written yet."""
    found = read_pieces(results, job, table, table_path(results, job, table, trial_id, suffix).stem)
    return [] if found is None else _to_rows(found, table)


def is_written(results: Path, job: str, table: str, trial_id: str) -> bool:
    """Whether a trial has written a table, if only that it has no rows."""
    path = table_path(results, job, table, trial_id)
    return path.is_file() or find_packed(results, job, table, path.stem) is not None


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
    found: dict[str, dict[str, Any]] = {}
    damaged = contextlib.suppress(*([DamagedError] if skip_damaged else []))
    for path in list_loose(results, job, "trials"):
        with damaged, contextlib.suppress(FileNotFoundError):  # packed meanwhile
            found[path.stem] = summarise_trial(path)
    with damaged:
        for pack, names in choose_rows(results, job, "trials", found):
            found |= {name: pack.summaries[name] for name in names}
    return sorted(found.values(), key=lambda row: (row["started_at"] or 0, row["trial_id"]))


def list_trials(results: Path, job: str) -> Iterator[dict[str, Any]]:
    """Every row of a job's `trials`, in the order of their start."""
    rows = {}
    for name in list_names(results, job, "trials"):
        found = read_pieces(results, job, "trials", name)
        if found is not None:
            rows[name] = _to_rows(found, "trials")[0]
    yield from sorted(rows.values(), key=lambda row: (row["started_at"], row["trial_id"]))
