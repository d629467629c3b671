"""A job's sweep: Ray Tune runs the trials that the search asks for; `here` runs them one by one without Ray."""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from raylab.base.identity import name_trial
from raylab.base.memory import share_memory
from raylab.base.mistakes import BusyError, InfeasibleError, Interrupted, JobError, find_storage_problem
from raylab.data.corpus import SplitCorpus
from raylab.evaluation.baselines import score_baselines
from raylab.job.blocks import PARTS
from raylab.job.jobs import dump_yaml
from raylab.job.specs import Job
from raylab.results.compaction import MANY, compact_job
from raylab.results.queries import open_tables
from raylab.results.repair import repair_job
from raylab.results.tables import now, write_rows
from raylab.runs.checkpoints import note_disk, prune_checkpoints
from raylab.runs.hygiene import check_corpus, keep_hygiene
from raylab.runs.preparation import Preparation, make_spec, name_point, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.schedule import LOOK_SECONDS, Schedule
from raylab.runs.trial import run_trial, set_threads
from raylab.search.judge import decide
from raylab.search.search import Request, Search, list_refused
from raylab.store.driver import claim_job, read_stop, request_stop
from raylab.store.logs import open_log
from raylab.store.storage import publish, pull, remove
from raylab.training.pretrain import make_units, open_data

# Ray reads these when it is imported. Quiet; no local token file; only one trial waits beside those that run, so that
# a sampler is not asked for arms long before they start.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Snapshots that nothing here reads.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class Ended(NamedTuple):
    """How a sweep ended: its trials by state; why it ended early, if it did; and whether that is as the job asked."""

    states: dict[str, int]
    why: str | None
    by_limit: bool


def run_job(
    job: Job,
    results: Path,
    progress: SweepProgress,
    *,
    address: str | None = None,
    here: bool = False,
    tell_lost: Callable[[str], None] = print,
) -> Ended:
    """Runs what is missing of a job. Raises JobError before any worker starts, Interrupted on a stop at once.

    `address` names a running Ray cluster; `here` runs every trial in this process, for a debugger. Where Ray dies,
    `tell_lost` is told why, from another thread, and the process ends with code 1.
    """
    with _on_sigterm(_interrupt):
        return _run_job(job, results, progress, address, here, tell_lost)


def _run_job(
    job: Job,
    results: Path,
    progress: SweepProgress,
    address: str | None,
    here: bool,
    tell_lost: Callable[[str], None],
) -> Ended:
    if here:
        wanted = job.resources.gpus_per_worker
        share_memory(1.0 if wanted is None else wanted)  # before anything looks for a GPU
    preparation = prepare(job, results, progress.tell)
    name_point(preparation, {})  # the base arm must be able to run
    seeds = [*job.search.seeds, *(job.search.confirm.seeds if job.search.confirm else ())]
    splits = {seed: preparation.split(seed) for seed in seeds}
    claim = claim_job(results, job.name, tell=progress.note)
    with _session(job, address, here, progress, tell_lost), claim as token:
        pull(results, job.name)
        progress.log_to(open_log(results, job.name, own=True))
        with _kept_job(results, job):
            _check_base(preparation)
        # The ranking needs DuckDB: a driver that has the memory at the start has it at the end of days.
        open_tables(results, "").close()
        for line in (*repair_job(results, job.name), *_describe_left_out(splits[seeds[0]])):
            progress.note(line)
        memory: dict[Any, Any] = {}
        for index, seed in enumerate(seeds):
            score_baselines(results, job, splits[seed], seed, memory=memory)
            progress.tell("baselines", index + 1, len(seeds))
        base = make_spec(preparation, {}, seeds[0], "fixed")
        keep_hygiene(results, job.name, check_corpus(preparation, base))
        search = Search(
            job,
            results,
            lambda values: name_point(preparation, values)[0],
            record=lambda request, error: _record_refused(job, results, request, error),
        )
        schedule = Schedule(preparation, search, progress, token)
        schedule.tell_kept()
        # As a cluster sends it before it kills: what `raylab stop` does; a second one stops at once.
        stop = functools.partial(_ask_to_stop, results, job.name)
        with _on_sigterm(stop):
            if here:
                _run_here(schedule)
            else:
                _run_tune(schedule)
        for note in dict.fromkeys(search.notes):
            progress.note(note)
        if schedule.why is None:
            prune_checkpoints(results, job)
        if not schedule.storage_failed:
            # What can't be packed now can be later: nothing of it is lost.
            with contextlib.suppress(OSError, JobError):
                if packed := sum(compact_job(results, job.name, MANY).values()):
                    progress.note(f"{packed:,} small files of the tables are packed")
            note_disk(results, job.name)
    return Ended(dict(progress.states), schedule.why, schedule.by_limit)


@contextlib.contextmanager
def _session(
    job: Job, address: str | None, here: bool, progress: SweepProgress, tell_lost: Callable[[str], None]
) -> Iterator[None]:
    """Ray for the time of the sweep, first of all: no work is done for a cluster that does not answer."""
    if here:
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray reads the environment when it is imported.
    from raylab.runs.tuning import ray_session

    with ray_session(job, address, tell_lost) as read_usage:
        progress.gauge = read_usage
        try:
            yield
        finally:
            progress.gauge = None


@contextlib.contextmanager
def _on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: act())
    except ValueError:  # no signal arrives outside the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt() -> None:
    raise Interrupted


def _ask_to_stop(results: Path, name: str) -> None:
    request_stop(results, name, now=read_stop(results, name) is not None)


def _check_base(preparation: Preparation) -> None:
    """Refuses a job whose base arm no document is long enough for."""
    job = preparation.job
    spec = make_spec(preparation, {}, job.search.seeds[0], "fixed")
    if job.pretrain.objective != "none":
        try:
            make_units(spec, open_data(spec))
        except InfeasibleError as error:
            raise JobError([str(error)]) from None


@contextlib.contextmanager
def _kept_job(results: Path, job: Job) -> Iterator[None]:
    """Keeps the job file from here on, so that `stop` and `resume` know it; as it was before where it is refused."""
    path = results / job.name / "job.yaml"
    before = path.read_text() if path.is_file() else None
    scratch = path.with_name(".job.yaml")

    def keep(text: str) -> None:
        scratch.write_text(text)
        publish(results, scratch, path)

    keep(dump_yaml(job))
    try:
        yield
    except JobError:
        if before is None:
            remove(results, path)
        else:
            keep(before)
        raise


def _record_refused(job: Job, results: Path, request: Request, error: str) -> None:
    """Writes the row of a point of the space that can't be an arm."""
    row = {
        **list_refused(job, request.values),
        "arm": request.arm,
        "phase": request.phase,
        "seed": request.seed,
        "status": "infeasible",
        "rung": 0,
        "attempts": 0,
        "error": error,
        "started_at": now(),
        "updated_at": now(),
    }
    write_rows(results, job.name, "trials", name_trial(request.arm, request.seed), [row])


def _describe_left_out(split: SplitCorpus) -> Iterator[str]:
    """A line a table of which rows were left out: counts, never text."""
    for name, counts in split.counts.items():
        left_out = {k: v for k, v in counts.items() if v and k not in ("rows", "rows_read", *PARTS)}
        if left_out:
            yield f"{name}: {counts['rows_read']} rows read; " + ", ".join(f"{v} {k}" for k, v in left_out.items())


def _run_here(schedule: Schedule) -> None:
    """Every trial in this process, one after another; an error in one is raised, for the debugger."""
    set_threads(schedule.preparation.job.resources.cpus_per_worker)
    while True:
        try:
            spec = schedule.next_trial()
        except StopIteration:
            return
        if spec is None:  # another job trains what all that is left needs
            time.sleep(LOOK_SECONDS)
            continue
        try:
            run_trial(spec, decide=decide)
            schedule.finish_trial(spec.trial_id, "done")
        except BusyError:
            schedule.finish_trial(spec.trial_id, "waiting")
        except Exception as error:
            problem = find_storage_problem(error)
            if problem is None:
                raise
            schedule.finish_trial(spec.trial_id, problem)


def _run_tune(schedule: Schedule) -> None:
    """Every trial on the Ray of the session."""
    from raylab.runs.tuning import run_tune

    run_tune(schedule.preparation.job, schedule)
