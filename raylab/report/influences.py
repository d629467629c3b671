"""What each setting of a fixed design does: its effects, and the means of its levels, alone and two by two."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raylab.job.designs import AROUND_BASE, FIXED, as_setting, list_levels
from raylab.report.drawing import WIDTH, list_styles, start_figure, wrap_label
from raylab.report.parts import MissingError, Part, Plot, Section, Study, Table, name_settings, tell_cell, tell_level
from raylab.results.ranking import Interval, compute_interval
from raylab.results.tables import plain_value
from raylab.statistics.analysis import ArmScores, read_scores
from raylab.statistics.comparisons import ALPHA
from raylab.statistics.effects import Effect, Levels, list_effect_rows, list_effects

# More would not fit on one figure, or not be read: the tables have all.
MOST_EFFECTS = 30
MOST_SENTENCES = 12
MOST_LEVELS = 6
MOST_LINES = 4
MOST_PANELS = 9
MOST_LETTERS = 18


class Means(NamedTuple):
    """The settings of a panel, and the mean over seeds at each combination of their levels."""

    names: tuple[str, ...]
    cells: dict[tuple[Any, ...], Interval]


def tell_effects(study: Study) -> Section:
    """The effects of a fixed design: first those that are shown, then all as a forest plot and a table."""
    job = study.job
    if job.search.design not in FIXED:
        raise MissingError(f"the arms of a search ({job.search.design}) are no design; it has importances instead")
    effects = list_effects(study.results, job, study.target)
    if not effects:
        raise MissingError(f"no arms with a value at {tell_cell(study.cell)} differ in one setting and share a seed")
    effects = sorted(effects, key=lambda effect: (effect.comparison.better is None, -abs(effect.comparison.difference)))
    single = job.search.design in AROUND_BASE and job.search.design != "factorial"
    about = (
        "An effect is one arm minus the base arm, which differ in one setting: interactions can't be seen in such a "
        "design. "
        if single
        else "A main effect is the difference between the means of two levels, over arms that are alike in all else; "
        "an interaction is how much larger one effect is where the other change is made too. "
    ) + (
        f"All are paired on seeds and are one family; shown are those with p under {ALPHA} after Holm's correction and "
        "an interval without 0."
    )
    if study.target.mode == "min":
        about += f" Lower is better: what raises {study.cell['metric']} is for the worse."
    rows = list_effect_rows(effects)
    columns = {
        "effect": "kind", "setting": "setting", "from": "from", "to": "to", "with": "with", "with_from": "from",
        "with_to": "to", "difference": "effect", "low": "low", "high": "high", "num_seeds": "seeds", "p": "p",
        "p_holm": "p, Holm", "shown": "shown",
    }  # fmt: skip
    parts: list[Part] = [about, _draw_forest(study, effects, rows)]
    if not single:
        parts += _draw_levels(study, effects)
    parts.append(Table("effects", "Effects, those shown first", rows, columns))
    return Section("effects", "What each setting does", _tell_shown(study, effects), parts)


def _tell_shown(study: Study, effects: Sequence[Effect]) -> list[str]:
    """Nothing is named that is not shown."""
    shown = [effect for effect in effects if effect.comparison.better is not None]
    of = f"of {len(effects)} effect{'s' * (len(effects) != 1)} at {tell_cell(study.cell)}"
    if not shown:
        rows = [effect.comparison for effect in effects]
        most, least = max(row.num_seeds for row in rows), rows[0].seeds_at_least
        short = (
            f": with {most} seed{'s' * (most != 1)} p is never under {min(row.smallest_p for row in rows):.2g}, at "
            f"least {least} are needed for so many"
            if most < least
            else ""
        )
        return [f"None {of} is shown{short}."]
    told = [effect.sentence for effect in shown[:MOST_SENTENCES]]
    more = len(shown) - len(told)
    first = f"{len(shown)} {of} {'is' if len(shown) == 1 else 'are'} shown{', largest first' * (len(shown) > 1)}."
    return [first, *told, *([f"{more} more that are shown stand in the table."] if more else [])]


def _draw_forest(study: Study, effects: Sequence[Effect], rows: Sequence[dict[str, Any]]) -> Plot:
    """Effects with intervals about a line at zero, main effects above interactions."""
    drawn = sorted(effects[:MOST_EFFECTS], key=lambda effect: effect.contrast.by is not None)
    labels = [wrap_label(effect.comparison.a, 50) for effect in drawn]
    figure, panels = start_figure(
        height=0.8 + 0.13 * len(drawn) + 0.14 * sum(1 + label.count("\n") for label in labels)
    )
    panel = panels[0, 0]
    panel.axvline(0, color="black", linewidth=0.9)
    for place, effect in enumerate(drawn):
        row, shown = effect.comparison, effect.comparison.better is not None
        if not math.isnan(row.low):
            panel.plot([row.low, row.high], [place, place], color="#595959", linewidth=1.6)
        panel.plot(row.difference, place, "s" if effect.contrast.by else "o", color="black", markersize=6,
                   markerfacecolor="black" if shown else "white")  # fmt: skip
    mains = sum(effect.contrast.by is None for effect in drawn)
    if 0 < mains < len(drawn):
        panel.axhline(mains - 0.5, color="#8c8c8c", linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(drawn)), labels, fontsize=8)
    panel.set_ylim(len(drawn) - 0.5, -0.5)
    panel.set_xlabel(f"change of {study.cell['metric']}, 95 % interval; filled: shown, hollow: not shown")
    panel.grid(axis="x")
    if mains < len(drawn):
        handles = [
            panel.plot([], [], mark, color="black", markersize=6, markerfacecolor="white", label=name)[0]
            for mark, name in (("o", "main effect"), ("s", "interaction"))
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2)
    told = "; ".join(
        f"{row.a} {row.difference:+.3g}" + ("" if math.isnan(row.low) else f" [{row.low:+.3g}, {row.high:+.3g}]")
        for row in (effect.comparison for effect in effects)
        if row.better is not None
    )
    left = len(effects) - len(drawn)
    alt = (
        f"{len(drawn)} effects with intervals about zero. "
        + (f"Shown: {told}." if told else "None is shown.")
        + (f" {left} smaller ones are in the table." if left else "")
    )
    return Plot("effects-forest", "Effects of the settings", alt, figure, rows)


def _draw_levels(study: Study, effects: Sequence[Effect]) -> list[Part]:
    """The means of each setting's levels, and of two settings' where an interaction is shown, else the largest."""
    arms = study.arms.rows
    scores = read_scores(study.results, study.job, study.cell, "validation", list(arms))
    levels = {arm: {name: row[name] for name in study.job.search.space} for arm, row in arms.items() if arm in scores}
    order = {name: found for name in study.job.search.space if len(found := _order_levels(study, name, levels)) > 1}
    few = [name for name in order if len(order[name]) <= MOST_LEVELS]
    pairs = dict.fromkeys(
        (effect.contrast.change.setting, effect.contrast.by.setting)
        for effect in effects
        if effect.contrast.by is not None
    )
    drawn = [
        # The one of more levels goes along the axis.
        (first, second) if len(order[first]) >= len(order[second]) else (second, first)
        for first, second in pairs
        if first in few and second in few and min(len(order[first]), len(order[second])) <= MOST_LINES
    ]
    plots: list[Part] = []
    for name, title, wanted in (
        ("effects-levels", "Mean of each setting's levels, other settings averaged over", [(name,) for name in few]),
        (
            "effects-interactions",
            "Two settings together; whether lines that run apart show anything, the effects tell",
            drawn,
        ),
    ):
        means = [Means(names, compute_means(levels, scores, names)) for names in wanted[:MOST_PANELS]]
        means = [found for found in means if len(found.cells) > 1]
        left = f" ({MOST_PANELS} of {len(wanted)})" if len(wanted) > MOST_PANELS else ""
        if means:
            plots.append(_draw_means(study, order, means, name, title + left))
    if plots:
        plots.append(
            "Intervals of means hold what all arms of a seed share, which cancels in the effects: means whose "
            "intervals overlap may still differ."
        )
    return plots


def _order_levels(study: Study, name: str, levels: Mapping[str, Levels]) -> list[Any]:
    """The levels of a setting that arms have: numbers from low to high, else as listed."""
    there = {own[name] for own in levels.values() if own[name] is not None}
    listed = [plain_value(as_setting(name, value)) for value in list_levels(study.job, name)]
    found = [value for value in listed if value in there]
    return sorted(found) if all(isinstance(value, (int, float)) for value in found) else found


def compute_means(
    levels: Mapping[str, Levels], scores: ArmScores, names: Sequence[str]
) -> dict[tuple[Any, ...], Interval]:
    """The mean over seeds at each combination of some settings' levels, of arms that are alike in all else.

    As in effects, arms are matched on the other settings that all of them read, and weigh the same within a match.
    None where a combination has no arm, or no seed is shared.
    """
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], list[str]]] = {}
    among = [arm for arm, own in levels.items() if all(own[name] is not None for name in names)]
    others = sorted({name for arm in among for name in levels[arm]} - set(names))
    others = [name for name in others if all(levels[arm][name] is not None for arm in among)]
    for arm in among:
        cell, match = (tuple(levels[arm][name] for name in group) for group in (names, others))
        cells.setdefault(cell, {}).setdefault(match, []).append(arm)
    crossed = math.prod(len({cell[place] for cell in cells}) for place in range(len(names)))
    matches = set.intersection(*(set(found) for found in cells.values())) if cells else set()
    used = [arm for found in cells.values() for match in matches for arm in found[match]]
    seeds = sorted(set.intersection(*(set(scores[arm]) for arm in used))) if used else []
    if not seeds or len(cells) < crossed:
        return {}
    by_seed = {arm: [float(np.mean(list(scores[arm][seed].values()))) for seed in seeds] for arm in used}
    return {
        cell: compute_interval(
            np.mean([np.mean([by_seed[arm] for arm in found[match]], 0) for match in matches], 0).tolist()
        )
        for cell, found in cells.items()
    }


def _draw_means(
    study: Study, order: Mapping[str, Sequence[Any]], means: Sequence[Means], name: str, title: str
) -> Plot:
    """A panel for each: levels along the axis, a line for each level of a second setting; one scale for all."""
    short = name_settings(order)
    columns = min(3, len(means))
    figure, panels = start_figure(
        math.ceil(len(means) / columns), columns, height=2.6, width=1 + (WIDTH - 1) * columns / 3, sharey=True
    )
    rows: list[dict[str, Any]] = []
    for panel, found in itertools.zip_longest(panels.flat, means):
        if found is None:
            panel.set_visible(False)
            continue
        first, second = found.names[0], found.names[1] if len(found.names) > 1 else None
        lines = [value for value in (order[second] if second else [None])]
        for number, (level, style) in enumerate(zip(lines, list_styles(), strict=False)):
            aside = 0.06 * (number - (len(lines) - 1) / 2)
            here = [
                (place, value, found.cells[key])
                for place, value in enumerate(order[first])
                if (key := (value, level) if second else (value,)) in found.cells
            ]
            for place, value, mean in here:
                if not math.isnan(mean.low):
                    panel.plot([place + aside] * 2, [mean.low, mean.high], color=style["color"], linewidth=1)
                rows.append(
                    {
                        "setting": first, "level": tell_level(first, value), "with": second,
                        "with_level": tell_level(second, level) if second else None, "mean": mean.mean,
                        "low": mean.low, "high": mean.high, "num_seeds": mean.num_seeds,
                    }
                )  # fmt: skip
            panel.plot([place + aside for place, *_ in here], [mean.mean for *_, mean in here], markersize=5,
                       label=wrap_label(tell_level(second, level), 20) if second else None, **style)  # fmt: skip
        _label_levels(panel, first, order[first])
        panel.set_xlabel(wrap_label(short[first], 26))
        panel.grid(axis="y")
        if second:
            panel.legend(title=wrap_label(short[second], 26), fontsize=7, title_fontsize=7, loc="best")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"mean {study.cell['metric']}")
    told = "; ".join(_tell_means(found, short) for found in means)
    return Plot(name, title, f"Means over seeds. {told}.", figure, rows)


def _label_levels(panel: Any, setting: str, levels: Sequence[Any]) -> None:
    """Levels along the axis; long names without their middle, where that still tells them apart."""
    full = [tell_level(setting, value) for value in levels]
    short = [name if len(name) <= MOST_LETTERS else f"{name[:9]}…{name[-8:]}" for name in full]
    labels = short if len(set(short)) == len(full) else full
    crowded = sum(map(len, labels)) > 26
    panel.set_xticks(range(len(levels)), labels, fontsize=8, **({"rotation": 35, "ha": "right"} if crowded else {}))
    panel.set_xlim(-0.4, len(levels) - 0.6)


def _tell_means(found: Means, short: Mapping[str, str]) -> str:
    def tell() -> Iterator[str]:
        for cell, mean in found.cells.items():
            where = ", ".join(
                f"{short[name]} {tell_level(name, value)}" for name, value in zip(found.names, cell, strict=True)
            )
            yield f"{where}: {mean.mean:.3f}"

    return ", ".join(tell()) if len(found.names) == 1 else "; ".join(tell())
