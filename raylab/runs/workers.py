"""Where trials run: in a Tune actor, or, with several workers, under Ray Train with DistributedDataParallel."""

import errno
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylab.base.imports import quick_imports

# They are the first seconds of a trial's process.
with quick_imports():
    import ray
    import torch.distributed as dist
    from ray import train, tune
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from raylab.base.memory import share_memory
    from raylab.base.mistakes import (
        BusyError,
        JobError,
        RemoteError,
        SupersededError,
        describe_error,
        find_storage_problem,
        list_causes,
    )  # fmt: skip
    from raylab.base.world import World
    from raylab.job.settings import dump_spec
    from raylab.job.specs import Job, TrialSpec
    from raylab.results.tables import pull_trial
    from raylab.runs.trial import run_trial, set_threads
    from raylab.search.judge import decide
    from raylab.store.stages import FOLDER, open_stage
    from raylab.store.storage import is_mirror, lend_folder, name_results, open_results

# A trial of several workers holds next to nothing itself: its workers are reserved by Ray Train.
COORDINATOR_CPUS = 0.01


def gpus_per_worker(job: Job) -> float:
    """What the job says, or 1 where the cluster has GPUs."""
    wanted = job.resources.gpus_per_worker
    return wanted if wanted is not None else float(ray.cluster_resources().get("GPU", 0) >= 1)


def count_slots(job: Job, gpus: float) -> int:
    """How many trials fit on the nodes as they are now, with `gpus` for each worker."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(count_workers(node, job.resources.cpus_per_worker, gpus) for node in nodes) // job.resources.workers


def count_workers(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """How many workers fit on a node with such resources: all of one on the node, of a part of a GPU on one GPU."""
    fit = int(node.get("CPU", 0) / cpus)
    # Ray counts in ten thousandths.
    return min(fit, int(node.get("GPU", 0)) * int(1 / gpus + 1e-3)) if gpus else fit


def check_fit(job: Job) -> None:
    """Raises JobError where no trial fits on the cluster."""
    gpus = gpus_per_worker(job)
    if count_slots(job, gpus) < 1:
        cluster = ray.cluster_resources()
        has = f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs"
        raise JobError(
            [
                f"resources: {job.resources.workers} worker(s) of {job.resources.cpus_per_worker} CPUs and "
                f"{gpus:g} GPUs, each on one node, don't fit on this cluster of {has}; ask for less"
            ]
        )


def trial_resources(job: Job) -> dict[str, float]:
    """What Tune reserves for a trial."""
    if job.resources.workers > 1:
        return {"CPU": COORDINATOR_CPUS}
    return {"CPU": job.resources.cpus_per_worker, "GPU": gpus_per_worker(job)}


def pack_spec(spec: TrialSpec) -> str:
    """A trial's spec as it travels: results that mirror a URL are named by it, since every node has its own mirror."""
    where, path = name_results(Path(spec.results)), spec.encoder_path
    if path is not None and Path(path).is_relative_to(spec.results):
        path = f"{where}/{Path(path).relative_to(spec.results)}"
    return dump_spec(spec.model_copy(update={"results": where, "encoder_path": path}))


def unpack_spec(text: str) -> TrialSpec:
    """The spec on this node: of results at a URL, the mirror is opened, and what the trial goes on from is fetched.

    Raises RemoteError where the URL can't be read from here.
    """
    spec = TrialSpec.model_validate_json(text)
    try:
        results = open_results(spec.results)
    except JobError as error:
        raise RemoteError(errno.EIO, f"{socket.gethostname()}: {error.problems[0]}") from None
    if not is_mirror(results):
        return spec
    pull_trial(results, spec.job, spec.trial_id)
    path, needed = spec.encoder_path, dict.fromkeys([spec.corpus, spec.tokenizer, *spec.tokens.values()])
    if path is not None and path.startswith(f"{spec.results}/"):
        path = str(results / path.removeprefix(f"{spec.results}/"))
        needed[Path(path).parent.name] = Path(path).name
    for stage_id, file in needed.items():
        if open_stage(results, stage_id, file) is None:
            raise RemoteError(errno.EIO, f"{spec.results}: {FOLDER}/{stage_id} is gone or damaged")
    return spec.model_copy(update={"results": str(results), "encoder_path": path})


def tune_trial(config: dict[str, Any]) -> None:
    """Tune's trainable: one trial from its spec. Reports its end; an error of its code is raised."""
    end = "done"
    try:
        spec = unpack_spec(config["spec"])
        share_memory(gpus_per_worker(spec.settings))
        if spec.settings.resources.workers > 1:
            _train_with_workers(spec)
        else:
            set_threads(spec.settings.resources.cpus_per_worker)
            run_trial(spec, decide=decide)
    except Exception as error:
        causes = {type(cause).__name__ for cause in list_causes(error)}
        problem = find_storage_problem(error)
        if "BusyError" in causes:
            end = "waiting"
        elif "SupersededError" in causes:
            end = "superseded"
        elif problem is not None:
            end = problem
        else:
            # Its row says more. Ray writes errors into logs, and the message could quote a text.
            raise RuntimeError(describe_error(error)) from None
    tune.report({"rung": 1, "end": end})


def _train_with_workers(spec: TrialSpec) -> None:
    resources = spec.settings.resources
    gpus = gpus_per_worker(spec.settings)
    per_worker = {"CPU": resources.cpus_per_worker - COORDINATOR_CPUS} | ({"GPU": gpus} if gpus else {})
    # Ray Train wants a place that all nodes see for checkpoints; it is given none, and nothing is left behind.
    with lend_folder(Path(spec.results), ".train-") as (scratch, filesystem):
        TorchTrainer(
            train_worker,
            train_loop_config={"spec": pack_spec(spec)},
            scaling_config=ScalingConfig(
                num_workers=resources.workers, use_gpu=gpus > 0, resources_per_worker=per_worker
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=7200),
            run_config=RunConfig(
                storage_path=scratch, storage_filesystem=filesystem, failure_config=FailureConfig(max_failures=0)
            ),
        ).fit()


def train_worker(config: dict[str, Any]) -> None:
    """One of a trial's workers; all of them run the same trial, rank 0 evaluates and writes."""
    spec = unpack_spec(config["spec"])
    share_memory(gpus_per_worker(spec.settings))
    set_threads(spec.settings.resources.cpus_per_worker)
    context = train.get_context()

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    try:
        run_trial(spec, decide=decide, world=World(context.get_world_rank(), context.get_world_size(), broadcast))
    except Exception as error:
        if isinstance(error, BusyError | SupersededError) or find_storage_problem(error):
            raise
        # As in `tune_trial`.
        raise RuntimeError(describe_error(error)) from None
