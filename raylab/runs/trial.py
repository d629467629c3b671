"""One trial, top to bottom, with or without Ray: pre-train to a rung, evaluate, write, ask whether to go on."""

import contextlib
import functools
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from threadpoolctl import threadpool_limits
from torch import nn

import raylab
from raylab.base.memory import read_peak, reset_peak
from raylab.base.mistakes import (
    BusyError,
    InfeasibleError,
    JobError,
    SupersededError,
    describe_error,
    find_storage_problem,
)
from raylab.base.world import ALONE, World
from raylab.evaluation.evaluation import evaluate_encoder, follow_evaluation, open_encoder
from raylab.job.settings import list_measures, resolve_target
from raylab.job.specs import Job, TrialSpec
from raylab.results.tables import digest_measures, now, read_rows, read_trial, same_measures, write_rows
from raylab.store.driver import read_stop, read_token
from raylab.store.stages import FOLDER, Stage, open_stage, read_info
from raylab.training.encoder import choose_device
from raylab.training.loop import ENCODER, NotFiniteError, Training
from raylab.training.pretrain import measure_rung, open_data, read_curves, start_rung, train_rung
from raylab.training.rungs import list_rungs, num_rungs

Decide = Callable[[TrialSpec, int], bool]


def go_on(spec: TrialSpec, rung: int) -> bool:
    """Never stops a trial early."""
    return True


def run_trial(spec: TrialSpec, *, decide: Decide = go_on, world: World = ALONE) -> dict[str, Any]:
    """Runs a trial to its end, from wherever its tables and stages say it is, and returns its row of `trials`.

    After each rung its rows are written, then `decide(spec, rung)` says whether to go on. All workers of a trial call
    this together; rank 0 evaluates and writes, and the others train large cells with it. A setting that can't work ends
    as infeasible, a loss that is not finite as failed; any other error is recorded as failed, without its message
    (which could quote a text), and raised. Where the job was asked to stop, the trial returns as running after its
    rung. Raises BusyError where another process trains the rung that it needs, SupersededError where another driver has
    taken over, and what the file system says where it is full or read-only: then nothing is recorded, and the trial
    goes on later.
    """
    reset_peak(choose_device())
    row = _open_row(spec)
    results, last = Path(spec.results), num_rungs(spec.settings)
    # Handed out before the job was asked to stop, begun after.
    if spec.driver is not None and world.broadcast(world.rank == 0 and read_stop(results, spec.job) is not None):
        return row
    used = Used(spec)
    started = time.perf_counter()

    def record(status: str, **changes: Any) -> None:
        elapsed = time.perf_counter() - started
        row.update(changes, status=status, updated_at=now(), peak_memory_bytes=read_peak(choose_device()))
        row["wall_seconds"] = spent["wall_seconds"] + elapsed
        row["gpu_seconds"] = spent["gpu_seconds"] + elapsed * _count_gpus(spec)
        if world.rank == 0:
            _check_driver(spec)
            used.write()
            write_rows(results, spec.job, "trials", spec.trial_id, [row])

    spent = {name: row[name] for name in ("wall_seconds", "gpu_seconds")}
    record("running")
    try:
        for rung in _run_rungs(spec, row, used, world):
            if rung == last:
                break
            record("running", rung=rung)
            if not world.broadcast(world.rank != 0 or decide(spec, rung)):
                record("stopped")
                return row
            if world.broadcast(world.rank == 0 and read_stop(results, spec.job) is not None):
                return row
        record("complete", rung=last)
    except (InfeasibleError, JobError) as error:
        record("infeasible", error=str(error))
    except NotFiniteError as error:
        record("failed", error=str(error))
    except (BusyError, SupersededError):
        raise
    except Exception as error:
        if find_storage_problem(error) is None:
            record("failed", error=describe_error(error, _tell_more(error, spec)))
        raise
    return row


def _count_gpus(spec: TrialSpec) -> float:
    """GPUs that the trial holds, over all its workers."""
    resources = spec.settings.resources
    share = 1.0 if resources.gpus_per_worker is None else resources.gpus_per_worker
    return share * resources.workers if torch.cuda.is_available() else 0.0


def _tell_more(error: BaseException, spec: TrialSpec) -> str:
    if not isinstance(error, torch.OutOfMemoryError):
        return "'raylab run JOB.yaml --here --debug' shows more"
    resources = spec.settings.resources
    share, change = resources.gpus_per_worker, "set" if resources.chunk_tokens is None else "lower"
    less = (
        f"{change} resources.chunk_tokens where it pre-trained, lower evaluate.fine_tune.batch_size where it fine-tuned"
    )
    if share is not None and share < 1:
        return f"resources.gpus_per_worker: {share:g} of the GPU's memory is full; set more, or {less}"
    return f"the GPU's memory is full; {less}"


def _check_driver(spec: TrialSpec) -> None:
    """A process that outlived its driver must not write over what the next one's trials have written."""
    if spec.driver is not None and read_token(Path(spec.results), spec.job) != spec.driver:
        raise SupersededError(spec.trial_id)


class Used:
    """The stages that a trial used, as rows of `stages`; what it built before it was interrupted stays its own work."""

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec
        rows = read_rows(Path(spec.results), spec.job, "stages", spec.trial_id)
        self.rows = {row["stage_id"]: row for row in rows}
        self.changed = False

    def add(self, *stages: Stage) -> None:
        """Takes stages into the rows; a pre-training trained again here counts as built."""
        for stage in stages:
            if stage.stage_id not in self.rows or not stage.reused:
                self.changed = True
                self.rows[stage.stage_id] = {
                    "stage_id": stage.stage_id,
                    "kind": stage.kind,
                    "reused": stage.reused,
                    "wall_seconds": stage.wall_seconds,
                    "gpu_seconds": stage.wall_seconds * _count_gpus(self.spec),
                    "saved_seconds": stage.saved_seconds,
                }

    def write(self) -> None:
        """Writes the rows, if there are new ones."""
        if self.changed:
            write_rows(Path(self.spec.results), self.spec.job, "stages", self.spec.trial_id, list(self.rows.values()))
            self.changed = False


def _run_rungs(spec: TrialSpec, row: dict[str, Any], used: Used, world: World) -> Iterator[int]:
    """Yields each new rung's number once its rows are written; rungs done before are not measured or judged again."""
    results, done = Path(spec.results), row["rung"]
    data, chain = open_data(spec), list_rungs(spec)
    before = start_rung(spec, data, world, whole=False)
    used.add(before)
    training: Training | None = None
    scores = [r for r in read_rows(results, spec.job, "scores", spec.trial_id) if r["rung"] <= done]
    confusions = [r for r in read_rows(results, spec.job, "confusions", spec.trial_id) if r["rung"] <= done]
    geometry = [r for r in read_rows(results, spec.job, "geometry", spec.trial_id) if r["rung"] <= done]
    measured: list[tuple[Stage, Stage]] = []

    def open_rung(rung: int) -> nn.Module:
        """The encoder of a rung; trained again where it was pruned."""
        if spec.settings.pretrain.objective == "none":
            stage = start_rung(spec, data)
        elif open_stage(results, chain[rung].stage_id, ENCODER) is not None:
            stage = before
        else:
            stage, _ = train_rung(spec, data, chain, rung, None)
        used.add(stage)
        return open_encoder(stage)

    if world.rank == 0:
        measured.append((before, measure_rung(spec, data, chain, 0, None)))
    for rung in range(1, num_rungs(spec.settings) + 1):
        if spec.settings.pretrain.objective != "none":
            # One worker alone trains a pruned rung again only if its evaluation is not there.
            whole = rung > done and world.size > 1
            before, training = train_rung(spec, data, chain, rung, training, world, whole=whole)
            used.add(before)
            if world.rank == 0:
                measured.append((before, measure_rung(spec, data, chain, rung, training)))
        if rung <= done:
            continue
        if world.rank:
            follow_evaluation(spec, before.stage_id, world)
        else:
            with _leading(world):
                found = evaluate_encoder(spec, before.stage_id, rung, functools.partial(open_rung, rung), world)
            used.add(*found.stages, *(stage for _, stage in measured))
            scores += found.scores
            confusions += found.confusions
            geometry += found.geometry
            _check_driver(spec)
            write_rows(results, spec.job, "scores", spec.trial_id, scores)
            write_rows(results, spec.job, "confusions", spec.trial_id, confusions)
            write_rows(results, spec.job, "geometry", spec.trial_id, geometry)
            write_rows(results, spec.job, "curves", spec.trial_id, read_curves(measured))
            row["target_values"] = compute_targets(spec.settings, scores, geometry, rung)
            # Of the first target, which alone can end a trial early.
            row["rung_values"] = [*row["rung_values"][: rung - 1], *row["target_values"][:1]]
            row["precision"] = describe_precision(before, found.stages)
        info = read_info(before.path)
        row.update(
            num_steps=info["step"], num_tokens=info["tokens"], num_documents=info["documents"], flops=info["flops"],
            effective_spans=info["spans"],
        )  # fmt: skip
        yield rung


@contextlib.contextmanager
def _leading(world: World) -> Iterator[None]:
    """While rank 0 evaluates, the others follow; they are told of the end, also of an error that ends the trial alone.

    Any other error ends this process, and Ray Train then ends theirs: it may come from within a step that all take.
    """
    try:
        yield
    except (InfeasibleError, JobError) as error:
        world.broadcast(str(error))
        raise
    world.broadcast(None)


def compute_targets(
    settings: Job, scores: list[dict[str, Any]], geometry: list[dict[str, Any]], rung: int
) -> list[float | None]:
    """The value of each of the search's targets at a rung, mean over draws; null where it is not defined."""
    values: list[float | None] = []
    for target in settings.search.targets:
        wanted = resolve_target(settings, target) | {"rung": rung, "split": "validation"}
        rows = scores if target.table == "scores" else geometry
        found = [r["value"] for r in rows if r["value"] is not None and all(r[k] == v for k, v in wanted.items())]
        mean = float(np.mean(found)) if found else float("nan")
        values.append(None if np.isnan(mean) else mean)
    return values


def _open_row(spec: TrialSpec) -> dict[str, Any]:
    """The trial's row as it begins or goes on: rungs that were measured in the same way count as done."""
    settings = list_measures(spec.settings)
    before = read_trial(Path(spec.results), spec.job, spec.trial_id)
    supervised = read_info(Path(spec.results) / FOLDER / spec.corpus)["supervised_by"]
    fresh: dict[str, Any] = {
        "job": spec.job, "trial_id": spec.trial_id, "arm": spec.arm, "phase": spec.phase, "seed": spec.seed,
        "status": "running", "rung": 0, "num_rungs": num_rungs(spec.settings), "target_values": None, "rung_values": [],
        "measures": digest_measures(settings, spec.settings.search.space),
        **settings,
        "supervised_by": supervised.get(settings["pretrain.metadata.field"]),
        "attempts": 1, "wall_seconds": 0.0, "gpu_seconds": 0.0, "device": describe_device(), "precision": None,
        "peak_memory_bytes": 0, "data_digest": spec.data_digest, "code_version": describe_code(),
        "error": None, "started_at": now(),
    }  # fmt: skip
    if before is None:
        return fresh
    fresh |= {"attempts": before["attempts"] + 1, "started_at": before["started_at"]}
    if same_measures(before, settings):
        kept = (
            "rung",
            "target_values",
            "rung_values",
            "wall_seconds",
            "gpu_seconds",
            "num_steps",
            "num_tokens",
            "num_documents",
            "flops",
            "precision",
            "effective_spans",
        )
        fresh |= {name: before[name] for name in kept}
        for name in ("target_values", "rung_values"):
            fresh[name] = json.loads(before[name] or "[]")
    return fresh


def describe_precision(trained: Stage, evaluated: Sequence[Stage]) -> str:
    """What a rung's products were computed in; where stages of the two differ, each is named."""
    kinds = {"pretrain": [trained], "evaluate": [stage for stage in evaluated if stage.kind == "evaluate"]}
    found = {kind: sorted({stage.info["precision"] for stage in stages} - {None}) for kind, stages in kinds.items()}
    names = {kind: "/".join(precisions) for kind, precisions in found.items() if precisions}
    return next(iter(names.values())) if len(set(names.values())) == 1 else ", ".join(map(" ".join, names.items()))


def describe_device() -> str:
    """What the trial runs on."""
    return torch.cuda.get_device_name() if choose_device().type == "cuda" else "cpu"


@functools.cache
def describe_code() -> str:
    """Versions that decide the numbers: raylab (and its commit, in a checkout), torch, transformers."""
    folder = Path(raylab.__file__).parent
    commit = ""
    if (folder.parent / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        # A machine may hold a checkout and no git.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = "+" + subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    names = ("transformers", "tokenizers", "scikit-learn")
    versions = [f"{name} {metadata.version(name)}" for name in names]
    return ", ".join([f"raylab {raylab.__version__}{commit}", f"torch {torch.__version__}", *versions])


def set_threads(cpus: int) -> None:
    """As many threads as the trial has CPUs: two trials on two cores don't fight, and sums keep their order."""
    torch.set_num_threads(cpus)
    # BLAS and OpenMP of NumPy, SciPy and scikit-learn: all loaded by now, and a trial loads no more.
    threadpool_limits(cpus)
    pa.set_cpu_count(cpus)
