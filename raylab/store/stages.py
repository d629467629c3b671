"""Shared work, kept by content: a stage is built once and found again by whatever decides its result."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from raylab.base.identity import digest
from raylab.base.mistakes import BusyError
from raylab.base.world import ALONE, World
from raylab.store import storage

# Raise a kind's number by hand when a change of code changes its results.
VERSIONS = {
    "inspect": 1,
    "rate": 2,
    "corpus": 3,
    "tokenizer": 1,
    "tokens": 1,
    "hygiene": 1,
    "pretrain": 4,
    "heldout": 3,
    "embed": 3,
    "activations": 3,
    "cell": 2,
    "evaluate": 5,
    "baseline": 2,
}
FOLDER = "_stages"

# Stages whose bytes this process has compared with their digests, by folder and time of writing.
_verified: set[tuple[str, int]] = set()


class Stage(NamedTuple):
    """A finished stage: its id and folder, and whether it was found, which saves the time that building it took."""

    kind: str
    stage_id: str
    path: Path
    reused: bool
    wall_seconds: float
    info: dict[str, Any]
    saved_seconds: float = 0.0


def name_stage(kind: str, key: dict[str, Any]) -> str:
    """The id of a stage: its kind and a hash of what decides its result."""
    return f"{kind}-{digest({'kind': kind, 'version': VERSIONS[kind], **key})}"


def _read_note(path: Path) -> dict[str, Any] | None:
    """What stands in a stage's stage.json; None where it is missing or damaged."""
    try:
        note = json.loads((path / "stage.json").read_bytes())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"info", "files"} <= note.keys() else None


def _ask_note(results: Path, stage_id: str) -> dict[str, Any] | None:
    """As `_read_note`, of a stage at the URL that the results mirror; None elsewhere."""
    if not storage.is_mirror(results):
        return None
    try:
        note = json.loads(storage.read(results, results / FOLDER / stage_id / "stage.json"))
    except (FileNotFoundError, ValueError):
        return None
    return note if isinstance(note, dict) and {"info", "files"} <= note.keys() else None


def _holds(note: dict[str, Any], needs: str | None) -> bool:
    return needs is None or any(name.startswith(needs) for name in note["files"])


def _is_whole(path: Path, needs: str | None) -> bool:
    note = _read_note(path)
    if note is None or not _holds(note, needs):
        return False
    try:
        return all(os.stat(path / name).st_size == size for name, (size, _) in note["files"].items())
    except OSError:
        return False


def open_stage(results: Path, stage_id: str, needs: str | None = None) -> Path | None:
    """The folder of a finished stage, or None. A folder appears whole, by one rename; from a URL it is fetched first.

    None too where one of its files is missing or has another size than was written, or where `needs` names a file (or
    the beginning of its path) that was pruned.
    """
    path = results / FOLDER / stage_id
    if _is_whole(path, needs):
        return path
    note = _ask_note(results, stage_id)
    return path if note is not None and _holds(note, needs) and _fetch(results, path, note, needs) else None


def peek_stage(results: Path, stage_id: str) -> dict[str, Any] | None:
    """What the builder of a finished stage noted about it, or None; nothing is fetched."""
    path = results / FOLDER / stage_id
    if _is_whole(path, None):
        return read_info(path)
    note = _ask_note(results, stage_id)
    return None if note is None else note["info"]


def peek_key(results: Path, stage_id: str) -> dict[str, Any] | None:
    """What decided the result of a stage, or None where the stage is gone; nothing is fetched."""
    note = _read_note(results / FOLDER / stage_id) or _ask_note(results, stage_id)
    return None if note is None else note["key"]


@contextlib.contextmanager
def _placing(results: Path, path: Path) -> Iterator[None]:
    """Alone on this machine in putting a stage of a mirror into its place."""
    if not storage.is_mirror(results):
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.place")):
        yield


def _fetch(results: Path, path: Path, note: dict[str, Any], needs: str | None) -> bool:
    """Gets a stage from the URL; False where its files are gone or are not those of the note."""
    scratch = path.with_name(f".fetching-{path.name}")
    with _placing(results, path):
        if _is_whole(path, needs):  # another process of this machine got it meanwhile
            return True
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            storage.fetch_files(results, {path / name: scratch / name for name in note["files"]})
            if any(_digest_file(scratch / name) != found for name, (_, found) in note["files"].items()):
                return False
            (scratch / "stage.json").write_text(json.dumps(note, indent=1, sort_keys=True))
            shutil.rmtree(path, ignore_errors=True)
            os.replace(scratch, path)
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _verified.add(_mark(path))
    return True


def _mark(path: Path) -> tuple[str, int]:
    return str(path), (path / "stage.json").stat().st_mtime_ns


def read_info(path: Path) -> dict[str, Any]:
    """What the builder of a stage noted about it."""
    info: dict[str, Any] = json.loads((path / "stage.json").read_text())["info"]
    return info


def find_stage(results: Path, stage_id: str, needs: str | None = None) -> Path | None:
    """As `open_stage`, and every byte is compared with its digest, once a process."""
    path = open_stage(results, stage_id, needs)
    if path is None:
        return None
    mark = _mark(path)
    if mark not in _verified:
        note = _read_note(path)
        if note is None or any(_digest_file(path / name) != found for name, (_, found) in note["files"].items()):
            return None
        _verified.add(mark)
    return path


def _digest_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _list_files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def build_stage(
    results: Path,
    kind: str,
    key: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    world: World = ALONE,
    *,
    needs: str | None = None,
    wait: bool = True,
) -> Stage:
    """Finds the stage that `key` names, or has `build(folder)` fill a folder that is then renamed into place.

    `build` returns plain values to keep as the stage's info. Two processes that want the same stage build it once:
    the second waits on a file lock, which the system frees when its holder dies; with `wait=False` it raises BusyError
    instead. A stage that is damaged, or lacks what `needs` names, is built again. All workers of a trial call this
    together; `build` runs on every one of them, and only rank 0 may write.
    """
    stage_id = name_stage(kind, key)
    path = results / FOLDER / stage_id

    def found() -> bool:
        return bool(world.broadcast(world.rank == 0 and find_stage(results, stage_id, needs) is not None))

    if not found():
        lock = _lock(results, stage_id)
        if not world.broadcast(world.rank != 0 or _take(lock, wait)):
            raise BusyError(stage_id)
        try:
            if not found():
                return _build(results, path, kind, key, build, world)
        finally:
            if world.rank == 0:
                lock.release()
    if world.rank:
        open_stage(results, stage_id, needs)  # its node may have another mirror
    note = _read_note(path) or {}
    return Stage(kind, stage_id, path, True, 0.0, note["info"], note["wall_seconds"])


def _build(
    results: Path,
    path: Path,
    kind: str,
    key: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    world: World,
) -> Stage:
    scratch = path.with_name(f".building-{path.name}")
    if world.rank == 0:
        # A builder that was killed left its half; only the lock's holder may be here.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    started = time.perf_counter()
    try:
        info = build(scratch)
        seconds = time.perf_counter() - started
        if world.rank == 0:
            names = _list_files(scratch)
            files = {name: [(scratch / name).stat().st_size, _digest_file(scratch / name)] for name in names}
            for name in names:
                _flush(scratch / name)
            note = {"kind": kind, "key": key, "wall_seconds": seconds, "info": info, "files": files}
            (scratch / "stage.json").write_text(json.dumps(note, indent=1, sort_keys=True))
            _flush(scratch / "stage.json")
            _push(results, path, scratch, names)
            with _placing(results, path):
                storage.push_files(results, {path / "stage.json": scratch / "stage.json"})
                shutil.rmtree(path, ignore_errors=True)
                os.replace(scratch, path)
    except BaseException:
        # A disk that is full stays usable.
        if world.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    world.broadcast(None)
    if world.rank:
        open_stage(results, path.name)  # as above
    return Stage(kind, path.name, path, False, seconds, info)


def _push(results: Path, path: Path, scratch: Path, names: list[str]) -> None:
    """Puts a stage's files at the URL of a mirror; without stage.json, which comes last, they are no stage."""
    if storage.is_mirror(results):
        storage.remove(results, path / "stage.json")
        storage.push_files(results, {path / name: scratch / name for name in names})


def _flush(path: Path) -> None:
    """Has the system put a file on its disk: what is renamed into place after it is whole, even if power fails."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _lock(results: Path, stage_id: str) -> FileLock:
    return FileLock(results / FOLDER / f".{stage_id}.lock")


def _take(lock: FileLock, wait: bool) -> bool:
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return False
    return True


def is_building(results: Path, stage_id: str) -> bool:
    """Whether some process of this machine, or of one that shares its locks, builds a stage now."""
    lock = _lock(results, stage_id)
    if not Path(lock.lock_file).exists():
        return False
    if not _take(lock, wait=False):
        return True
    lock.release()
    return False


def clear_leftovers(results: Path) -> None:
    """Deletes what processes that were killed have left of the stages that they were building."""
    for scratch in (results / FOLDER).glob(".building-*"):
        lock = _lock(results, scratch.name.removeprefix(".building-"))
        # Held meanwhile: another process may begin to build that stage.
        if _take(lock, wait=False):
            try:
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                lock.release()


def prune_stage(results: Path, stage_id: str, drop: Collection[str]) -> int:
    """Deletes the files of a stage whose paths begin with one of `drop`; returns the bytes freed.

    The stage stays, with its info. It is noted first: a stop in between leaves files that nothing opens.
    """
    path = results / FOLDER / stage_id
    if storage.is_mirror(results):
        return _prune_remote(results, path, drop) + _prune_local(path, drop)
    return _prune_local(path, drop)


def _prune_remote(results: Path, path: Path, drop: Collection[str]) -> int:
    note = _ask_note(results, path.name)
    dropped = [name for name in note["files"] if name.startswith(tuple(drop))] if note else []
    if note is None or not dropped:
        return 0
    kept = {name: found for name, found in note["files"].items() if name not in dropped}
    text = json.dumps(note | {"files": kept}, indent=1, sort_keys=True)
    storage.write(results, path / "stage.json", text.encode())
    for name in dropped:
        storage.remove(results, path / name)
    return sum(note["files"][name][0] for name in dropped)


def _prune_local(path: Path, drop: Collection[str]) -> int:
    note = _read_note(path)
    if note is None:
        return 0
    kept = {name: found for name, found in note["files"].items() if not name.startswith(tuple(drop))}
    if len(kept) < len(note["files"]):
        scratch = path / ".stage.json"
        scratch.write_text(json.dumps(note | {"files": kept}, indent=1, sort_keys=True))
        os.replace(scratch, path / "stage.json")
    freed = 0
    for name in _list_files(path):
        if name not in kept and name != "stage.json":
            freed += (path / name).stat().st_size
            (path / name).unlink(missing_ok=True)
    return freed


def list_stages(results: Path, kind: str) -> list[str]:
    """The ids of the stages of a kind, here or at the URL that the results mirror."""
    there = storage.measure(results, FOLDER)
    names = [path.parent.name for path in (results / FOLDER).glob(f"{kind}-*/stage.json")] if there is None else there
    return sorted(name for name in names if name.startswith(f"{kind}-"))


def measure_stages(results: Path, stage_ids: Collection[str]) -> int:
    """Bytes of some stages' files; 0 for those that are not there."""
    there = storage.measure(results, FOLDER)
    if there is not None:
        return sum(there.get(stage_id, 0) for stage_id in stage_ids)
    notes = (_read_note(results / FOLDER / stage_id) for stage_id in stage_ids)
    return sum(size for note in notes if note for size, _ in note["files"].values())
