"""Packs: many trials' rows of a table in one file, and how writers, readers and compaction meet without harm.

A trial's rows lie in a loose file, `JOB/TABLE/TRIAL.parquet`, or in a pack, `JOB/_packed/TABLE-NUMBER-DIGEST.parquet`,
which names in its footer the files that it took in and which rows are whose. Three rules make every reader see every
file once, in one version, whatever is written meanwhile and wherever compaction is killed:

1. A loose file counts before any pack, a pack before those of lower numbers. So a trial that is written again needs to
   know nothing of packs, and between the writing of a pack and the deletion of what it holds nothing counts twice.
2. A pack is never changed. It is written beside, read back, put on the disk, renamed; only then is what it holds
   deleted (loose files, older packs). Readers look at the loose files first and at the packs last: a file that is gone
   by then is in a pack that was there before it went. A pack that is gone was replaced: readers list the packs again.
3. Only what was packed is deleted. Writers rename under a shared lock; compaction compares and deletes under the
   exclusive one, so a file that was written again is seen to be another and stays. Where there is no lock, at a URL,
   compaction needs the driver's claim, so that no trial writes.

A directory that changes while it is listed may not name a file that is replaced: it is listed until it stands still.
Killed between steps, compaction leaves scratch files, which the next one deletes, or files that are also in a pack,
which count as before and are packed again. What a damaged pack held is gone as if its files were damaged.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raylab.base.mistakes import DamagedError
from raylab.results.summary import find_note
from raylab.store.storage import PACKS

LOCK = ".tables.lock"
# Not ASCII, as all values are: no value can hold it.
KEY = "raylab\u00b7pack"
# A directory's time is told in ticks of the system's clock: one changed this shortly ago may be changing still.
TICK_NS = 20_000_000
MOST_LISTINGS = 5


class Pack(NamedTuple):
    """A pack's index: file name without its ending -> its first row and how many; of `trials`, their summaries too."""

    path: Path
    rows: dict[str, tuple[int, int]]
    summaries: dict[str, dict[str, Any]]


def list_folders(results: Path, table: str) -> list[str]:
    """The jobs that may have rows of a table."""
    folders = [path for path in sorted(results.glob("*/")) if path.name[0] not in "._"]
    return [path.name for path in folders if (path / table).is_dir() or (path / PACKS).is_dir()]


def list_loose(results: Path, job: str, table: str) -> list[Path]:
    """A job's loose files of a table, by name."""
    return _list(results / job / table)


def list_packs(results: Path, job: str, table: str) -> list[Path]:
    """A job's packs of a table, the one that counts most first. To be listed after the loose files were read."""
    return [path for path in reversed(_list(results / job / PACKS)) if path.name.startswith(f"{table}-")]


def _list(folder: Path) -> list[Path]:
    """A folder's Parquet files, by name; one that is there all the time is listed, whatever else changes."""
    names: set[str] = set()
    for _ in range(MOST_LISTINGS):
        try:
            before = os.stat(folder).st_mtime_ns
            names |= {name for name in os.listdir(folder) if name.endswith(".parquet") and name[0] != "."}
            after = os.stat(folder).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return []
        if before == after and abs(time.time_ns() - after) > TICK_NS:
            break
    return [folder / name for name in sorted(names)]


def choose_rows(results: Path, job: str, table: str, seen: Iterable[str]) -> list[tuple[Pack, list[str]]]:
    """Each pack of a table with the files that count in it: not those `seen` loose, nor those in a pack before it.

    Raises DamagedError.
    """
    while True:
        known, chosen = set(seen), []
        try:
            for path in list_packs(results, job, table):
                pack = open_pack(path)
                chosen.append((pack, [name for name in pack.rows if name not in known]))
                known.update(pack.rows)
        except FileNotFoundError:  # replaced by a newer one meanwhile
            continue
        return chosen


def find_packed(results: Path, job: str, table: str, name: str) -> Pack | None:
    """The pack that holds the rows of a file that is not there loose; None where it was never written."""
    for pack, names in choose_rows(results, job, table, ()):
        if name in names:
            return pack
    return None


def identify(path: Path) -> tuple[int, int, int]:
    """What tells a file from any that takes its place. Raises FileNotFoundError."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def open_pack(path: Path) -> Pack:
    """A pack's index, read without Arrow. Raises FileNotFoundError, and DamagedError where it is not what was written.

    Kept in memory by the file's identity: packs are never changed.
    """
    return _open_pack(path, identify(path))


@functools.lru_cache(maxsize=64)
def _open_pack(path: Path, identity: tuple[int, int, int]) -> Pack:
    with path.open("rb") as stream:
        # Parquet ends with its footer, the footer's length and four letters.
        stream.seek(max(0, identity[2] - 8))
        tail = stream.read()
        length = int.from_bytes(tail[:4], "little")
        if len(tail) < 8 or tail[4:] != b"PAR1" or length > identity[2]:
            raise DamagedError(path)
        stream.seek(identity[2] - 8 - length)
        note = find_note(stream.read(length), KEY)
    if not isinstance(note, dict) or note.keys() != {"rows", "summaries"}:
        raise DamagedError(path)
    rows, first = {}, 0
    for name, count in note["rows"].items():
        rows[name] = (first, count)
        first += count
    return Pack(path, rows, note["summaries"])


def encode_index(rows: Mapping[str, int], summaries: Mapping[str, Any]) -> str:
    """What a pack's footer holds under KEY: files and their numbers of rows, in the order of the rows; ASCII JSON."""
    return json.dumps({"rows": dict(rows), "summaries": dict(summaries)}, separators=(",", ":"))


@contextlib.contextmanager
def sharing(results: Path, job: str) -> Iterator[None]:
    """Held while a file is renamed into place: compaction deletes nothing meanwhile.

    On a file system without locks it does nothing; compaction, which can't take the other side there, refuses.
    """
    with _open_lock(results, job) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield


@contextlib.contextmanager
def excluding(results: Path, job: str) -> Iterator[None]:
    """Held while compaction compares and deletes: nothing is renamed into place meanwhile."""
    with _open_lock(results, job) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _open_lock(results: Path, job: str) -> Iterator[int]:
    lock = os.open(results / job / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield lock
    finally:
        os.close(lock)  # and with it the lock
