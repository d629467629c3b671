"""A job's arms as an Optuna study in a file of its own, which optuna-dashboard and Optuna's plots open."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from raylab.base.mistakes import JobError
from raylab.job.designs import AROUND_BASE, Values, last_step, list_levels, order_space, step_value
from raylab.job.settings import is_integer, list_settings
from raylab.job.specs import Job, Range
from raylab.results.tables import list_trials
from raylab.search.samplers import encode_choice
from raylab.search.search import read_targets, read_values
from raylab.statistics.analysis import is_own

Row = Mapping[str, Any]


def write_study(results: Path, job: Job, path: Path) -> int:
    """Writes a study of the job's name to the SQLite file `path`; returns the number of its trials, one an arm.

    Values are means over `search.seeds`. An arm that lacks one is running, or failed; one that was stopped early is
    pruned, or failed where there are several targets, which Optuna can't prune. Settings have their own names and
    values. A file that is there is replaced at the end. Raises JobError where no target is searched, where there is no
    trial yet, and where the folder of `path` can't be written.
    """
    if not job.search.targets:
        raise JobError([f"optuna: {job.name} has no search.targets, which the values of a study are; name one"])
    arms: dict[str, list[Row]] = {}
    for row in list_trials(results, job.name):
        if row["phase"] in ("search", "fixed", "confirm") and is_own(job, row):
            arms.setdefault(row["arm"], []).append(row)
    found = [_describe_arm(job, rows) for rows in arms.values()]
    trials = sorted((trial for trial in found if trial is not None), key=lambda trial: str(trial.datetime_start))
    if not trials:
        raise JobError([f"optuna: {job.name} has no trial of its search yet; run it first"])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch()
    except OSError as error:
        raise JobError([f"optuna: {path}: {error.strerror}; choose a file that can be written"]) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(f"sqlite:///{beside}")
            study = optuna.create_study(
                storage=storage,
                study_name=job.name,
                directions=["minimize" if target.mode == "min" else "maximize" for target in job.search.targets],
            )
            study.set_metric_names(_name_targets(job))
        study.add_trials(trials)
        storage.remove_session()
        storage.engine.dispose()
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(trials)


def _name_targets(job: Job) -> list[str]:
    """The targets' names, each its own."""
    names = [f"{target.task} {target.metric}" for target in job.search.targets]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _describe_arm(job: Job, rows: Sequence[Row]) -> FrozenTrial | None:
    """An arm's trial of the study; None for one that was only confirmed, such as the base arm of a search."""
    searched = {row["seed"]: row for row in rows if row["phase"] != "confirm"}
    if not searched:
        return None
    values = read_values(job, rows[0])
    if job.search.design in AROUND_BASE:
        base = list_settings(job)
        values = {name: values.get(name, base[name]) for name in order_space(job)}
    state, means, by_rung = _find_state(job, searched)
    trial = optuna.trial.create_trial(
        state=state,
        values=means,
        params={name: encode_choice(value) for name, value in values.items()},
        distributions={name: _find_distribution(job, name, values) for name in values},
        intermediate_values=dict(enumerate(by_rung, 1)),
        user_attrs={
            "arm": rows[0]["arm"],
            "trials": [row["trial_id"] for row in rows],
            "seeds": {str(seed): read_targets(row) for seed, row in searched.items()},
            "confirmed": {str(row["seed"]): read_targets(row) for row in rows if row["phase"] == "confirm"},
            "wall_seconds": sum(row["wall_seconds"] or 0.0 for row in rows),
            "gpu_seconds": sum(row["gpu_seconds"] or 0.0 for row in rows),
        },
    )
    # Optuna keeps local times.
    trial.datetime_start = min(row["started_at"] for row in rows).astimezone().replace(tzinfo=None)
    if state.is_finished():
        trial.datetime_complete = max(row["updated_at"] for row in searched.values()).astimezone().replace(tzinfo=None)
    return trial


def _find_state(job: Job, searched: Mapping[int, Row]) -> tuple[TrialState, list[float] | None, list[float]]:
    """The state of an arm, the means of its targets if it is complete, and of the first target at each rung."""
    states = {row["status"] for row in searched.values()}
    several = len(job.search.targets) > 1
    rungs = [json.loads(row["rung_values"] or "[]") for row in searched.values()]
    # As far as every seed came.
    by_rung = [float(np.mean(values)) for values in zip(*rungs, strict=False) if None not in values]
    by_rung = [] if several else by_rung
    if states & {"failed", "infeasible"}:
        return TrialState.FAIL, None, by_rung
    if "running" in states or not set(job.search.seeds) <= searched.keys():
        return TrialState.RUNNING, None, by_rung
    if "stopped" in states:
        return (TrialState.FAIL if several else TrialState.PRUNED), None, by_rung
    found = [read_targets(row) for row in searched.values()]
    if any(len(values) != len(job.search.targets) or None in values for values in found):
        return TrialState.FAIL, None, by_rung
    return TrialState.COMPLETE, [float(mean) for mean in np.mean(np.array(found, dtype=float), axis=0)], by_rung


def _find_distribution(job: Job, name: str, values: Values) -> BaseDistribution:
    """What a setting could have been."""
    entry = job.search.space[name]
    if job.search.design in AROUND_BASE or not isinstance(entry, Range):
        return CategoricalDistribution([encode_choice(level) for level in list_levels(job, name)])
    if is_integer(name):
        if entry.log:
            return IntDistribution(int(entry.low), int(entry.high), log=True)
        return IntDistribution(
            int(entry.low), int(step_value(name, entry, last_step(entry))), step=int(entry.step or 1)
        )
    if entry.step is not None:
        return FloatDistribution(entry.low, step_value(name, entry, last_step(entry)), step=entry.step)
    return FloatDistribution(entry.low, entry.high, log=entry.log)
