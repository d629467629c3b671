"""What a job asked and what its arms show: the declared comparison first, then the arms ranked."""

import math
from typing import Any

from raylab.base.mistakes import JobError
from raylab.job.designs import FIXED
from raylab.job.settings import resolve_target
from raylab.report.drawing import start_figure, wrap_label
from raylab.report.parts import MissingError, Part, Plot, Section, Study, Table, name_arm, tell_cell
from raylab.results.ranking import BASELINE, Interval, RankedArm, find_front, rank_arms
from raylab.statistics.analysis import analyse_job, measure_gap, name_given, tell_gap
from raylab.statistics.verdicts import PRIMARY, list_verdicts, tell_verdicts

# More arms than these would not fit on one figure; the table has all.
MOST_DRAWN = 30


def tell_question(study: Study) -> Section:
    """What the job asked, the verdict in words, and every comparison behind it."""
    job = study.job
    try:
        verdicts, notes = analyse_job(study.results, job, study.target)
    except JobError as error:  # the other sections still tell what there is
        verdicts, notes = [], list(error.problems)
    if job.analysis.primary is not None:
        asked = f"Declared in the job file (analysis.primary): {job.analysis.primary}?"
    else:
        asked = f"Asked: which of {len(study.arms.rows)} arms is best at {tell_cell(study.cell)}?"
    told = tell_verdicts(verdicts)
    if (gap := measure_gap(study.results, job, study.target)) is not None:
        told.append(tell_gap(gap))
    rows = list_verdicts(verdicts)
    columns = {
        "role": "part", "label_a": "A", "label_b": "B", "num_seeds": "seeds", "difference": "A - B", "low": "low",
        "high": "high", "p": "p", "p_holm": "p, Holm", "superiority": "A won", "seeds_needed": "seeds to decide",
    }  # fmt: skip
    about = (
        f"Compared at {tell_cell(study.cell)}, on validation. The seed is the unit: draws are averaged within it and "
        "arms are paired on shared seeds. Intervals are of 95 %: Student's t below 20 seeds, BCa from 20 on; p is of "
        "the sign-flip test, with Holm's correction over the exploratory comparisons. A won: the share of the shared "
        f"seeds on which A is better, which is {'lower' if study.target.mode == 'min' else 'higher'}."
    )
    if job.analysis.primary is not None:
        about += " Whether the primary comparison was declared before the data were seen, the tables can't tell."
    given = name_given(job)
    limits = f"All of it is said {given}: other splits were not tried." if given else "Splits vary with the seed."
    parts: list[Part] = [about, limits, *(f"{note[0].upper()}{note[1:]}." for note in notes)]
    if rows:
        rows = sorted(rows, key=lambda row: (row["role"] != PRIMARY, row["p_holm"] is None, row["p_holm"]))
        parts.append(Table("comparisons", "Comparisons, smallest p first", rows, columns))
    return Section("question", "Question and verdict", [asked, *told], parts)


def tell_arms(study: Study) -> Section:
    """The ranked arms with intervals and baselines, and with several targets their Pareto front."""
    job = study.job
    ranked = rank_arms(
        study.results, job, study.target.table, study.cell, study.target.mode, study.arms.base or "", "validation",
        list(study.arms.rows),
    )  # fmt: skip
    if not ranked:
        raise MissingError(f"no ranked arm has a value at {tell_cell(study.cell)}")
    rows = [_row(study, place, row) for place, row in enumerate(ranked, 1)]
    columns = {
        "rank": "rank", "label": "arm", "mean": "mean", "low": "low", "high": "high", "num_seeds": "seeds",
        "difference": "to base", "difference_low": "low", "difference_high": "high",
    }  # fmt: skip
    own = [row for row in ranked if not row.arm.startswith(BASELINE)]
    what = f"{'confirmed ' * (job.search.design not in FIXED)}arm{'s' * (len(own) != 1)}"
    lead = [
        f"{len(own)} {what} at {tell_cell(study.cell)}, best mean over seeds first"
        + (" (lower is better)." if study.target.mode == "min" else ".")
        + " Overlapping intervals do not mean that arms are equal, as they are compared in pairs; and an interval to "
        "the base without 0 shows nothing alone, as it is not corrected for the number of arms: the comparisons above "
        "tell what is shown."
    ]
    fewest, most = (pick(row.value.num_seeds for row in own) for pick in (min, max))
    if fewest < most:
        lead.append(
            f"The arms have {fewest} to {most} seeds: means over other seeds do not compare, and the order may change."
        )
    plot = _draw_ranking(study, ranked, rows)
    front = _table_front(study)
    return Section(
        "arms", "Arms ranked", lead, [plot, Table("arms", "Arms and baselines, best first", rows, columns), *front]
    )


def _row(study: Study, place: int, row: RankedArm) -> dict[str, Any]:
    settings = study.arms.rows.get(row.arm, {})
    low, high = _ends(row.value)
    found: dict[str, Any] = {
        "rank": place, "arm": row.arm, "label": name_arm(study, row.arm), "mean": row.value.mean, "low": low,
        "high": high, "num_seeds": row.value.num_seeds, "difference": None, "difference_low": None,
        "difference_high": None,
    }  # fmt: skip
    if row.difference is not None:
        low, high = _ends(row.difference)
        found |= {"difference": row.difference.mean, "difference_low": low, "difference_high": high}
    return found | {name: settings.get(name) for name in study.job.search.space}


def _ends(interval: Interval) -> tuple[float | None, float | None]:
    return (None, None) if math.isnan(interval.low) else (interval.low, interval.high)


def _draw_ranking(study: Study, ranked: list[RankedArm], rows: list[dict[str, Any]]) -> Plot:
    own = [row for row in ranked if not row.arm.startswith(BASELINE)][:MOST_DRAWN]
    lines = [row for row in ranked if row.arm.startswith(BASELINE)]
    names = [wrap_label(name_arm(study, row.arm), 46) for row in own]
    tallest = max(name.count("\n") for name in names) + 1
    figure, panels = start_figure(height=0.9 + (0.14 + 0.15 * tallest) * len(own))
    panel = panels[0, 0]
    for place, row in enumerate(own):
        is_base = row.arm == study.arms.base
        if not math.isnan(row.value.low):
            panel.plot([row.value.low, row.value.high], [place, place], color="#595959", linewidth=1.6)
        panel.plot(row.value.mean, place, "s" if is_base else "o", color="black", markersize=6,
                   markerfacecolor="white" if is_base else "black")  # fmt: skip
    for number, row in enumerate(lines):
        panel.axvline(row.value.mean, color="#595959", linestyle=("--", ":", "-.")[number % 3], linewidth=1.2,
                      label=name_arm(study, row.arm))  # fmt: skip
    panel.set_yticks(range(len(own)), names)
    panel.set_ylim(len(own) - 0.5, -0.5)
    panel.set_xlabel(f"{study.cell['metric']}, mean over seeds and 95 % interval; hollow: the base arm")
    panel.grid(axis="x")
    if lines:
        figure.legend(loc="outside upper right", ncols=len(lines))
    first, last, left = own[0], own[-1], len(ranked) - len(lines) - len(own)
    alt = (
        f"{len(own)} arms, best first, from {name_arm(study, first.arm)} with {first.value.mean:.3f} to "
        f"{name_arm(study, last.arm)} with {last.value.mean:.3f}"
        + "".join(f"; {name_arm(study, row.arm)} at {row.value.mean:.3f}" for row in lines)
        + (f"; {left} more arms are in the table." if left else ".")
    )  # fmt: skip
    return Plot("arms-ranked", f"Arms by {study.cell['metric']}", alt, figure, rows)


def _table_front(study: Study) -> list[Part]:
    """With several targets: the arms that no other beats on all of them."""
    job, targets = study.job, study.job.search.targets
    if len(targets) < 2:
        return []
    names = [f"{tell_cell(resolve_target(job, target))} ({target.mode})" for target in targets]
    front = find_front(study.results, job, study.arms.base or "", "validation", list(study.arms.rows))
    rows = [
        {"arm": name_arm(study, row.arm)} | {name: value.mean for name, value in zip(names, row.values, strict=True)}
        for row in front
    ]
    if not rows:
        return []
    return [Table("pareto-targets", "Pareto front: the arms that no other beats on every target", rows)]
