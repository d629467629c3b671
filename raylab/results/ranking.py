"""Arms side by side: means with intervals over seeds, and paired differences to the base arm on shared seeds."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from raylab.job.settings import label_values, resolve_target
from raylab.job.specs import Job, Target
from raylab.results.fronts import rank_fronts
from raylab.results.queries import SeedValue, list_ranked, open_tables, read_cell, read_heldout

CONFIDENCE = 0.95
BASELINE = "baseline:"


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t interval; the ends are NaN for one seed."""

    mean: float
    low: float
    high: float
    num_seeds: int


class RankedArm(NamedTuple):
    """An arm's value in a cell, and its paired difference to the base arm (None: it is the base, or shares no seed)."""

    arm: str
    label: str
    value: Interval
    difference: Interval | None


class FrontArm(NamedTuple):
    """An arm of the Pareto front, and its value of each target."""

    arm: str
    label: str
    values: tuple[Interval, ...]


def compute_interval(values: list[float]) -> Interval:
    """Student's t interval of the mean of independent values, one a seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, len(values))


def list_cells(job: Job) -> list[tuple[str, dict[str, Any], str]]:
    """The cells that a summary shows: (table, cell, mode). The target's first, then every task and number of shots."""
    evaluate = job.evaluate
    cells: list[tuple[str, dict[str, Any], str]] = [
        (target.table, resolve_target(job, target), target.mode) for target in job.search.targets
    ]
    for task in evaluate.tasks or job.corpus.tasks:
        for shots in evaluate.shots:
            target = Target(task=task, shots=shots, frozen_layers=evaluate.frozen_layers[0])
            cell = ("scores", resolve_target(job, target), "max")
            if cell not in cells:
                cells.append(cell)
    return cells


def rank_arms(
    results: Path,
    job: Job,
    table: str,
    cell: dict[str, Any],
    mode: str,
    base: str,
    split: str = "validation",
    arms: Collection[str] | None = None,
) -> list[RankedArm]:
    """The arms of a job, best mean first. Only complete trials of fixed designs and confirmations count.

    `arms` leaves out what an earlier version of the job ran. Baselines are shown on the arms' seeds.
    """
    labels = label_arms(results, job)
    by_arm: dict[str, dict[int, float]] = {}
    for row in _read_values(results, job, table, cell, split):
        if arms is None or row.arm in arms or row.arm.startswith(BASELINE):
            by_arm.setdefault(row.arm, {})[row.seed] = row.value
    seeds = {seed for arm, values in by_arm.items() if not arm.startswith(BASELINE) for seed in values}
    for arm in [arm for arm in by_arm if arm.startswith(BASELINE)]:
        by_arm[arm] = {seed: value for seed, value in by_arm[arm].items() if seed in seeds}
        if not by_arm[arm]:
            del by_arm[arm]
    reference = by_arm.get(base, {})
    ranked = []
    for arm, values in by_arm.items():
        shared = sorted(values.keys() & reference.keys()) if arm != base else []
        difference = compute_interval([values[seed] - reference[seed] for seed in shared]) if shared else None
        label = "base" if arm == base and not labels.get(arm) else labels.get(arm) or arm
        ranked.append(RankedArm(arm, label, compute_interval(list(values.values())), difference))
    return sorted(ranked, key=lambda row: row.value.mean, reverse=mode == "max")


def find_front(
    results: Path, job: Job, base: str, split: str = "validation", arms: Collection[str] | None = None
) -> list[FrontArm]:
    """The arms that no other arm beats on every target, by their means; the best on the first target stands first.

    Counted are complete trials of fixed designs and confirmations, of arms with a value for every target; no baselines.
    """
    found = []
    for target in job.search.targets:
        ranked = rank_arms(results, job, target.table, resolve_target(job, target), target.mode, base, split, arms)
        found.append({row.arm: row for row in ranked if not row.arm.startswith(BASELINE)})
    shared = [arm for arm in found[0] if all(arm in other for other in found)] if found else []
    if not shared:
        return []
    signs = [-1.0 if target.mode == "min" else 1.0 for target in job.search.targets]
    means = np.array([[rows[arm].value.mean for rows in found] for arm in shared]) * signs
    front = [arm for arm, rank in zip(shared, rank_fronts(means), strict=True) if rank == 0]
    return [FrontArm(arm, found[0][arm].label, tuple(rows[arm].value for rows in found)) for arm in front]


def _read_values(results: Path, job: Job, table: str, cell: dict[str, Any], split: str) -> Iterator[SeedValue]:
    """The values of a cell; where freeze depths are searched, each arm's at its own, as the search's targets are."""
    for here, arms in split_depths(results, job, cell):
        yield from (row for row in read_cell(results, job.name, table, here, split) if arms is None or row.arm in arms)


def split_depths(results: Path, job: Job, cell: dict[str, Any]) -> list[tuple[dict[str, Any], set[str] | None]]:
    """The cells that a cell is read as, and whose values each gives (None: every arm's): where depths are searched,
    one for each depth, with its arms."""
    if "evaluate.frozen_layers" not in job.search.space or "frozen_layers" not in cell:
        return [(cell, None)]
    asked = open_tables(results, "trials", job.name, _name_trials(results, job)).execute(
        'select arm, any_value("evaluate.frozen_layers") from trials where job = ? group by arm', [job.name]
    )
    arms: dict[str, set[str]] = {}
    for arm, text in asked.fetchall():
        own = json.loads(text) if text is not None else [cell["frozen_layers"]]
        depth = cell["frozen_layers"] if cell["frozen_layers"] in own else own[0]
        arms.setdefault(depth, set()).add(arm)
    frozen = cell["probe"] if cell["frozen_layers"] == "all" else job.evaluate.probes[0]
    return [
        (cell | {"frozen_layers": depth, "probe": frozen if depth == "all" else "mlp"}, there)
        for depth, there in arms.items()
    ]


def _name_trials(results: Path, job: Job) -> list[str]:
    """A trial of each arm that counts in a ranking."""
    return list({row["arm"]: row["trial_id"] for row in list_ranked(results, job.name)}.values())


def label_arms(results: Path, job: Job) -> dict[str, str]:
    """What sets each ranked arm apart: the searched settings that it reads."""
    names = list(job.search.space)
    if not names:
        return {}
    columns = ", ".join(f'any_value("{name}")' for name in names)
    rows = open_tables(results, "trials", job.name, _name_trials(results, job)).execute(
        f"select arm, {columns} from trials where job = ? and arm not like 'baseline:%' group by arm", [job.name]
    )
    return {row[0]: label_values(dict(zip(names, row[1:], strict=True))) for row in rows.fetchall()}


def summarise_heldout(results: Path, job: Job) -> dict[str, dict[str, Interval]]:
    """Arm -> held-out measure at the end of pre-training, over seeds; and `retrieval_error_change`.

    The change is that of the retrieval error over pre-training, relative to the untrained encoder of the same seed.
    """
    gathered: dict[str, dict[str, list[float]]] = {}
    for (arm, _), measures in read_heldout(results, job.name).items():
        values = {name.removeprefix("heldout_"): last for name, (_, last) in measures.items()}
        if "heldout_retrieval_accuracy" in measures:
            first, last = (1 - value for value in measures["heldout_retrieval_accuracy"])
            values["retrieval_error"] = last
            if first > 0:
                values["retrieval_error_change"] = last / first - 1
        for name, value in values.items():
            gathered.setdefault(arm, {}).setdefault(name, []).append(value)
    return {arm: {name: compute_interval(v) for name, v in found.items()} for arm, found in gathered.items()}
