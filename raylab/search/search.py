"""Which trial comes next: the points of a fixed design, or one Optuna study, rebuilt from the tables, that is asked."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna

from raylab.base.identity import canonical, name_arm, name_trial
from raylab.base.mistakes import JobError
from raylab.base.noise import derive_seed
from raylab.job.designs import (
    AROUND_BASE,
    Values,
    as_setting,
    count_trials,
    is_active,
    list_changes,
    list_points,
    list_values,
    order_space,
)
from raylab.job.settings import list_measures, list_settings, with_settings
from raylab.job.specs import Choices, Confirm, Job
from raylab.results.fronts import order_best
from raylab.results.tables import list_trials, plain_value, same_measures
from raylab.search.samplers import SAMPLERS, encode_point, suggest_point

# Points in a row without a new arm that end a search; and requests that wait while a search asks for further arms.
MOST_REPEATS = 20
MOST_HELD = 4
FINISHED = ("complete", "stopped", "infeasible")


class Request(NamedTuple):
    """A trial that should run."""

    values: Values
    arm: str
    seed: int
    phase: Literal["search", "confirm", "fixed"]


@dataclass
class Arm:
    """An arm under way: its point of the study (none in a fixed design), and the targets of its finished seeds."""

    values: Values
    trial: optuna.Trial | None
    waiting: set[int]
    found: list[list[float]] = field(default_factory=list)
    # The first target's value at each rung, a list a seed.
    rung_values: list[list[float | None]] = field(default_factory=list)
    stopped_at: int | None = None
    infeasible: bool = False


def read_values(job: Job, row: Mapping[str, Any]) -> Values:
    """The searched values of a row of `trials`, as far as the space holds them; only settings that were active.

    Of the designs around the base arm, only those that are not the base's own.
    """
    values: Values = {}
    for name in order_space(job):
        entry, cell = job.search.space[name], row.get(name)
        if not is_active(job, name, values):
            continue
        if job.search.design in AROUND_BASE or isinstance(entry, Choices):
            listed = list_changes(job, name) if job.search.design in AROUND_BASE else list_values(name, entry)
            for value in listed:
                if plain_value(as_setting(name, value)) == cell:
                    values[name] = value
        elif cell is not None and entry.low <= cell <= entry.high:
            values[name] = cell
    return values


def _is_point(job: Job, values: Values) -> bool:
    """Whether some values are a whole point of the space: what the study asks for beside them would be made up."""
    if job.search.design in AROUND_BASE:
        return job.search.design == "factorial" or len(values) <= 1
    if any(is_active(job, name, values) and name not in values for name in job.search.space):
        return False
    coded = encode_point(job, values)
    given = optuna.trial.FixedTrial(coded)
    return suggest_point(given, job) == values


def is_current(job: Job, row: Mapping[str, Any], name_point: Callable[[Values], str]) -> bool:
    """Whether a row of `trials` is of an arm of this job as it is now: else of an earlier version, or of other data."""
    values = read_values(job, row)
    try:
        return (not values or _is_point(job, values)) and name_point(values) == row["arm"]
    except JobError:
        return False


def name_refused(job: Job, values: Values) -> str:
    """The name that a point which can't be an arm has in the tables: of the job's settings and the point."""
    # In the places of an arm's data and weights, which are digests: no arm can have this name.
    return name_arm(
        list_settings(job), data_digest="refused", encoder_digest=canonical(values), searched=job.search.space
    )


def list_refused(job: Job, values: Values) -> dict[str, Any]:
    """The settings of a refused point as a row of `trials` shows them: the base's, changed as they stand."""
    return list_settings(job) | {name: as_setting(name, value) for name, value in values.items()}


class Search:
    """The state of a job's search, in memory only: the tables are the record.

    `next_request()` gives a trial, None to wait for one that runs, or raises StopIteration at the end; `finish(row)`
    takes a trial's row of `trials`. `name_point(values)` gives an arm's name or raises JobError; `record(request,
    error)` is told once of each point that can't work and is not in the tables yet.
    """

    def __init__(
        self,
        job: Job,
        results: Path,
        name_point: Callable[[Values], str],
        record: Callable[[Request, str], None] = lambda request, error: None,
    ) -> None:
        self.job = job
        self.name_point = name_point
        self.record = record
        self.adaptive = job.search.design in SAMPLERS
        self.phase: Literal["search", "fixed"] = "search" if self.adaptive else "fixed"
        self.notes: list[str] = []
        self.queue: list[Request] = []
        self.running: dict[str, Request] = {}
        self.arms: dict[str, Arm] = {}
        # Of each arm that ran to the end, the value of each target; the larger is the better one times its sign.
        self.scores: dict[str, tuple[float, ...]] = {}
        self.refused: set[str] = set()
        # Points in a row that gave no new arm, and of those that gave nothing new at all.
        self.repeats = self.known = 0
        self.confirming = False
        self.signs = [-1.0 if target.mode == "min" else 1.0 for target in job.search.targets]
        self.sign = self.signs[0] if self.signs else 1.0
        self.num_arms = job.search.num_arms or 0
        # The points of a fixed design need no study: nothing is asked of what was found.
        self.points = deque[Values]() if self.adaptive else deque(list_points(job))
        directions = ["minimize" if sign < 0 else "maximize" for sign in self.signs]
        self.study = optuna.create_study(directions=directions) if self.adaptive else None
        rows = list(list_trials(results, job.name))
        self.recorded = {row["arm"] for row in rows if row["status"] == "infeasible"}
        self.done = {
            (row["arm"], row["phase"], row["seed"]): row
            for row in rows
            if row["status"] in FINISHED and _is_current(job, row)
        }
        if self.study is not None:
            self._reopen(self.study, rows)

    def _reopen(self, study: optuna.Study, rows: list[dict[str, Any]]) -> None:
        """Puts the points that the tables know back into the study, in their order, before any new one is asked for."""
        study.sampler = SAMPLERS[self.job.search.design](0, self.num_arms, True)
        for row in rows:
            arm = row["arm"]
            if row["phase"] != "search" or arm in self.arms or arm in self.refused or len(self.arms) >= self.num_arms:
                continue
            values = read_values(self.job, row)
            current = is_current(self.job, row, self.name_point)
            if current or self._was_refused(row, values):
                study.enqueue_trial(encode_point(self.job, values))
                trial = study.ask()
                # Given values would pass the sampler by: nsga2 counts a trial in its generation only when it is asked.
                assert trial.relative_params is not None
                suggest_point(trial, self.job)
                if current:
                    self._add(arm, values, trial)
                else:
                    self._refuse(values, trial, row["error"])

    def _was_refused(self, row: Mapping[str, Any], values: Values) -> bool:
        """Whether a row is of a point of this job that couldn't be an arm, and can't be one now."""
        if row["status"] != "infeasible" or row["arm"] != name_refused(self.job, values):
            return False
        try:
            self.name_point(values)
        except JobError:
            return _is_point(self.job, values)
        return False

    @property
    def num_planned(self) -> int:
        """Trials in all, as far as it is known."""
        arms = self.num_arms if self.adaptive else len(self.arms) + len(self.points)
        return count_trials(self.job, arms)

    def next_request(self, held: Callable[[Request], bool] = lambda request: False) -> Request | None:
        """The next trial to run that isn't `held`; None while only running or held ones can bring more.

        Raises StopIteration at the end.
        """
        looked = 0
        while True:
            for index in range(looked, len(self.queue)):
                if not held(self.queue[index]):
                    request = self.queue.pop(index)
                    self.running[name_trial(request.arm, request.seed)] = request
                    return request
            looked = len(self.queue)
            if self._wants_more():
                self._open()
            elif self.queue or self.running:
                return None
            elif self.adaptive and self.job.search.confirm and not self.confirming:
                self._confirm(self.job.search.confirm)
            else:
                raise StopIteration

    def _wants_more(self) -> bool:
        if not self.adaptive:
            return bool(self.points)
        # Arms asked for while others are held know nothing of those yet: few.
        room = not self.queue or len(self.queue) + len(self.job.search.seeds) <= MOST_HELD
        return room and len(self.arms) < self.num_arms and self.repeats < MOST_REPEATS and not self.confirming

    def _open(self) -> None:
        """One more point: its trials queued, or told at once where it is known or can't work."""
        if self.study is None:
            self._take(self.points.popleft(), None)
            return
        # Numbers of their own for every point: a resumed search asks for what an unbroken one would, not again for its
        # first arms. A sampler that gave a known arm would mostly give it again: then any other will do.
        seed = derive_seed(self.job.search.sampler_seed, len(self.arms) + len(self.refused), self.known) % 2**32
        self.study.sampler = SAMPLERS[self.job.search.design](seed, self.num_arms, self.known > 0)
        trial = self.study.ask()
        self._take(suggest_point(trial, self.job), trial)

    def _take(self, values: Values, trial: optuna.Trial | None) -> None:
        """A point that was asked for: a new arm, a known one, or none."""
        try:
            arm = self.name_point(values)
        except JobError as error:
            self._refuse(values, trial, error.problems[0])
            return
        if arm in self.arms:
            self._repeat(trial)
        else:
            self._add(arm, values, trial)

    def _add(self, arm: str, values: Values, trial: optuna.Trial | None) -> None:
        """A new arm: its trials that are done are noted, the others queued."""
        self.repeats = self.known = 0
        self.arms[arm] = Arm(values, trial, set(self.job.search.seeds))
        for seed in self.job.search.seeds:
            row = self.done.get((arm, self.phase, seed))
            if row is not None:
                self._note(arm, seed, row)
            else:
                self.queue.append(Request(values, arm, seed, self.phase))

    def _refuse(self, values: Values, trial: optuna.Trial | None, error: str) -> None:
        """A point that can't be an arm: the sampler is told so, once, and the tables."""
        arm = name_refused(self.job, values)
        if arm in self.refused:
            self._repeat(trial)
            return
        self.refused.add(arm)
        self.known = 0
        self.notes.append(f"infeasible: {error}")
        if arm not in self.recorded:
            self.record(Request(values, arm, self.job.search.seeds[0], self.phase), error)
        self._tell(trial, None, infeasible=True)
        self._count_repeat()

    def _repeat(self, trial: optuna.Trial | None) -> None:
        """A point that is known already: the study forgets it."""
        self.known += 1
        self._tell(trial, None)
        self._count_repeat()

    def _count_repeat(self) -> None:
        """Counts a point that gave no new arm; too many in a row end a search."""
        self.repeats += 1
        if self.adaptive and self.repeats == MOST_REPEATS:
            self.notes.append(
                f"the space gave {MOST_REPEATS} known or infeasible arms in a row: the search ends with "
                f"{len(self.arms)} of {self.num_arms} arms"
            )

    def _tell(self, trial: optuna.Trial | None, values: Sequence[float] | None, infeasible: bool = False) -> None:
        """Tells the study of a point's end: its targets' values, that it can't work, or nothing to learn from."""
        if self.study is None or trial is None:
            return
        if infeasible:
            # As a broken constraint, which samplers avoid; the values beside it are read by none.
            trial.set_constraint("infeasible", 1.0)
            values = [0.0] * len(self.signs)
        self.study.tell(trial, values, state=None if values else optuna.trial.TrialState.FAIL)

    def _confirm(self, confirm: Confirm) -> None:
        """The best arms and the base arm, again on fresh seeds."""
        self.confirming = True
        arms = list(self.scores)
        best = order_best([[s * value for s, value in zip(self.signs, self.scores[a], strict=True)] for a in arms])
        chosen = {arms[index]: self.arms[arms[index]].values for index in best[: confirm.top]}
        if not chosen:
            self.notes.append("no arm ran to the end with a value of every target: only the base arm is confirmed")
        try:
            chosen.setdefault(self.name_point({}), {})
        except JobError as error:
            self.notes.append(f"the base arm can't run: {error.problems[0]}")
        for seed in confirm.seeds:
            for arm, values in chosen.items():
                if (arm, "confirm", seed) not in self.done:
                    self.queue.append(Request(values, arm, seed, "confirm"))

    def retry(self, trial_id: str) -> None:
        """Puts a running trial back in front of the queue: its process died."""
        self.queue.insert(0, self.running.pop(trial_id))

    def finish(self, trial_id: str, row: Mapping[str, Any] | None) -> None:
        """Takes a trial's last row; None where it left none."""
        request = self.running.pop(trial_id)
        if request.phase != "confirm":
            self._note(request.arm, request.seed, row or {"status": "failed"})

    def _note(self, arm: str, seed: int, row: Mapping[str, Any]) -> None:
        state = self.arms[arm]
        state.waiting.discard(seed)
        values = read_targets(row)
        if row["status"] == "stopped":
            state.stopped_at = min(state.stopped_at or row["rung"], row["rung"])
        state.infeasible |= row["status"] == "infeasible"
        if row["status"] in ("complete", "stopped") and len(values) == len(self.signs) and None not in values:
            state.found.append([value for value in values if value is not None])
            state.rung_values.append(json.loads(row.get("rung_values") or "[]"))
        if state.waiting:
            return
        means: tuple[float, ...] = ()
        # Without all its seeds, an arm would be compared by those that it got through.
        if self.signs and len(state.found) == len(self.job.search.seeds):
            means = tuple(float(mean) for mean in np.mean(state.found, axis=0))
        if state.infeasible or not means:
            self._tell(state.trial, None, infeasible=state.infeasible)
        elif state.stopped_at is None:
            self.scores[arm] = means
            self._tell(state.trial, means)
        elif self.study is not None and state.trial is not None and len(means) == 1:
            # Every seed's value at the rung at which the first of them ended.
            there = [values[state.stopped_at - 1] for values in state.rung_values if len(values) >= state.stopped_at]
            known = [value for value in there if value is not None]
            state.trial.report(float(np.mean(known)) if known else means[0], step=state.stopped_at)
            self.study.tell(state.trial, state=optuna.trial.TrialState.PRUNED)
        else:  # stopped when the job had one target
            self._tell(state.trial, None)


def read_targets(row: Mapping[str, Any]) -> list[float | None]:
    """The target values of a row of `trials`."""
    cell = row.get("target_values")
    values: list[float | None] = json.loads(cell) if isinstance(cell, str) else list(cell or [])
    return values


def _is_current(job: Job, row: dict[str, Any]) -> bool:
    """Whether a finished row was measured as the job now asks for: more shots asked of a finished job are missing."""
    try:
        settings = list_measures(with_settings(job, read_values(job, row)))
    except JobError:
        return False
    return same_measures(row, settings)
