"""A job's sweep: Ray Tune runs the trials that the search asks for; `here` runs them one by one without Ray."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raylab.baselines import score_baselines
from raylab.blocks import PARTS
from raylab.corpus import SplitCorpus
from raylab.identity import name_trial
from raylab.jobs import dump_yaml
from raylab.judge import decide
from raylab.mistakes import InfeasibleError, JobError
from raylab.preparation import Preparation, make_spec, name_point, prepare
from raylab.pretrain import make_units, open_data
from raylab.progress import SweepProgress
from raylab.search import Request, Search, list_refused, read_targets
from raylab.settings import list_settings, with_settings
from raylab.specs import Job, TrialSpec
from raylab.tables import now, read_trial, write_rows
from raylab.trial import run_trial, set_threads

# Ray reads these when it is imported. Quiet; no local token file; only one trial waits beside those that run, so that
# a sampler is not asked for arms long before they start.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def run_job(
    job: Job, results: Path, progress: SweepProgress, *, address: str | None = None, here: bool = False
) -> dict[str, int]:
    """Runs what is missing of a job and returns its trials by state. Raises JobError before any worker starts.

    `address` names a running Ray cluster; `here` runs every trial in this process, for a debugger.
    """
    preparation = prepare(job, results, progress.tell)
    name_point(preparation, {})  # the base arm must be able to run
    seeds = [*job.search.seeds, *(job.search.confirm.seeds if job.search.confirm else ())]
    splits = {seed: preparation.split(seed) for seed in seeds}
    with _session(job, address, here), _only_driver(results / job.name, job.name):
        _check_base(preparation)
        _keep_job(results / job.name / "job.yaml", job)
        for line in _describe_left_out(splits[seeds[0]]):
            progress.note(line)
        memory: dict[Any, Any] = {}
        for index, seed in enumerate(seeds):
            score_baselines(results, job, splits[seed], seed, memory=memory)
            progress.tell("baselines", index + 1, len(seeds))
        search = Search(
            job,
            results,
            lambda values: name_point(preparation, values)[0],
            record=lambda request, error: _record_refused(job, results, request, error),
        )
        sweep = Sweep(preparation, search, progress)
        if here:
            _run_here(sweep)
        else:
            _run_tune(sweep)
        for note in dict.fromkeys(search.notes):
            progress.note(note)
    return dict(progress.states)


@contextlib.contextmanager
def _session(job: Job, address: str | None, here: bool) -> Iterator[None]:
    """Ray for the time of the sweep, first of all: no work is done for a cluster that does not answer."""
    if here:
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray reads the environment when it is imported.
    from raylab.tuning import ray_session

    with ray_session(job, address):
        yield


def _check_base(preparation: Preparation) -> None:
    """Refuses a job whose base arm no document is long enough for."""
    job = preparation.job
    spec = make_spec(preparation, {}, job.search.seeds[0], "fixed")
    if job.pretrain.objective != "none":
        try:
            make_units(spec, open_data(spec))
        except InfeasibleError as error:
            raise JobError([str(error)]) from None


def _keep_job(path: Path, job: Job) -> None:
    scratch = path.with_name(".job.yaml")
    scratch.write_text(dump_yaml(job))
    os.replace(scratch, path)


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


@dataclass
class Sweep:
    """A job under way: where trials come from and where their rows go, whoever runs them."""

    preparation: Preparation
    search: Search
    progress: SweepProgress
    noted: set[str] = field(default_factory=set)

    def next_trial(self) -> TrialSpec | None:
        """The next trial; None while only running ones can bring more. Raises StopIteration at the end.

        A trial that can't work (an encoder that is gone) is recorded as infeasible and passed over.
        """
        while True:
            request = self.search.next_request()
            if request is None:
                return None
            trial_id = name_trial(request.arm, request.seed)
            self.progress.start_trial(trial_id)
            try:
                spec = make_spec(self.preparation, request.values, request.seed, request.phase)
                while self.preparation.notes:
                    note = self.preparation.notes.pop(0)
                    if note not in self.noted:
                        self.noted.add(note)
                        self.progress.note(note)
                return spec
            except JobError as error:
                self._record(trial_id, "infeasible", error.problems[0])
                self.finish_trial(trial_id, failed=False)

    def finish_trial(self, trial_id: str, *, failed: bool) -> None:
        """Takes a trial's row from the tables, which are the record, into the search and the display."""
        row = read_trial(self.preparation.results, self.preparation.job.name, trial_id)
        if row is None or (failed and row["status"] == "running"):
            row = self._record(trial_id, "failed", "its process died; 'raylab resume' runs it again")
        self.search.finish(trial_id, row)
        values = read_targets(row)
        self.progress.finish_trial(row, values[0] if values else None, self.search.sign, self.search.num_planned)

    def _record(self, trial_id: str, status: str, error: str) -> dict[str, Any]:
        """Writes what became of a trial that could not do it itself."""
        results, job, request = self.preparation.results, self.preparation.job, self.search.running[trial_id]
        known = read_trial(results, job.name, trial_id) or {
            **list_settings(with_settings(job, request.values)),
            "arm": request.arm,
            "phase": request.phase,
            "seed": request.seed,
            "rung": 0,
            "attempts": 1,
            "started_at": now(),
        }
        row = known | {"trial_id": trial_id, "status": status, "error": error, "updated_at": now()}
        write_rows(results, job.name, "trials", trial_id, [row])
        return row


def _run_here(sweep: Sweep) -> None:
    """Every trial in this process, one after another; an error in one is raised, for the debugger."""
    set_threads(sweep.preparation.job.resources.cpus_per_worker)
    while True:
        try:
            spec = sweep.next_trial()
        except StopIteration:
            return
        assert spec is not None, "nothing runs beside this process"
        run_trial(spec, decide=decide)
        sweep.finish_trial(spec.trial_id, failed=False)


def _run_tune(sweep: Sweep) -> None:
    """Every trial on the Ray of the session."""
    from raylab.tuning import run_tune

    run_tune(sweep.preparation.job, sweep.next_trial, sweep.finish_trial)
