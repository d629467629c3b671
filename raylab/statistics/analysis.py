"""A job's arms compared: the declared comparison first and alone, the rest as one exploratory family; and the winner.

All from the tables: neither the corpus nor the encoders have to be there.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from raylab.base.identity import canonical, decides_arm
from raylab.base.mistakes import JobError
from raylab.job.designs import FIXED, Values, as_setting, list_points
from raylab.job.primary import BASE, WINNER, Declared, Named, read_arm, read_cell_target, read_primary
from raylab.job.settings import label_values, list_settings, resolve_target, with_settings
from raylab.job.specs import Job, Target
from raylab.results.queries import list_ranked, match_cell, open_tables
from raylab.results.ranking import BASELINE, Interval, compute_interval, rank_arms, split_depths
from raylab.results.tables import list_trials, plain_value, read_trial
from raylab.search.search import is_current, read_targets
from raylab.statistics.comparisons import compare_arms, pair_draws
from raylab.statistics.verdicts import EXPLORATORY, PRIMARY, Role, Verdict, tell_comparison

ArmScores = dict[str, dict[Any, dict[Any, float]]]


class Arms(NamedTuple):
    """The ranked arms of a job as it now is, by name: their rows of `trials`, labels, and which is the base arm."""

    rows: dict[str, dict[str, Any]]
    labels: dict[str, str]
    base: str | None


class Gap(NamedTuple):
    """The best arm on validation, its value there and on the test split (None: not unsealed), and test - validation.

    A winner's value on validation is too high, as it was chosen by it. `num_unseals`: how often test was opened.
    """

    arm: str
    label: str
    validation: Interval
    test: Interval | None
    gap: Interval | None
    num_unseals: int


def read_scores(
    results: Path, job: Job, cell: Mapping[str, Any], split: str = "validation", arms: Collection[str] | None = None
) -> ArmScores:
    """Arm -> seed -> draw -> value of a cell of `scores`, as `results.read_cell` reads it, draws apart."""
    ranked = [row["trial_id"] for row in list_ranked(results, job.name)]
    connection = open_tables(results, "trials scores", job.name, ranked)
    found: ArmScores = {}
    for here, there in split_depths(results, job, dict(cell)):
        rows = connection.execute(
            f"""
            select t.arm, t.seed, s.draw, s.value from scores s join trials t using (job, trial_id)
            where job = ? and s.split = ? and s.rung = t.num_rungs and s.value is not null and {match_cell(here)}
            order by t.arm, t.seed, s.draw
            """,
            [job.name, split, *here.values()],
        )
        for arm, seed, draw, value in rows.fetchall():
            if (there is None or arm in there) and (arms is None or arm in arms):
                found.setdefault(arm, {}).setdefault(seed, {})[draw] = value
    return found


def _counted(job: Job, settings: Mapping[str, Any]) -> str:
    """The settings by which an arm is known in the tables, whatever its data and weights are."""
    space = job.search.space
    return canonical({name: plain_value(settings[name]) for name in list_settings(job)
                      if (decides_arm(name, space) or name in space) and settings[name] is not None})  # fmt: skip


def is_own(job: Job, row: Mapping[str, Any]) -> bool:
    """Whether a row of `trials` is of an arm of the job as it now is, whatever the data were."""
    key = _counted(job, row)

    def name_point(values: Values) -> str:
        return str(row["arm"]) if _counted(job, list_settings(with_settings(job, values))) == key else ""

    return is_current(job, row, name_point)


def list_arms(results: Path, job: Job) -> Arms:
    """The ranked arms that are still arms of the job; of equal ones on other data, those that ran last."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    base_key = _counted(job, list_settings(job))
    trials = {row["arm"]: row["trial_id"] for row in list_ranked(results, job.name)}
    for arm, trial_id in trials.items():
        row = None if arm.startswith(BASELINE) else read_trial(results, job.name, trial_id)
        if row is None:
            continue
        key = _counted(job, row)
        known = found.get(key)
        if (known is None or row["started_at"] > known[1]["started_at"]) and (key == base_key or is_own(job, row)):
            found[key] = (arm, row)
    base = found[base_key][0] if base_key in found else None
    rows = dict(found.values())
    labels = {arm: label_values({name: row[name] for name in job.search.space}) or arm for arm, row in rows.items()}
    if base is not None and job.search.design != "grid":
        labels[base] = BASE
    return Arms(rows, labels, base)


def find_arm(results: Path, job: Job, arms: Arms, named: Named) -> str:
    """The arm in the tables that was named. Raises JobError where it has not run to the end, or several fit."""
    if named.special is not None and named.special.startswith(BASELINE):
        return named.special
    if named.special == WINNER:
        return _find_winner(results, job, arms)
    if job.search.design in FIXED or not named.values:
        key = _counted(job, list_settings(with_settings(job, named.values)))
        fitting = [arm for arm, row in arms.rows.items() if _counted(job, row) == key]
    else:
        wanted = {name: list_settings(with_settings(job, {name: value}))[name] for name, value in named.values.items()}
        fitting = [
            arm for arm, row in arms.rows.items() if all(row[name] == plain_value(v) for name, v in wanted.items())
        ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(fitting)
        raise JobError(
            [f"'{named.text}': {len(fitting)} confirmed arms have that; name more settings, or one of {names}"]
        )
    state = "complete trial" if job.search.design in FIXED else "confirmed trial"
    raise JobError([f"'{named.text}': has no {state} in {job.name}; 'raylab status {job.name}' tells what ran"])


def _find_winner(results: Path, job: Job, arms: Arms) -> str:
    """The confirmed arm that was best in the search, on the search's seeds: those of the confirmation are fresh."""
    values: dict[str, list[float]] = {}
    for row in list_trials(results, job.name):
        if row["phase"] == "search" and row["status"] == "complete" and row["arm"] in arms.rows:
            values.setdefault(row["arm"], []).extend(value for value in read_targets(row)[:1] if value is not None)
    values = {arm: found for arm, found in values.items() if found}
    if not values:
        raise JobError([f"'{WINNER}': no arm of the search of {job.name} is confirmed yet; 'raylab status' tells more"])
    best = max if job.search.targets[0].mode == "max" else min
    return best(values, key=lambda arm: float(np.mean(values[arm])))


def list_family(job: Job, arms: Sequence[str], base: str | None) -> list[tuple[str, str]]:
    """The exploratory comparisons: of each arm with the base arm, or of all pairs, also where the base is no arm."""
    if job.analysis.family == "base" and base in arms:
        return [(arm, str(base)) for arm in arms if arm != base]
    return list(itertools.combinations(arms, 2))


def count_family(job: Job) -> int:
    """How many exploratory comparisons a job declares, at most; the primary one is none of them."""
    base: Values | None = {}
    if job.search.design in FIXED:
        points, own = list(list_points(job)), list_settings(job)
        num = len(points)
        base = next((p for p in points if all(own[name] == as_setting(name, p[name]) for name in p)), None)
    else:
        num = min(job.search.confirm.top, job.search.num_arms or 0) + 1 if job.search.confirm else 0
    around = job.analysis.family == "base" and base is not None
    declared = read_declared(job)
    primary = declared is not None and all(arm.special in (None, WINNER) for arm in (declared.a, declared.b))
    if declared is not None and around:
        primary &= any(arm.special is None and arm.values == base for arm in (declared.a, declared.b))
    return max(0, (num - 1 if around else num * (num - 1) // 2) - primary)


def name_given(job: Job) -> str:
    """What every seed of a job shares, and its statements are given."""
    return "" if job.corpus.split.vary else "given this split"


def read_declared(job: Job) -> Declared | None:
    """The declared comparison of a job, if there is one."""
    return read_primary(job, job.analysis.primary) if job.analysis.primary is not None else None


def default_target(job: Job) -> Target:
    """The cell in which arms are compared by default: the declared one, else the search's first, or the first."""
    declared = read_declared(job)
    return declared.target if declared is not None else read_cell_target(job, {})


def analyse_job(
    results: Path, job: Job, target: Target | None = None, split: str = "validation"
) -> tuple[list[Verdict], list[str]]:
    """The verdicts of a job in a cell, the primary one first; and notes on what could not be compared.

    In another cell than the declared one there is no primary comparison. Exploratory ones carry Holm's correction over
    their family, of those cells' arms alone. Raises JobError where no arm has a value there.
    """
    declared, arms = read_declared(job), list_arms(results, job)
    target = target or default_target(job)
    cell = resolve_target(job, target)
    scores = read_scores(results, job, cell, split)
    names = [arm for arm in arms.rows if arm in scores]
    if not names:
        told = ", ".join(f"{key}={value}" for key, value in cell.items() if value is not None)
        raise JobError([f"compare: no ranked arm of {job.name} has a value of {split} at {told}; run it, or unseal it"])
    verdicts: list[Verdict] = []
    notes: list[str] = []
    family = list_family(job, names, arms.base)
    if declared is not None and split == "validation" and resolve_target(job, declared.target) == cell:
        try:
            pair = (find_arm(results, job, arms, declared.a), find_arm(results, job, arms, declared.b))
            if pair[0] == pair[1]:
                raise JobError([f"'{declared.a.text}' and '{declared.b.text}' turned out to be one arm, {pair[0]}"])
            [verdict] = _judge(job, scores, [pair], arms, target.mode, PRIMARY, (declared.a.text, declared.b.text))
            verdicts.append(verdict)
            family = [other for other in family if set(other) != set(pair)]
        except JobError as error:
            notes += [f"primary comparison: {problem}" for problem in error.problems]
    elif declared is not None:
        notes.append("the declared comparison is of another cell, or of validation: all of these are exploratory")
    else:
        notes.append("no primary comparison was declared (analysis.primary): all of these are exploratory")
    apart = [pair for pair in family if not pair_draws(scores[pair[0]], scores[pair[1]])]
    if apart:
        notes.append(f"{len(apart)} comparisons are left out: their arms share no seed yet")
    verdicts += _judge(job, scores, [pair for pair in family if pair not in apart], arms, target.mode, EXPLORATORY)
    return verdicts, notes


def compare_named(
    results: Path, job: Job, texts: tuple[str, str], target: Target | None = None, split: str = "validation"
) -> Verdict:
    """Two arms, by their names in the tables or as `primary.read_arm` takes them; exploratory but where declared."""
    arms, target = list_arms(results, job), target or default_target(job)
    cell = resolve_target(job, target)
    scores, pair = read_scores(results, job, cell, split), []
    for text in texts:
        arm = text if text in scores else find_arm(results, job, arms, read_arm(job, text))
        if arm not in scores:
            raise JobError([f"'{text}': has no value of {split} in this cell; 'raylab query' shows what was scored"])
        pair.append(arm)
    if pair[0] == pair[1]:
        raise JobError([f"'{texts[0]}' and '{texts[1]}' are the same arm; name two"])
    role: Role = EXPLORATORY
    declared = read_declared(job)
    if declared is not None and split == "validation" and resolve_target(job, declared.target) == cell:
        own = {find_arm(results, job, arms, named) for named in (declared.a, declared.b)}
        role = PRIMARY if own == set(pair) else EXPLORATORY
    [verdict] = _judge(job, scores, [(pair[0], pair[1])], arms, target.mode, role, texts)
    return verdict


def _judge(
    job: Job,
    scores: ArmScores,
    pairs: Sequence[tuple[str, str]],
    arms: Arms,
    mode: Literal["max", "min"],
    role: Role,
    names: tuple[str, str] | None = None,
) -> list[Verdict]:
    verdicts = []
    for row in compare_arms(scores, pairs, mode=mode):
        a, b = names or (arms.labels.get(row.a, row.a), arms.labels.get(row.b, row.b))
        verdicts.append(Verdict(role, a, b, tell_comparison(row, a, b, name_given(job)), row))
    return verdicts


def measure_gap(results: Path, job: Job, target: Target | None = None) -> Gap | None:
    """The winner on validation beside its unsealed score, paired by seed; None where no arm has a value."""
    target, arms = target or default_target(job), list_arms(results, job)
    cell = resolve_target(job, target)
    ranked = rank_arms(results, job, "scores", cell, target.mode, arms.base or "", "validation", list(arms.rows))
    best = next((row for row in ranked if not row.arm.startswith(BASELINE)), None)
    if best is None:
        return None
    means = [
        {seed: float(np.mean(list(draws.values()))) for seed, draws in found.get(best.arm, {}).items()}
        for found in (read_scores(results, job, cell, split, [best.arm]) for split in ("validation", "test"))
    ]
    shared = sorted(means[0].keys() & means[1].keys())
    opened = open_tables(results, "unseals", job.name).execute(
        'select count(distinct "at") from unseals where job = ?', [job.name]
    ).fetchone()  # fmt: skip
    return Gap(
        best.arm, arms.labels[best.arm], best.value,
        compute_interval(list(means[1].values())) if means[1] else None,
        compute_interval([means[1][seed] - means[0][seed] for seed in shared]) if shared else None,
        opened[0] if opened else 0,
    )  # fmt: skip


def tell_gap(gap: Gap) -> str:
    """The winner, and how far its validation score held, in one sentence."""
    best = f"Best on validation: {gap.label}, {gap.validation.mean:.3f} (chosen by it, so too high)"
    if gap.test is None or gap.gap is None:
        return f"{best}; its test score is sealed: 'raylab unseal' opens it."
    spread = f" [{gap.gap.low:+.3f}, {gap.gap.high:+.3f}]" if gap.gap.num_seeds > 1 else ""
    times = f"opened {gap.num_unseals} time{'s' if gap.num_unseals != 1 else ''}"
    return f"{best}; on test {gap.test.mean:.3f}, a gap of {gap.gap.mean:+.3f}{spread} (test was {times})."
