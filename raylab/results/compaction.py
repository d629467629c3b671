"""Compaction: a job's many small files of a table become one pack; `packs` says why no reader is harmed by it."""

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from raylab.base.mistakes import DamagedError, JobError
from raylab.results.packs import KEY, TICK_NS, choose_rows, encode_index, excluding, identify, list_loose, open_pack
from raylab.results.queries import find_job, list_jobs
from raylab.results.tables import SCHEMAS, list_summaries, read_file, read_pack, summarise_trial
from raylab.store.driver import claim_job
from raylab.store.storage import PACKS, is_mirror, publish, pull, remove, remove_same

# Files of one table from which on a job that has ended is compacted.
MANY = 100
# Rows of a pack that are read at once.
GROUP_ROWS = 65_536
# Files compared and deleted while writers wait: some milliseconds.
BATCH = 100
FILES_AT_ONCE = 20
SCRATCH = ".packing"


def compact_results(results: Path, name: str | None = None) -> Iterator[tuple[str, dict[str, int]]]:
    """Packs a job's files, or those of every job, as `compact_job` does; yields the job and its tables.

    At a URL, where nothing can be locked, no job may be running meanwhile. Raises JobError.
    """
    if name is not None:
        find_job(results, name)
    for job in list_jobs(results) if name is None else [name]:
        with claim_job(results, job) if is_mirror(results) else contextlib.nullcontext():
            yield job, compact_job(results, job)


def compact_job(results: Path, job: str, least: int = 1) -> dict[str, int]:
    """Packs the files of trials that don't run, of tables with `least` of them or more; table -> files packed.

    Safe beside readers and, in a folder, beside writers; at a URL the caller holds the driver's claim. Files that are
    damaged stay. Raises JobError where another process compacts the job.
    """
    pull(results, job)
    folder = results / job / PACKS
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            for scratch in folder.glob(f"*{SCRATCH}"):
                scratch.unlink(missing_ok=True)
            # Their files change at each rung.
            running = {
                row["trial_id"].replace(":", "_")
                for row in list_summaries(results, job, skip_damaged=True)
                if row["status"] == "running"
            }
            return {table: count for table in SCHEMAS if (count := _compact(results, job, table, running, least))}
    except Timeout:
        raise JobError([f"compact: {job} is being compacted by another process; wait for it"]) from None


def _compact(results: Path, job: str, table: str, running: set[str], least: int) -> int:
    loose = [path for path in list_loose(results, job, table) if path.name.partition(".")[0] not in running]
    try:
        # A loose file of the same name counts before a pack's rows, which are left behind.
        packs = choose_rows(results, job, table, [path.name.removesuffix(".parquet") for path in loose])
    except DamagedError:
        return 0  # the job's next run sets it aside
    # One pack alone, or one file, is not made better; packs of a compaction that was killed are.
    if len(loose) + len(packs) < 2 or (len(loose) < least and len(packs) < 2):
        return 0
    rows: dict[str, int] = {}
    summaries = {name: pack.summaries[name] for pack, names in packs for name in names if name in pack.summaries}
    taken: dict[Path, tuple[int, int, int]] = {}
    parts = [pa.Table.from_batches([], schema=SCHEMAS[table])]
    for pack, names in packs:
        whole = _decode(read_pack(pack.path, table))
        parts += [whole.slice(*pack.rows[name]) for name in names]
        rows |= {name: pack.rows[name][1] for name in names}
    read = _read_loose(loose, table)
    while some := list(itertools.islice(read, FILES_AT_ONCE)):
        for file in some:
            name = file.path.name.removesuffix(".parquet")
            rows[name], taken[file.path] = len(file.rows), file.identity
            summaries |= {name: file.summary} if file.summary else {}
        parts.append(pa.concat_tables([file.rows for file in some], promote_options="default").combine_chunks())
    merged = pa.concat_tables(parts, promote_options="default")
    number = max((int(pack.path.stem.split("-")[1]) for pack, _ in packs), default=0) + 1
    _write_pack(results, job, table, number, merged, encode_index(rows, summaries))
    files = iter(taken.items())
    while batch := list(itertools.islice(files, BATCH)):
        with excluding(results, job):
            for path, identity in batch:
                with contextlib.suppress(FileNotFoundError):  # set aside as damaged meanwhile
                    if identify(path) == identity:
                        remove_same(results, path)
    for pack, _ in packs:
        remove(results, pack.path)
    return len(taken)


class Loose(NamedTuple):
    """A loose file as it was read: what identifies that version, its rows; of `trials`, its summary."""

    path: Path
    identity: tuple[int, int, int]
    rows: pa.Table
    summary: dict[str, Any] | None


def _read_loose(paths: list[Path], table: str) -> Iterator[Loose]:
    """The files that are neither damaged nor changing now."""
    for path in paths:
        try:
            identity = identify(path)
            if (wait := identity[1] + TICK_NS - time.time_ns()) > 0:  # two versions might have one time
                time.sleep(min(wait, TICK_NS) / 1e9)
            found = read_file(path, table)
            summary = summarise_trial(path) if table == "trials" else None
            if identify(path) == identity:
                yield Loose(path, identity, found, summary)
        except (DamagedError, FileNotFoundError):
            continue


def _decode(found: pa.Table) -> pa.Table:
    """Text codes as text."""
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in found.schema
    ]
    return found.cast(pa.schema(fields)).combine_chunks()


def _write_pack(results: Path, job: str, table: str, number: int, rows: pa.Table, index: str) -> None:
    """Writes a pack beside, reads it back, puts it on the disk, and renames it into place."""
    folder = results / job / PACKS
    scratch = folder / f".{table}{SCRATCH}"
    try:
        texts = [field.name for field in rows.schema if pa.types.is_string(field.type)]
        with pq.ParquetWriter(
            scratch, rows.schema, compression="snappy", use_dictionary=texts, write_statistics=False,
            store_schema=False, write_page_checksum=True,
        ) as writer:  # fmt: skip
            writer.write_table(rows, row_group_size=GROUP_ROWS)
            writer.add_key_value_metadata({KEY: index})
        open_pack(scratch)
        written = _decode(read_pack(scratch, table))
        if [_bits(column) for column in written.columns] != [_bits(column) for column in rows.columns]:
            raise DamagedError(scratch)
        with scratch.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()[:8]
            os.fsync(stream.fileno())
        publish(results, scratch, folder / f"{table}-{number:06d}-{digest}.parquet")
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _bits(column: pa.ChunkedArray) -> pa.Array:
    """A column as it can be compared: NaN is not equal to itself."""
    whole = column.combine_chunks()
    return whole.view(pa.int64()) if pa.types.is_float64(whole.type) else whole
