"""Which trial comes next: one Optuna study, rebuilt from the tables, asked for arms or given a design's points."""

import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna

from raylab.identity import canonical
from raylab.mistakes import JobError
from raylab.noise import derive_seed
from raylab.settings import is_integer, is_list, is_read, list_settings, with_settings
from raylab.specs import Choices, Job, Range
from raylab.tables import list_trials, plain_value, same_measures

Values = dict[str, Any]
MOST_REPEATS = 20
FINISHED = ("complete", "stopped", "infeasible")

# Silent, warnings too: TPE's tell of conditional settings, which are meant.
optuna.logging.set_verbosity(optuna.logging.ERROR)


def _make_tpe(seed: int, num_arms: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # conditional settings: arms that share settings inform each other
            constant_liar=True,  # arms still running count as bad: workers spread out
            n_startup_trials=max(3, min(10, num_arms // 4)),
        )


SAMPLERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "tpe": _make_tpe,
    "random": lambda seed, num_arms: optuna.samplers.RandomSampler(seed=seed),
}


class Request(NamedTuple):
    """A trial that should run."""

    values: Values
    arm: str
    seed: int
    phase: Literal["search", "confirm", "fixed"]


@dataclass
class Arm:
    """An arm under way: its point of the study, and the target values of its finished seeds."""

    values: Values
    trial: optuna.Trial | None
    waiting: set[int]
    found: list[float] = field(default_factory=list)
    stopped_at: int | None = None


def _encode(value: Any) -> Any:
    """A choice as Optuna takes it: scalars, or JSON text."""
    return canonical(value) if isinstance(value, list | dict) else value


def is_active(job: Job, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a searched setting has a meaning beside the values chosen before it: its `when`, and what is read."""
    objective = values.get("pretrain.objective", job.pretrain.objective)
    loss = values.get("pretrain.metadata.loss", job.pretrain.metadata.loss)
    metadata = job.pretrain.metadata.model_copy(update={"loss": loss})
    pretrain = job.pretrain.model_copy(update={"objective": objective, "metadata": metadata})
    depths = values.get("evaluate.frozen_layers", job.evaluate.frozen_layers)
    evaluate = job.evaluate.model_copy(
        update={"frozen_layers": (depths,) if isinstance(depths, str) else tuple(depths)}
    )
    chosen = job.model_copy(update={"pretrain": pretrain, "evaluate": evaluate})
    if when := job.search.space[name].when:
        settings = list_settings(chosen) | dict(values)
        for condition, wanted in when.items():
            if settings[condition] not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
    return is_read(chosen, name)


def order_space(job: Job) -> list[str]:
    """The searched settings in the file's order, but each behind those that decide whether it has a meaning."""
    ordered: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> None:
        if name not in job.search.space or name in ordered or name in above:
            return
        deciders = list(job.search.space[name].when or {})
        if name.startswith("pretrain.") and name != "pretrain.objective":
            deciders.append("pretrain.objective")
        if name == "pretrain.metadata.temperature":
            deciders.append("pretrain.metadata.loss")
        if name.startswith(("evaluate.fine_tune.", "evaluate.selection")):
            deciders.append("evaluate.frozen_layers")
        for decider in deciders:
            add(decider, (*above, name))
        ordered.append(name)

    for name in job.search.space:
        add(name, ())
    return ordered


def _number(name: str, entry: Range, index: int) -> int | float:
    """The value `index` steps above the low end, in decimal: 0.1 and two steps of 0.1 are 0.3, as if it were listed."""
    value = Decimal(str(entry.low)) + index * Decimal(str(entry.step or 1))
    return int(value) if is_integer(name) else float(value)


def _last_step(entry: Range) -> int:
    """Steps from the low end to the highest value that is in the range."""
    low, high, step = (Decimal(str(number)) for number in (entry.low, entry.high, entry.step or 1))
    return int((high - low) // step)


def list_values(name: str, entry: Choices | Range) -> list[Any]:
    """The values of a setting on a grid."""
    if isinstance(entry, Choices):
        return list(entry.choices)
    return [_number(name, entry, index) for index in range(_last_step(entry) + 1)]


def list_points(job: Job) -> Iterator[Values]:
    """Every point of a grid, conditional settings only where they have a meaning; the last setting varies fastest."""

    def extend(values: Values, names: list[str]) -> Iterator[Values]:
        if not names:
            yield values
        elif not is_active(job, names[0], values):
            yield from extend(values, names[1:])
        else:
            for value in list_values(names[0], job.search.space[names[0]]):
                yield from extend({**values, names[0]: value}, names[1:])

    yield from extend({}, order_space(job))


def _suggest(trial: optuna.Trial, job: Job) -> Values:
    """A point of the space, setting by setting."""
    values: Values = {}
    for name in order_space(job):
        entry = job.search.space[name]
        if not is_active(job, name, values):
            continue
        if isinstance(entry, Choices):
            coded = {_encode(choice): choice for choice in entry.choices}
            values[name] = coded[trial.suggest_categorical(name, list(coded))]
        elif is_integer(name) and entry.log:
            values[name] = trial.suggest_int(name, int(entry.low), int(entry.high), log=True)
        elif is_integer(name) or entry.step is not None:
            # By the number of steps: the same values as on a grid.
            index = trial.suggest_int(name, 0, _last_step(entry))
            values[name] = _number(name, entry, index)
        else:
            values[name] = trial.suggest_float(name, entry.low, entry.high, log=entry.log)
    return values


def _encode_point(job: Job, values: Mapping[str, Any]) -> Values:
    """A point as the study holds it, so that `_suggest` gives these values back."""
    coded: Values = {}
    for name, value in values.items():
        entry = job.search.space[name]
        if isinstance(entry, Range) and not entry.log and (is_integer(name) or entry.step is not None):
            coded[name] = round((value - entry.low) / (entry.step or 1))
        else:
            coded[name] = _encode(value)
    return coded


def read_values(job: Job, row: Mapping[str, Any]) -> Values:
    """The searched values of a row of `trials`, as far as the space holds them; only settings that were active."""
    values: Values = {}
    for name in order_space(job):
        entry, cell = job.search.space[name], row.get(name)
        if not is_active(job, name, values):
            continue
        if isinstance(entry, Choices):
            for choice in entry.choices:
                listed = [choice] if is_list(name) and not isinstance(choice, list) else choice
                if plain_value(listed) == cell:
                    values[name] = choice
        elif cell is not None and entry.low <= cell <= entry.high:
            values[name] = cell
    return values


def _is_point(job: Job, values: Values) -> bool:
    """Whether some values are a whole point of the space: what the study asks for beside them would be made up."""
    if any(is_active(job, name, values) and name not in values for name in job.search.space):
        return False
    coded = _encode_point(job, values)
    given = optuna.trial.FixedTrial(coded)
    return _suggest(given, job) == values


def is_current(job: Job, row: Mapping[str, Any], name_point: Callable[[Values], str]) -> bool:
    """Whether a row of `trials` is of an arm of this job as it is now: else of an earlier version, or of other data."""
    values = read_values(job, row)
    try:
        return (not values or _is_point(job, values)) and name_point(values) == row["arm"]
    except JobError:
        return False


class Search:
    """The state of a job's search, in memory only: the tables are the record.

    `next_request()` gives a trial, None to wait for one that runs, or raises StopIteration at the end; `finish(row)`
    takes a trial's row of `trials`. `name_point(values)` gives an arm's name or raises JobError.
    """

    def __init__(
        self,
        job: Job,
        results: Path,
        name_point: Callable[[Values], str],
    ) -> None:
        self.job = job
        self.results = results
        self.name_point = name_point
        self.adaptive = job.search.design in SAMPLERS
        self.notes: list[str] = []
        self.queue: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.arms: dict[str, Arm] = {}
        self.values: dict[str, Values] = {}
        self.scores: dict[str, float] = {}
        self.repeats = 0
        self.confirming = False
        self.started = time.monotonic()
        target = job.search.targets[0] if job.search.targets else None
        self.sign = -1.0 if target and target.mode == "min" else 1.0
        points = [] if self.adaptive else list(list_points(job))
        self.unasked = len(points)
        self.num_arms = (job.search.num_arms or 0) if self.adaptive else len(points)
        self.study = optuna.create_study(
            direction="minimize" if self.sign < 0 else "maximize", sampler=optuna.samplers.RandomSampler(seed=0)
        )
        rows = list(list_trials(results, job.name))
        self.done = {
            (row["arm"], row["phase"], row["seed"]): row
            for row in rows
            if row["status"] in FINISHED and _is_current(job, row)
        }
        self._reopen(rows)
        for point in points:
            self.study.enqueue_trial(_encode_point(job, point))

    def _reopen(self, rows: list[dict[str, Any]]) -> None:
        """Puts the arms that the tables know back into the study, in their order, before any new one is asked for."""
        if not self.adaptive:
            return
        for row in rows:
            known = row["phase"] != "search" or row["arm"] in self.arms or len(self.arms) >= self.num_arms
            if not known and is_current(self.job, row, self.name_point):
                self.study.enqueue_trial(_encode_point(self.job, read_values(self.job, row)))
                self._ask()

    @property
    def num_planned(self) -> int:
        """Trials in all, as far as it is known."""
        confirm = self.job.search.confirm
        extra = (min(confirm.top, self.num_arms) + 1) * len(confirm.seeds) if confirm else 0
        return self.num_arms * len(self.job.search.seeds) + extra

    def next_request(self, held: Callable[[Request], bool] = lambda request: False) -> Request | None:
        """The next trial to run; None while only running ones can bring more. Raises StopIteration at the end."""
        while True:
            for request in self.queue:
                if not held(request):
                    self.queue.remove(request)
                    self.running[f"{request.arm}-{request.seed}"] = request
                    return request
            if self._wants_more():
                self._ask()
            elif self.running or self.queue:
                return None
            elif self.adaptive and self.job.search.confirm and not self.confirming:
                self._confirm()
                if not self.queue:
                    raise StopIteration
            else:
                raise StopIteration

    def retry(self, trial_id: str) -> None:
        """Puts a running trial back in front."""
        self.queue.appendleft(self.running.pop(trial_id))

    def _wants_more(self) -> bool:
        if not self.adaptive:
            return self.unasked > 0
        return len(self.arms) < self.num_arms and self.repeats < MOST_REPEATS and not self.confirming

    def _ask(self) -> None:
        """One more point of the study: queued, or told at once where it is known, repeated or can't work."""
        self.unasked -= 1
        if self.adaptive:
            # Numbers of their own for every arm: a resumed search asks for what an unbroken one would, not again for
            # its first arms. A sampler that gave a known arm would mostly give it again: then any other will do.
            seed = derive_seed(self.job.search.sampler_seed, len(self.arms), self.repeats) % 2**32
            make = SAMPLERS["random" if self.repeats else self.job.search.design]
            self.study.sampler = make(seed, self.num_arms)
        trial = self.study.ask()
        values = _suggest(trial, self.job)
        try:
            arm = self.name_point(values)
        except JobError as error:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.notes.append(f"infeasible: {error.problems[0]}")
            self._repeat()
            return
        if arm in self.arms:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self._repeat()
            return
        self.repeats = 0
        self.values[arm] = values
        self.arms[arm] = Arm(values, trial, set(self.job.search.seeds))
        phase: Literal["search", "fixed"] = "search" if self.adaptive else "fixed"
        for seed in self.job.search.seeds:
            row = self.done.get((arm, phase, seed))
            if row is not None:
                self._note(arm, seed, row)
            else:
                self.queue.append(Request(values, arm, seed, phase))

    def _repeat(self) -> None:
        """Counts a point that gave no new arm; too many in a row end a search."""
        self.repeats += 1
        if self.adaptive and self.repeats == MOST_REPEATS:
            self.notes.append(
                f"the space gave {MOST_REPEATS} known or infeasible arms in a row: the search ends with "
                f"{len(self.arms)} of {self.num_arms} arms"
            )

    def _confirm(self) -> None:
        """The best arms and the base arm, again on fresh seeds."""
        confirm = self.job.search.confirm
        assert confirm is not None
        self.confirming = True
        best = sorted(self.scores, key=lambda arm: -self.sign * self.scores[arm])[: confirm.top]
        chosen = {arm: self.values[arm] for arm in best}
        try:
            chosen.setdefault(self.name_point({}), {})
        except JobError as error:
            self.notes.append(f"the base arm can't run: {error.problems[0]}")
        for seed in confirm.seeds:
            for arm, values in chosen.items():
                if (arm, "confirm", seed) not in self.done:
                    self.queue.append(Request(values, arm, seed, "confirm"))

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
        if row["status"] in ("complete", "stopped") and values and values[0] is not None:
            state.found.append(values[0])
        if state.waiting or state.trial is None:
            return
        if not state.found:
            self.study.tell(state.trial, state=optuna.trial.TrialState.FAIL)
        elif state.stopped_at is not None:
            state.trial.report(float(np.mean(state.found)), step=state.stopped_at)
            self.study.tell(state.trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.scores[arm] = float(np.mean(state.found))
            self.study.tell(state.trial, self.scores[arm])


def read_targets(row: Mapping[str, Any]) -> list[float | None]:
    """The target values of a row of `trials`."""
    cell = row.get("target_values")
    values: list[float | None] = json.loads(cell) if isinstance(cell, str) else list(cell or [])
    return values


def _is_current(job: Job, row: dict[str, Any]) -> bool:
    """Whether a finished row was measured as the job now asks for: more shots asked of a finished job are missing."""
    try:
        settings = list_settings(with_settings(job, read_values(job, row)))
    except JobError:
        return False
    return same_measures(row, settings)
