"""What each setting does in a fixed design: main effects and two-way interactions, paired on seeds.

An effect is a contrast of arms, taken on each seed and draw: what is equal on a seed cancels. All effects of a design
are one family for Holm's correction.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raylab.base.mistakes import JobError
from raylab.job.designs import AROUND_BASE, FIXED, as_setting, list_levels
from raylab.job.settings import label_values, list_settings, resolve_target
from raylab.job.specs import Job, Target
from raylab.results.tables import plain_value
from raylab.statistics.analysis import default_target, list_arms, name_given, read_scores
from raylab.statistics.comparisons import Comparison, Scores, compare_paired
from raylab.statistics.verdicts import as_row, tell_comparison, tell_doubt, tell_numbers

# Setting -> its value as the tables hold it; null where the arm does not read the setting.
Levels = Mapping[str, Any]


class Change(NamedTuple):
    """A setting that goes from one level to another."""

    setting: str
    start: Any
    end: Any


class Contrast(NamedTuple):
    """An effect as weights of arms: of one change, or of how two changes add up (`by`: the second)."""

    change: Change
    by: Change | None
    weights: dict[str, float]


class Effect(NamedTuple):
    """A contrast, what it came to, and what that shows in one sentence."""

    contrast: Contrast
    sentence: str
    comparison: Comparison


def weigh_change(levels: Mapping[str, Levels], changes: Sequence[Change]) -> dict[str, float]:
    """The arms' weights in the effect of one change, or in the interaction of two; none where no arms are alike else.

    Arms are matched on every other setting that all of them read, and weigh the same within a match: in a factorial
    that is the difference of the levels' means. What only some of them read (spans, beside another objective) is
    averaged over.
    """
    corners: dict[tuple[bool, ...], list[str]] = {}
    for ends in itertools.product((False, True), repeat=len(changes)):
        wanted = [(c.setting, c.end if end else c.start) for c, end in zip(changes, ends, strict=True)]
        corners[ends] = [arm for arm, own in levels.items() if all(own.get(name) == value for name, value in wanted)]
    among = [arm for members in corners.values() for arm in members]
    changed = {change.setting for change in changes}
    names = sorted({name for arm in among for name in levels[arm]} - changed)
    shared = [name for name in names if all(levels[arm].get(name) is not None for arm in among)]
    matched: dict[tuple[Any, ...], dict[tuple[bool, ...], list[str]]] = {}
    for ends, members in corners.items():
        for arm in members:
            key = tuple(levels[arm][name] for name in shared)
            matched.setdefault(key, {}).setdefault(ends, []).append(arm)
    whole = [parts for parts in matched.values() if len(parts) == len(corners)]
    weights: dict[str, float] = {}
    for parts in whole:
        for ends, members in parts.items():
            # (end, end) - (start, end) - (end, start) + (start, start); of one change end - start.
            sign = (-1.0) ** (len(changes) - sum(ends))
            for arm in members:
                weights[arm] = sign / (len(whole) * len(members))
    return weights


def list_contrasts(levels: Mapping[str, Levels], ordered: Mapping[str, Sequence[Any]]) -> list[Contrast]:
    """Main effects of each level against the first of `ordered` that an arm has, then all two-way interactions."""
    changes = []
    for name, values in ordered.items():
        there = [value for value in values if any(own.get(name) == value for own in levels.values())]
        changes += [Change(name, there[0], value) for value in there[1:]]
    found = [Contrast(change, None, weigh_change(levels, [change])) for change in changes]
    for first, second in itertools.combinations(changes, 2):
        if first.setting != second.setting:
            found.append(Contrast(first, second, weigh_change(levels, [first, second])))
    return [contrast for contrast in found if contrast.weights]


def list_single_changes(
    levels: Mapping[str, Levels], base: str, ordered: Mapping[str, Sequence[Any]]
) -> list[Contrast]:
    """Each arm that changes one setting of the base arm, against it."""
    found = []
    for arm, own in levels.items():
        # The base arm reads every setting of the space; one that a change makes unread is null.
        other = [name for name in ordered if own.get(name) is not None and own.get(name) != levels[base].get(name)]
        if arm != base and len(other) == 1:
            change = Change(other[0], levels[base].get(other[0]), own[other[0]])
            found.append(Contrast(change, None, {arm: 1.0, base: -1.0}))
    return found


def apply_contrast(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> dict[Any, dict[Any, float]]:
    """Seed -> draw -> the contrast, where every arm that it weighs has a value; seeds without one are left out."""
    first, *others = weights
    found: dict[Any, dict[Any, float]] = {}
    for seed, draws in scores.get(first, {}).items():
        for draw in draws:
            if all(draw in scores.get(arm, {}).get(seed, {}) for arm in others):
                value = sum(weight * scores[arm][seed][draw] for arm, weight in weights.items())
                found.setdefault(seed, {})[draw] = value
    return found


def compute_effects(
    scores: Mapping[str, Scores], contrasts: Sequence[Contrast], *, mode: str = "max", given: str = ""
) -> list[Effect]:
    """Each contrast with interval, sign-flip test and Holm over all; those of no shared seed are left out."""
    paired = [(contrast, apply_contrast(scores, contrast.weights)) for contrast in contrasts]
    paired = [(contrast, rows) for contrast, rows in paired if rows]
    compared = compare_paired(
        [(_name(contrast), "0") for contrast, _ in paired], [rows for _, rows in paired],
        mode="min" if mode == "min" else "max",
    )  # fmt: skip
    return [
        Effect(contrast, _tell(contrast, row, given), row) for (contrast, _), row in zip(paired, compared, strict=True)
    ]


def list_effects(results: Path, job: Job, target: Target | None = None, split: str = "validation") -> list[Effect]:
    """The effects of a job's settings in a cell: of a grid or factorial all contrasts, else single changes of the base.

    Raises JobError for a search, whose arms were chosen by their results: it has importances instead.
    """
    if job.search.design not in FIXED:
        raise JobError(
            [f"effects: {job.name} is a search ({job.search.design}), whose arms are no design; see importances"]
        )
    target, arms = target or default_target(job), list_arms(results, job)
    scores = read_scores(results, job, resolve_target(job, target), split, list(arms.rows))
    levels = {arm: {name: row[name] for name in job.search.space} for arm, row in arms.rows.items() if arm in scores}
    ordered = {name: _order(job, name) for name in job.search.space}
    if job.search.design in AROUND_BASE and job.search.design != "factorial":
        contrasts = list_single_changes(levels, arms.base, ordered) if arms.base in levels else []
    else:
        contrasts = list_contrasts(levels, ordered)
    return compute_effects(scores, contrasts, mode=target.mode, given=name_given(job))


def _order(job: Job, name: str) -> list[Any]:
    """A setting's levels as the tables hold them, the base arm's own in front: effects start from it."""
    listed = [plain_value(as_setting(name, value)) for value in list_levels(job, name)]
    own = plain_value(list_settings(job)[name])
    return sorted(listed, key=lambda value: value != own)


def _step(change: Change) -> str:
    name = change.setting.rsplit(".", 1)[-1]
    start, end = (label_values({change.setting: value}).partition("=")[2] for value in (change.start, change.end))
    return f"{name} {start} to {end}"


def _name(contrast: Contrast) -> str:
    return _step(contrast.change) + (f" x {_step(contrast.by)}" if contrast.by else "")


def _tell(contrast: Contrast, row: Comparison, given: str) -> str:
    if row.num_seeds < 2:
        return tell_comparison(row, _name(contrast), "no effect", given)
    if row.better is None:
        return tell_doubt(row, f"No effect shown of {_name(contrast)}: {tell_numbers(row)}", given)
    if contrast.by is None:
        what = f"{_step(contrast.change)} {'raises' if row.difference > 0 else 'lowers'} the score"
    else:
        more = "more" if row.difference > 0 else "less"
        what = f"{_step(contrast.change)} adds {more} where {_step(contrast.by)} is done too"
    return f"{what}: {tell_numbers(row)}" + (f"; {given}." if given else ".")


def list_effect_rows(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """Effects as rows of plain values; `difference` is the effect."""
    rows = []
    for contrast, sentence, comparison in effects:
        by = contrast.by or Change("", None, None)
        values = as_row(comparison)
        rows.append(
            {
                "effect": "interaction" if contrast.by else "main", "setting": contrast.change.setting,
                "from": contrast.change.start, "to": contrast.change.end, "with": by.setting or None,
                "with_from": by.start, "with_to": by.end, "num_arms": len(contrast.weights),
                "shown": comparison.better is not None, "verdict": sentence,
            }
            | {name: value for name, value in values.items() if name not in ("a", "b", "better")}
        )  # fmt: skip
    return rows
