"""A job under way: which trial starts next, what becomes of one that ended, and when no more may start."""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from raylab.base.identity import name_trial
from raylab.base.mistakes import DamagedError, Interrupted, JobError, find_storage_problem
from raylab.job.settings import label_values, list_settings, with_settings
from raylab.job.specs import TrialSpec
from raylab.results.tables import list_trials, now, pull_trial, read_trial, write_rows
from raylab.runs.checkpoints import note_disk
from raylab.runs.preparation import Preparation, make_spec
from raylab.runs.progress import SweepProgress
from raylab.search.search import Request, Search, is_current, read_targets, read_values
from raylab.store.driver import has_lost, read_stop, request_stop
from raylab.store.stages import is_building, peek_stage
from raylab.training.rungs import list_rungs

# How often a trial's process may die without a new rung in between, and how often its code may fail.
MOST_DEATHS = 3
MOST_CRASHES = 2
# How often a driver looks for a request to stop, and how often it measures the disk; seconds.
LOOK_SECONDS = 1
DISK_SECONDS = 60


class Prepared(NamedTuple):
    """A trial that could start, and the stages of its pre-training's rungs."""

    spec: TrialSpec
    rungs: tuple[str, ...]


class Running(NamedTuple):
    """A trial that was handed out: the stages of its pre-training's rungs, and when it was."""

    rungs: tuple[str, ...]
    since: float


@dataclass
class Schedule:
    """A job under way: where trials come from and where their rows go, whoever runs them."""

    preparation: Preparation
    search: Search
    progress: SweepProgress
    token: str
    why: str | None = None
    by_limit: bool = False
    storage_failed: bool = False
    noted: set[str] = field(default_factory=set)
    running: dict[str, Running] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    others: dict[str, tuple[float, bool]] = field(default_factory=dict)
    deaths: dict[str, tuple[int, int]] = field(default_factory=dict)
    crashes: dict[str, int] = field(default_factory=dict)
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    gpus: float = 0.0
    looked: float = float("-inf")
    measured: float = float("-inf")

    def __post_init__(self) -> None:
        resources = self.preparation.job.resources
        self.gpus = (resources.gpus_per_worker or 0.0) * resources.workers
        for row in list_trials(self.results, self.name):
            self.gpu_seconds[row["trial_id"]] = row["gpu_seconds"] or 0.0

    def tell_kept(self) -> None:
        """What the tables hold of this job already goes into the display."""
        progress, job = self.progress, self.preparation.job
        progress.targets = [
            " ".join(filter(None, (target.task, target.metric, target.class_name))) for target in job.search.targets
        ]
        progress.planned = self.search.num_planned
        for row in self.search.done.values():
            if is_current(job, row, self.search.name_point):
                progress.keep_trial(row, read_targets(row), self.search.signs, label_values(read_values(job, row)))

    @property
    def results(self) -> Path:
        """The results folder."""
        return self.preparation.results

    @property
    def name(self) -> str:
        """The job's name."""
        return self.preparation.job.name

    def next_trial(self) -> TrialSpec | None:
        """The next trial; None while only running ones, or other jobs, can bring more. Raises StopIteration at the end.

        Trials that share a pre-training run one after another, so that none holds a GPU to wait. A trial that can't
        start (an encoder that is gone) is recorded as failed and passed over.
        """
        while True:
            self.look()
            if self.why is not None:
                raise StopIteration
            request = self.search.next_request(self._is_held)
            if request is None:
                return None
            trial_id = name_trial(request.arm, request.seed)
            self.progress.start_trial(trial_id)
            try:
                try:
                    ready = self._prepare(request)
                except JobError as error:
                    # Not infeasible: nothing is wrong with the arm, and what is missing may be there at a resume.
                    self._record(trial_id, "failed", error.problems[0])
                    self._take(trial_id)
                    continue
            except OSError as error:
                self._halt_for_storage(error)
                self._retry(trial_id, "the results can't be written")
                continue
            del self.prepared[trial_id]
            self.others.clear()
            self.running[trial_id] = Running(ready.rungs, time.monotonic())
            return ready.spec

    def _prepare(self, request: Request) -> Prepared:
        trial_id = name_trial(request.arm, request.seed)
        if trial_id not in self.prepared:
            spec = make_spec(self.preparation, request.values, request.seed, request.phase)
            spec = spec.model_copy(update={"driver": self.token})
            self.prepared[trial_id] = Prepared(spec, tuple(link.stage_id for link in list_rungs(spec)[1:]))
            while self.preparation.notes:
                self.note(self.preparation.notes.pop(0))
        return self.prepared[trial_id]

    def _is_held(self, request: Request) -> bool:
        """Whether a trial must wait for a pre-training that another one, of this job or of another, is doing."""
        try:
            rungs = self._prepare(request).rungs
            if not rungs:
                return False
            looked, held = self.others.get(rungs[-1], (float("-inf"), False))
            if time.monotonic() - looked > LOOK_SECONDS:
                if any(rungs == other.rungs for other in self.running.values()):
                    held = peek_stage(self.results, rungs[-1]) is None
                else:
                    held = any(is_building(self.results, stage_id) for stage_id in rungs)
                self.others[rungs[-1]] = (time.monotonic(), held)
        except (JobError, OSError):
            return False  # told when the trial is to start
        return held

    def finish_trial(self, trial_id: str, end: str) -> None:
        """Takes the end of a trial: `done` (its row says how), `waiting`, `died` or `crashed`, or why files fail.

        A trial whose process died goes on from its last rung, one whose code failed is tried once more; the tables are
        the record. One that can't write ends the sweep: it is no fault of the trial.
        """
        self.running.pop(trial_id, None)
        self.others.clear()
        try:
            pull_trial(self.results, self.name, trial_id)
            row = read_trial(self.results, self.name, trial_id)
            if row is not None:
                self.gpu_seconds[trial_id] = row["gpu_seconds"] or 0.0
            if end == "waiting":
                self._retry(trial_id, "another process trains what it needs")
            elif end == "superseded":
                raise Interrupted
            elif end not in ("done", "died"):
                self._halt(f"the results can't be written ({end}); mend that")
                self.storage_failed = True
                self._retry(trial_id, end)
            elif end == "died" and self._may_try_again(trial_id, row):
                self._retry(trial_id, "its process died" if row is None or row["error"] is None else row["error"])
            elif end == "done" and (row is None or row["status"] == "running"):
                self.looked = float("-inf")  # it saw a request to stop that this process may not have seen yet
                self._retry(trial_id, "stopped after its rung")
            else:
                if row is None or row["status"] == "running":
                    self._record(
                        trial_id, "failed", f"its process died {MOST_DEATHS} times without a new rung; out of memory?"
                    )
                self._take(trial_id)
        except OSError as error:
            self._halt_for_storage(error)
        except DamagedError as error:
            self._halt(f"{error}; 'raylab resume {self.name}' makes it again")
            self._retry(trial_id, "its row is damaged")

    def _may_try_again(self, trial_id: str, row: dict[str, Any] | None) -> bool:
        if row is not None and row["status"] == "failed":
            self.crashes[trial_id] = self.crashes.get(trial_id, 0) + 1
            return self.crashes[trial_id] < MOST_CRASHES
        rung = row["rung"] if row else 0
        before, count = self.deaths.get(trial_id, (rung, 0))
        self.deaths[trial_id] = (rung, count + 1 if rung == before else 1)
        return self.deaths[trial_id][1] < MOST_DEATHS

    def _retry(self, trial_id: str, why: str) -> None:
        self.search.retry(trial_id)
        self.progress.retry_trial(trial_id, why)

    def _take(self, trial_id: str) -> None:
        """A trial's last row goes into the search and the display."""
        row = read_trial(self.results, self.name, trial_id)
        assert row is not None
        label = label_values(self.search.running[trial_id].values)
        self.search.finish(trial_id, row)
        self.progress.finish_trial(row, read_targets(row), self.search.signs, self.search.num_planned, label)

    def _record(self, trial_id: str, status: str, error: str) -> None:
        """Writes what became of a trial that could not do it itself."""
        request = self.search.running[trial_id]
        known = read_trial(self.results, self.name, trial_id) or {
            **list_settings(with_settings(self.preparation.job, request.values)),
            "arm": request.arm,
            "phase": request.phase,
            "seed": request.seed,
            "rung": 0,
            "attempts": 1,
            "started_at": now(),
        }
        row = known | {"trial_id": trial_id, "status": status, "error": error, "updated_at": now()}
        write_rows(self.results, self.name, "trials", trial_id, [row])

    def note(self, line: str) -> None:
        """A line about the sweep, told once."""
        if line not in self.noted:
            self.noted.add(line)
            self.progress.note(line)

    def look(self) -> None:
        """Ends the sweep where it was asked to stop or has reached a limit. Raises Interrupted for a stop at once."""
        clock = time.monotonic()
        if clock - self.looked < LOOK_SECONDS:
            return
        self.looked = clock
        if has_lost(self.token):
            raise Interrupted
        stop = read_stop(self.results, self.name)
        if stop == "now":
            raise Interrupted
        if self.why is not None:
            return
        if stop == "rung":
            self._halt("it was asked to stop")
            return
        limits = self.preparation.job.limits
        if limits.hours is not None and clock - self.started > limits.hours * 3600:
            self._halt(f"limits.hours: {limits.hours:g} reached", by_limit=True)
        spent = (sum(self.gpu_seconds.values()) + self._running_gpu_seconds(clock)) / 3600
        if limits.gpu_hours is not None and spent > limits.gpu_hours:
            self._halt(f"limits.gpu_hours: {spent:.2f} of {limits.gpu_hours:g} used", by_limit=True)
        if limits.disk_gb is not None and clock - self.measured > DISK_SECONDS:
            self.measured = clock
            try:
                disk = note_disk(self.results, self.name)
            except (OSError, DamagedError) as error:
                self.note(f"limits.disk_gb: the disk can't be measured now ({type(error).__name__})")
                return
            used = (disk["tables_bytes"] + disk["stages_bytes"]) / 1e9
            if used > limits.disk_gb:
                self._halt(f"limits.disk_gb: {used:.2f} of {limits.disk_gb:g} used", by_limit=True)

    def _running_gpu_seconds(self, clock: float) -> float:
        return self.gpus * sum(clock - other.since for other in self.running.values())

    def _halt(self, why: str, *, by_limit: bool = False) -> None:
        """No trial starts any more, and those that run end after their rung."""
        self.why, self.by_limit = why, by_limit
        self.note(f"{why}: no new trial is started, those that run end after their rung")
        with contextlib.suppress(OSError, JobError):
            request_stop(self.results, self.name, now=False)

    def _halt_for_storage(self, error: OSError) -> None:
        self._halt(f"the results can't be written ({find_storage_problem(error) or type(error).__name__}); mend that")
        self.storage_failed = True
