"""What of a job's checkpoints is kept, and the disk that it takes."""

import contextlib
import json
import shutil
from pathlib import Path

from raylab.base.mistakes import DamagedError
from raylab.job.specs import Job
from raylab.results.queries import list_jobs
from raylab.results.tables import list_names, list_summaries, read_rows
from raylab.store.disk import NOTE
from raylab.store.stages import measure_stages, peek_stage, prune_stage
from raylab.store.storage import pull, write

# What pruning takes of a rung that nothing goes on from, or that is no trial's final encoder.
WEIGHTS = ("encoder", "optimizer.safetensors")
# Hidden states at freeze depths: large, and made again where they are needed.
STATES = ("states-",)


def prune_checkpoints(results: Path, job: Job) -> int:
    """Deletes what resume, unseal and export don't need of a job's checkpoints; returns the bytes freed.

    Every complete trial keeps its final encoder, in any job; a trial that is not finished keeps all. What is needed
    again later, such as earlier rungs with other shots, is then trained again. `limits.checkpoints: all` keeps the
    encoders of all rungs; hidden states go either way.
    """
    pull(results)
    keep: set[str] = set()
    mine: set[str] = set()
    states: set[str] = set()
    try:
        for name in list_jobs(results):
            for row in list_summaries(results, name):
                rungs = _list_rungs(results, name, row["trial_id"])
                if name == job.name:
                    mine |= rungs.keys()
                    used = read_rows(results, name, "stages", row["trial_id"])
                    states |= {stage["stage_id"] for stage in used if stage["kind"] == "activations"}
                if row["status"] == "complete" and rungs:
                    keep.add(max(rungs, key=lambda stage_id: rungs[stage_id]))
                elif row["status"] not in ("stopped", "infeasible"):
                    keep |= rungs.keys()
    except DamagedError:
        return 0  # another job's file: what it needs isn't known until that one is resumed
    freed = sum(prune_stage(results, stage_id, STATES) for stage_id in sorted(states))
    if job.limits.checkpoints == "all":
        return freed
    return freed + sum(prune_stage(results, stage_id, WEIGHTS) for stage_id in sorted(mine - keep))


def _list_rungs(results: Path, job: str, trial_id: str) -> dict[str, int]:
    """The stages of a trial's rungs, and how many tokens had been trained on by then."""
    rows = [row for row in read_rows(results, job, "stages", trial_id) if row["kind"] == "pretrain"]
    known = {row["stage_id"]: peek_stage(results, row["stage_id"]) for row in rows}
    return {stage_id: info["tokens"] for stage_id, info in known.items() if info is not None}


def measure_disk(results: Path, job: str) -> dict[str, int]:
    """Bytes of a job's tables, of the stages it uses (which others may use too), and free where the results are."""
    stages = {
        row["stage_id"]
        for name in list_names(results, job, "stages")
        for row in read_rows(results, job, "stages", name)
    }
    tables = 0
    for file in (results / job).glob("*/*.parquet"):
        with contextlib.suppress(FileNotFoundError):  # packed meanwhile
            tables += file.stat().st_size
    return {
        "tables_bytes": tables,
        "stages_bytes": measure_stages(results, stages),
        "free_bytes": shutil.disk_usage(results).free,
    }


def note_disk(results: Path, job: str) -> dict[str, int]:
    """Measures and notes it beside the tables, for `status`, which walks no folders."""
    found = measure_disk(results, job)
    write(results, results / job / NOTE, json.dumps(found).encode())
    return found
