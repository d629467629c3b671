"""A table's rows over all jobs as they are at one moment, from loose files and packs; only the columns asked for."""

import contextlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from raylab.results.packs import choose_rows, list_folders, list_loose
from raylab.results.summary import COLUMNS, TIMES, read_summary
from raylab.results.tables import SCHEMAS, encode_schema, read_file, read_pack

# Each file's columns take far more memory than their few rows: joined as they come.
FILES_AT_ONCE = 200
# Threads that read them: Arrow, outside Python's lock, takes two thirds of the time. A third would wait for the lock.
READERS = 2


def read_table(
    results: Path,
    table: str,
    job: str | None = None,
    trials: Collection[str] | None = None,
    columns: Collection[str] | None = None,
) -> pa.Table:
    """The rows of a table of all jobs or one, of all trials or some, in which each file counts once (see `packs`).

    Text is in codes of a dictionary. Without `columns` all, also those that files of other versions have more. Raises
    DamagedError: an answer without such a file would be another one.
    """
    jobs = list_folders(results, table) if job is None else [job]
    # Behind the first dot of a file's name stands what sets apart several files of one trial.
    wanted = None if trials is None else {trial_id.replace(":", "_") for trial_id in trials}
    loose = [
        path for name in jobs for path in list_loose(results, name, table)
        if wanted is None or path.name.partition(".")[0] in wanted
    ]  # fmt: skip
    seen: dict[str, set[str]] = {name: set() for name in jobs}
    schema = SCHEMAS[table]
    if columns is not None:
        schema = pa.schema([field for field in schema if field.name in columns])
    parts = [pa.Table.from_batches([], schema=encode_schema(schema)), *_read_loose(loose, table, schema, columns, seen)]
    for name in jobs:  # last, as `packs` says
        parts += _read_packs(results, name, table, columns, seen[name], wanted)
    return pa.concat_tables(parts, promote_options="default")


def _read_loose(
    paths: list[Path], table: str, schema: pa.Schema, columns: Collection[str] | None, seen: dict[str, set[str]]
) -> Iterator[pa.Table]:
    """The rows of the loose files that are still there, noted in `seen`."""
    if table == "trials" and columns is not None and set(schema.names) <= set(COLUMNS):
        found = [(path, row) for path in paths if (row := _read_summary(path)) is not None]
        for path, _ in found:
            seen[path.parts[-3]].add(path.name.removesuffix(".parquet"))
        if found:
            yield _encode(_to_table([row for _, row in found], schema))
        known = {path for path, _ in found}
        paths = [path for path in paths if path not in known]

    def read_some(start: int) -> tuple[list[Path], pa.Table | None]:
        found = {}
        for path in paths[start : start + FILES_AT_ONCE]:
            with contextlib.suppress(FileNotFoundError):  # packed meanwhile
                found[path] = read_file(path, table, columns)
        return list(found), _encode(_concatenate(list(found.values())).combine_chunks()) if found else None

    with ThreadPoolExecutor(READERS) as readers:
        for there, rows in readers.map(read_some, range(0, len(paths), FILES_AT_ONCE)):
            for path in there:
                seen[path.parts[-3]].add(path.name.removesuffix(".parquet"))
            if rows is not None:
                yield rows


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid:  # of several versions: to unify their columns takes a quarter of the time
        return pa.concat_tables(tables, promote_options="default")


def _read_summary(path: Path) -> dict[str, object] | None:
    try:
        return read_summary(path)
    except FileNotFoundError:
        return None


def _to_table(rows: list[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Rows of summaries, whose times are numbers."""
    arrays = [
        pa.array([row[field.name] for row in rows], pa.int64() if field.name in TIMES else field.type).cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _encode(rows: pa.Table) -> pa.Table:
    columns = [
        rows[field.name].dictionary_encode() if pa.types.is_string(field.type) else rows[field.name]
        for field in rows.schema
    ]
    return pa.Table.from_arrays(columns, schema=encode_schema(rows.schema))


def _read_packs(
    results: Path, job: str, table: str, columns: Collection[str] | None, seen: set[str], wanted: set[str] | None
) -> list[pa.Table]:
    """The rows that count of a job's packs."""
    while True:
        parts = []
        try:
            for pack, names in choose_rows(results, job, table, seen):
                if wanted is not None:
                    names = [name for name in names if name.partition(".")[0] in wanted]
                if names:
                    rows = read_pack(pack.path, table, columns)
                    slices = _join(pack.rows[name] for name in names)
                    parts += [rows.slice(first, count) for first, count in slices]
        except FileNotFoundError:  # replaced by a newer one meanwhile
            continue
        return parts


def _join(slices: "Iterator[tuple[int, int]]") -> list[tuple[int, int]]:
    """Runs of rows that follow each other as one."""
    joined: list[tuple[int, int]] = []
    for first, count in slices:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        elif count:
            joined.append((first, count))
    return joined
