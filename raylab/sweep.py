"""A job's sweep: Ray Tune runs the trials that the search asks for; `here` runs them one by one without Ray."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raylab.baselines import score_baselines
from raylab.jobs import dump_yaml
from raylab.mistakes import JobError
from raylab.preparation import Preparation, make_spec, name_point, prepare
from raylab.progress import SweepProgress
from raylab.search import Request, Search, read_targets
from raylab.settings import dump_spec
from raylab.specs import Job, TrialSpec
from raylab.tables import now, read_trial, write_rows

# Ray reads these when it is imported. Quiet; no local token file; only one trial waits beside those that run, so that
# a sampler is not asked for arms long before they start.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class Interrupted(Exception):  # noqa: N818 - a user's wish, not an error
    """Ctrl-C: what is recorded stays, resume goes on."""


def run_job(
    job: Job, results: Path, progress: SweepProgress, *, address: str | None = None, here: bool = False
) -> dict[str, int]:
    """Runs what is missing of a job and returns its trials by state. Raises JobError before any worker starts.

    `address` names a running Ray cluster; `here` runs every trial in this process, for a debugger.
    """
    preparation = prepare(job, results, progress.tell)
    name_point(preparation, {})  # the base arm must be able to run: said before anything is written
    folder = results / job.name
    with _only_driver(folder, job.name):
        (folder / "job.yaml").write_text(dump_yaml(job))
        seeds = [*job.search.seeds, *(job.search.confirm.seeds if job.search.confirm else ())]
        for index, seed in enumerate(seeds):
            score_baselines(results, job, preparation.split(seed), seed)
            progress.tell("baselines", index + 1, len(seeds))
        search = Search(job, results, lambda values: name_point(preparation, values)[0])
        (_run_here if here else _run_tune)(job, preparation, search, progress, address)
        for note in dict.fromkeys(search.notes):
            progress.note(note)
    return dict(progress.states)


@contextlib.contextmanager
def _only_driver(folder: Path, name: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".driver.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise JobError([f"job {name} is being run by another process; wait for it, or stop that one first"]) from None
    except OSError as error:
        raise JobError([f"--results {folder.parent}: {error.strerror}; choose a folder that can be written"]) from None
    try:
        yield
    finally:
        lock.release()


def start_trial(preparation: Preparation, request: Request) -> TrialSpec | None:
    """The spec of a requested trial, or None where its row says that it can't work."""
    try:
        return make_spec(preparation, request.values, request.seed, request.phase)
    except JobError as error:
        row = {
            "arm": request.arm, "phase": request.phase, "seed": request.seed, "status": "infeasible", "rung": 0,
            "error": error.problems[0], "attempts": 1, "started_at": now(), "updated_at": now(),
        }  # fmt: skip
        name = f"{request.arm}-{request.seed}"
        write_rows(preparation.results, preparation.job.name, "trials", name, [row])
        return None


def finish_trial(
    preparation: Preparation, search: Search, progress: SweepProgress, trial_id: str, failed: bool
) -> None:
    """Takes a trial's row from the tables, the record, into the search and the display."""
    results, job = preparation.results, preparation.job
    row = read_trial(results, job.name, trial_id)
    request = search.running[trial_id]
    if row is None or (failed and row["status"] == "running"):
        lost = {"arm": request.arm, "phase": request.phase, "seed": request.seed, "rung": 0, "started_at": now()}
        row = {
            **lost,
            **(row or {}),
            "trial_id": trial_id,
            "status": "failed",
            "error": "its process died; resume runs it again",
        }
        row["updated_at"] = now()
        write_rows(results, job.name, "trials", trial_id, [row])
    search.finish(trial_id, row)
    values = read_targets(row)
    progress.finish_trial(row, values[0] if values else None, search.sign, search.num_planned)


def _run_here(job: Job, preparation: Preparation, search: Search, progress: SweepProgress, address: str | None) -> None:
    from raylab.judge import decide
    from raylab.trial import run_trial

    while True:
        try:
            request = search.next_request()
        except StopIteration:
            return
        assert request is not None, "nothing runs beside this process"
        spec = start_trial(preparation, request)
        progress.start_trial(f"{request.arm}-{request.seed}")
        failed = False
        if spec is not None:
            try:
                run_trial(spec, decide=decide)
            except Exception:
                failed = True
        finish_trial(preparation, search, progress, f"{request.arm}-{request.seed}", failed)


def _run_tune(job: Job, preparation: Preparation, search: Search, progress: SweepProgress, address: str | None) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import tune
    from ray.tune.search import Searcher

    from raylab.workers import trial_resources, tune_trial

    class ArmSearcher(Searcher):
        """Gives Tune the trials that the search asks for."""

        def __init__(self) -> None:
            super().__init__(metric="rung", mode="max")
            self.names: dict[str, str] = {}

        def suggest(self, trial_id: str) -> Any:
            while True:
                try:
                    request = search.next_request()
                except StopIteration:
                    return Searcher.FINISHED
                if request is None:
                    return None
                name = f"{request.arm}-{request.seed}"
                progress.start_trial(name)
                spec = start_trial(preparation, request)
                if spec is not None:
                    self.names[trial_id] = name
                    return {"spec": dump_spec(spec)}
                finish_trial(preparation, search, progress, name, False)

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            name = self.names.pop(trial_id, None)
            if name is not None:
                finish_trial(preparation, search, progress, name, error or not result)

        def on_trial_result(self, trial_id: str, result: Any) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass  # the tables are the record

        def restore(self, checkpoint_path: str) -> None:
            pass

    scratch = tempfile.mkdtemp(prefix="raylab-tune-")
    started = not ray.is_initialized()
    if started:
        _start_ray(ray, address)
    resources, slots = trial_resources(job)
    interrupted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    try:
        tuner = tune.Tuner(
            tune.with_resources(tune_trial, resources),
            tune_config=tune.TuneConfig(
                search_alg=ArmSearcher(),
                num_samples=-1,
                max_concurrent_trials=min(job.resources.max_concurrent_trials or slots, slots),
                reuse_actors=job.resources.workers == 1,
            ),
            run_config=tune.RunConfig(
                name=job.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[_watch_interrupts(tune, interrupted)],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tuner.fit()
    finally:
        signal.signal(signal.SIGINT, before)
        if started:
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    if interrupted or search.running:
        raise Interrupted


def _watch_interrupts(tune: Any, interrupted: list[int]) -> Any:
    class Watch(tune.Callback):  # type: ignore[misc, name-defined]
        """Notes that Tune's own handler was asked to stop; Tune then ends its trials and returns."""

        def setup(self, *arguments: Any, **named: Any) -> None:
            inner = signal.getsignal(signal.SIGINT)

            def handle(number: int, frame: Any) -> None:
                interrupted.append(number)
                if callable(inner):
                    inner(number, frame)

            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, handle)

    return Watch()


def _start_ray(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
    if address is None:
        ray.init(include_dashboard=False, num_cpus=os.cpu_count(), **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(
            [f"--address {address}: no Ray cluster answers ({type(error).__name__}); start it or correct it"]
        ) from None
