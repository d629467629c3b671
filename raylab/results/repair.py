"""What a stop, a full disk or a failing one left of a job: set aside or cleared, so that resuming makes it again."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylab.base.mistakes import DamagedError
from raylab.results.packs import list_loose, list_packs
from raylab.results.tables import SCHEMAS, check_pack, is_written, list_trials, read_file, read_rows, write_rows
from raylab.store import storage
from raylab.store.stages import clear_leftovers

# What a trial writes at each rung, before its row of `trials` says that the rung is done.
MEASURED = ("scores", "geometry", "curves", "stages")


def repair_job(results: Path, job: str) -> list[str]:
    """Makes a job's tables whole or fewer, and returns a line for each thing that was wrong.

    Only the job's driver may call this. A damaged file is kept beside the others under a name that starts with
    `.damaged`; a trial whose measures are missing is taken back to its start, and finds its stages.
    """
    notes = [*_set_aside(results, job)]
    for folder in (results / job).glob("*/"):
        for scratch in folder.glob(".*.parquet.*"):
            scratch.unlink(missing_ok=True)
    clear_leftovers(results)
    for row in list_trials(results, job):
        if row["arm"].startswith("baseline:") or not row["rung"]:
            continue
        rows = {table: read_rows(results, job, table, row["trial_id"]) for table in MEASURED}
        missing = [table for table, found in rows.items() if not found]
        # An older raylab wrote no confusions, and scores without a class.
        if any(s["class"] is not None for s in rows["scores"]) and not is_written(
            results, job, "confusions", row["trial_id"]
        ):
            missing.append("confusions")
        missing += [t for t in ("scores", "geometry") if rows[t] and max(r["rung"] for r in rows[t]) < row["rung"]]
        if missing:
            notes.append(f"trial {row['trial_id']}: rows of {', '.join(missing)} are gone; it is measured again")
            write_rows(results, job, "trials", row["trial_id"], [row | {"rung": 0, "status": "running"}])
    return notes


def _set_aside(results: Path, job: str) -> Iterator[str]:
    for table in SCHEMAS:
        checks: list[tuple[Path, Callable[[Path, str], Any]]]
        checks = [(path, read_file) for path in list_loose(results, job, table)]
        for path, check in checks + [(path, check_pack) for path in list_packs(results, job, table)]:
            try:
                with contextlib.suppress(FileNotFoundError):  # packed meanwhile
                    check(path, table)
            except DamagedError:
                if table == "unseals":  # a record that nothing makes again
                    yield f"{path} is damaged: restore it from a backup, it records an access to the test split"
                    continue
                kept = path.with_name(f".damaged-{path.name}")
                path.replace(kept)
                storage.push(results, kept)
                storage.remove(results, path)
                yield f"{table}: the file of {path.stem} was damaged; it is made again"
