"""Which settings the results of a search hang on, by fANOVA and PED-ANOVA. Not an ablation.

The arms of a search were chosen by their results, each on few seeds: an importance tells where values differed among
the arms that were tried. It does not tell what a setting changes, nor which value is better.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna

from raylab.base.mistakes import JobError
from raylab.job.designs import Values, order_space
from raylab.job.settings import label_values
from raylab.job.specs import ADAPTIVE, Job
from raylab.results.tables import list_trials
from raylab.search.samplers import encode_point, suggest_point
from raylab.search.search import read_targets, read_values
from raylab.statistics.analysis import is_own

# With fewer arms a forest, or the best tenth of them, says nothing.
FEWEST_ARMS = 10
# Of which PED-ANOVA asks five at least.
BEST_SHARE = 0.1
FEWEST_BEST = 5
# Of the forest, half of Optuna's own: shares of 400 arms move by 0.01, in half the seconds.
NUM_TREES = 32

# Method -> what its numbers are. They add up to 1 over the settings that are compared.
MEANINGS = {
    "fANOVA": "share of the variance of a forest's prediction over the searched arms, of single settings (Hutter "
    "et al. 2014); not an ablation",
    "PED-ANOVA": "how far a setting's values among the best arms differ from those among all (Watanabe et al. 2023, "
    "arXiv 2304.10255); not an ablation",
}


class Importance(NamedTuple):
    """A setting's share. `within`: the part of a conditional space that its arms are of; empty: all of it."""

    method: str
    target: str
    setting: str
    importance: float
    within: str
    num_arms: int
    meaning: str


def _fit_fanova(study: optuna.Study, num: int) -> dict[str, float]:
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=NUM_TREES, seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _fit_ped_anova(study: optuna.Study, num: int) -> dict[str, float]:
    share = min(0.5, max(BEST_SHARE, FEWEST_BEST / num))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


METHODS: dict[str, Callable[[optuna.Study, int], dict[str, float]]] = {
    "fANOVA": _fit_fanova,
    "PED-ANOVA": _fit_ped_anova,
}


def compute_importances(job: Job, found: Sequence[tuple[Values, float]], *, mode: str, target: str) -> list[Importance]:
    """Both methods' importances of points and their values, largest first.

    In a conditional space, what only some arms read is compared among those alone: fANOVA is fitted to all arms for the
    settings that all of them read, and once more to each part of the space. PED-ANOVA weighs such settings by itself
    (arXiv 2601.20800). Parts of fewer than 10 arms, or of one value, are left out.
    """
    parts: dict[frozenset[str], list[tuple[Values, float]]] = {}
    for values, value in found:
        parts.setdefault(frozenset(values), []).append((values, value))
    rows: list[Importance] = []
    for method in METHODS:
        everyone: list[tuple[str, Sequence[tuple[Values, float]], frozenset[str] | None]] = [("", found, None)]
        if method == "fANOVA" and len(parts) > 1:
            common = frozenset.intersection(*parts)
            everyone += [(_name_part(job, parts, part), members, part - common) for part, members in parts.items()]
        for within, members, only in everyone:
            # Of equal values there is nothing to share out.
            if len(members) < FEWEST_ARMS or only == frozenset() or len({value for _, value in members}) == 1:
                continue
            weighed = METHODS[method](_make_study(job, members, mode), len(members))
            for name, share in sorted(weighed.items(), key=lambda item: -item[1]):
                rows.append(Importance(method, target, name, share, within, len(members), MEANINGS[method]))
    return rows


def _make_study(job: Job, found: Sequence[tuple[Values, float]], mode: str) -> optuna.Study:
    study = optuna.create_study(
        direction="minimize" if mode == "min" else "maximize", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values enqueued that the sampler would not give
        for values, value in found:
            study.enqueue_trial(encode_point(job, values))
            trial = study.ask()
            suggest_point(trial, job)
            study.tell(trial, value)
    return study


def _name_part(job: Job, parts: Mapping[frozenset[str], Sequence[tuple[Values, float]]], part: frozenset[str]) -> str:
    """What the arms of a part have in common and not all others have."""
    own = {name: {str(values[name]) for values, _ in parts[part]} for name in part}
    every = {name: {str(values.get(name)) for members in parts.values() for values, _ in members} for name in part}
    same = [name for name in order_space(job) if name in part and len(own[name]) == 1 < len(every[name])]
    if same:
        return label_values({name: next(iter(parts[part]))[0][name] for name in same})
    # Several values have it, such as objectives that read the same: not to be taken for all arms.
    read = sorted(part - frozenset.intersection(*parts))
    return f"those that read {', '.join(name.rsplit('.', 1)[-1] for name in read)}"


class Searched(NamedTuple):
    """An arm of a search that ran to the end: its point, each target's mean over seeds, and a row of `trials`."""

    values: Values
    targets: list[float | None]
    row: Mapping[str, Any]


def list_searched(results: Path, job: Job) -> dict[str, Searched]:
    """The arms of a job's search, as it now is, that ran to the end; a target that a seed lacks is None."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in list_trials(results, job.name):
        if row["phase"] == "search" and row["status"] == "complete" and (row["arm"] in found or is_own(job, row)):
            found.setdefault(row["arm"], []).append(row)
    arms = {}
    for arm, rows in found.items():
        num, seeds = len(job.search.targets), [read_targets(row) for row in rows]
        whole = all(len(values) == num for values in seeds)
        means = [_mean([values[index] for values in seeds]) if whole else None for index in range(num)]
        arms[arm] = Searched(read_values(job, rows[0]), means, rows[0])
    return arms


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def list_importances(results: Path, job: Job) -> list[Importance]:
    """The importances of a job's search, for each target: over the arms that ran to the end, mean over seeds.

    Raises JobError for a fixed design, which has effects, and for a search of fewer than 10 such arms or of one value.
    """
    if job.search.design not in ADAPTIVE:
        raise JobError(
            [f"importances: {job.name} is no search ({job.search.design}); its settings have effects instead"]
        )
    return weigh_searched(job, list(list_searched(results, job).values()))


def weigh_searched(job: Job, searched: Sequence[Searched]) -> list[Importance]:
    """As `list_importances`, of arms that are read already."""
    rows: list[Importance] = []
    for index, target in enumerate(job.search.targets):
        found = [(arm.values, value) for arm in searched if (value := arm.targets[index]) is not None]
        if len(found) < FEWEST_ARMS:
            raise JobError(
                [f"importances: {len(found)} arms of {job.name} ran to the end; {FEWEST_ARMS} are needed at least"]
            )
        rows += compute_importances(job, found, mode=target.mode, target=f"{target.task} {target.metric}")
    if not rows:
        raise JobError([f"importances: all arms of {job.name} have the same value; there is nothing to explain"])
    return rows
