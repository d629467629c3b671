"""Shared work, kept by content: a stage is built once and found again by whatever decides its result."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from raylab.identity import digest
from raylab.world import ALONE, World

# Raise a kind's number by hand when a change of code changes its results.
VERSIONS = {
    "inspect": 1,
    "corpus": 1,
    "tokenizer": 1,
    "tokens": 1,
    "pretrain": 1,
    "heldout": 1,
    "embed": 1,
    "baseline": 1,
}
FOLDER = "_stages"


class Stage(NamedTuple):
    """A finished stage: its id and folder, whether it was found or built now, and the cost of building it now."""

    kind: str
    stage_id: str
    path: Path
    reused: bool
    wall_seconds: float
    info: dict[str, Any]


def name_stage(kind: str, key: dict[str, Any]) -> str:
    """The id of a stage: its kind and a hash of what decides its result."""
    return f"{kind}-{digest({'kind': kind, 'version': VERSIONS[kind], **key})}"


def open_stage(results: Path, stage_id: str) -> Path | None:
    """The folder of a finished stage, or None. A folder appears whole, by one rename."""
    path = results / FOLDER / stage_id
    return path if (path / "stage.json").is_file() else None


def read_info(path: Path) -> dict[str, Any]:
    """What the builder of a stage noted about it."""
    info: dict[str, Any] = json.loads((path / "stage.json").read_text())["info"]
    return info


def build_stage(
    results: Path, kind: str, key: dict[str, Any], build: Callable[[Path], dict[str, Any]], world: World = ALONE
) -> Stage:
    """Finds the stage that `key` names, or has `build(folder)` fill a folder that is then renamed into place.

    `build` returns plain values to keep as the stage's info. Two processes that want the same stage build it once:
    the second waits on a file lock, which the system frees when its holder dies. All workers of a trial call this
    together; `build` runs on every one of them, and only rank 0 may write.
    """
    stage_id = name_stage(kind, key)
    path = results / FOLDER / stage_id
    scratch = results / FOLDER / f".building-{stage_id}"
    if not world.broadcast(open_stage(results, stage_id) is not None):
        lock = FileLock(results / FOLDER / f".{stage_id}.lock")
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            if not world.broadcast(open_stage(results, stage_id) is not None):
                if world.rank == 0:
                    # A builder that was killed left its half; only the lock's holder may be here.
                    shutil.rmtree(scratch, ignore_errors=True)
                    shutil.rmtree(path, ignore_errors=True)
                    scratch.mkdir()
                started = time.perf_counter()
                info = build(scratch)
                seconds = time.perf_counter() - started
                if world.rank == 0:
                    note = {"kind": kind, "key": key, "wall_seconds": seconds, "info": info}
                    (scratch / "stage.json").write_text(json.dumps(note, indent=1, sort_keys=True))
                    os.replace(scratch, path)
                world.broadcast(None)
                return Stage(kind, stage_id, path, False, seconds, info)
        finally:
            if world.rank == 0:
                lock.release()
    return Stage(kind, stage_id, path, True, 0.0, read_info(path))
