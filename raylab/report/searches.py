"""What a search tried: where the values of its arms differed, and every arm across the searched settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raylab.base.mistakes import JobError
from raylab.job.designs import as_setting, order_space
from raylab.job.settings import is_integer, resolve_target
from raylab.job.specs import ADAPTIVE, Choices, Range, Target
from raylab.report.drawing import start_figure, wrap_label
from raylab.report.parts import (
    MissingError,
    Part,
    Plot,
    Row,
    Section,
    Study,
    name_arm,
    name_settings,
    name_target,
    tell_cell,
    tell_level,
)
from raylab.results.ranking import rank_arms
from raylab.results.tables import plain_value
from raylab.statistics.importances import MEANINGS, Importance, Searched, list_searched, weigh_searched

# Parts of a conditional space with a panel of their own, those of most arms.
MOST_PARTS = 4
# Axes beside each other; more go on below.
MOST_AXES = 7
# Numbers in steps are drawn as levels where they have no more values than these.
MOST_LEVELS = 8
# Confirmed arms drawn over all others.
MOST_BEST = 3
STEPS = (1, 2, 5, 10)
# Where an axis shows arms that don't read its setting: under its lowest value.
UNREAD = -0.16
# How far arms of one level are spread about it, each way, at most.
SPREAD = 0.04
HATCHES = {"fANOVA": ("#595959", ""), "PED-ANOVA": ("white", "////")}


class Axis(NamedTuple):
    """A setting along an axis from 0 to 1: where each arm stands on it, and its ticks."""

    title: str
    places: Mapping[str, float]
    ticks: Sequence[tuple[float, str]]


def tell_search(study: Study) -> Section:
    """Importances by both methods, and the searched arms as parallel coordinates."""
    job = study.job
    if job.search.design not in ADAPTIVE:
        raise MissingError(f"{job.name} is no search ({job.search.design}); its settings have effects instead")
    arms = list_searched(study.results, job)
    known = {arm: value for arm, found in arms.items() if (value := found.targets[0]) is not None}
    if not known:
        raise MissingError("no arm of the search ran to the end with a value yet")
    lead = [
        f"{len(known)} arms were searched to the end, chosen by their results and each on "
        f"{len(job.search.seeds)} seed{'s' * (len(job.search.seeds) != 1)}. Importances tell where their values "
        "differed: not an ablation, nor which value of a setting is better.",
        f"Values here are of {tell_cell(resolve_target(job, job.search.targets[0]))}, on the search's seeds: those of "
        "the best are too high, as they were chosen by them. The ranking is on fresh seeds.",
    ]
    parts: list[Part] = []
    try:
        importances = weigh_searched(job, list(arms.values()))
        parts += _show_importances(importances)
        lead += _name_most(importances)
    except JobError as error:
        parts += [f"{problem[0].upper()}{problem[1:]}." for problem in error.problems]
    parts.append(_draw_coordinates(study, arms, known))
    return Section("importances", "What the search found important", lead, parts)


def _name_most(importances: Sequence[Importance]) -> list[str]:
    """The setting of the largest importance by each method, over all arms."""
    told = []
    short = name_settings({row.setting for row in importances})
    for target in dict.fromkeys(row.target for row in importances):
        names = []
        for method in MEANINGS:
            rows = [row for row in importances if (row.target, row.method, row.within) == (target, method, "")]
            if len(rows) > 1:
                first = max(rows, key=lambda row: row.importance)
                names.append(f"{short[first.setting]} ({first.importance:.2f} of 1) by {method}")
        if names:
            told.append(f"Of the largest importance for {target}: {', '.join(names)}.")
    return told


def _show_importances(importances: Sequence[Importance]) -> list[Part]:
    parts: list[Part] = [f"{method}: {meaning}." for method, meaning in MEANINGS.items()]
    for number, target in enumerate(dict.fromkeys(row.target for row in importances)):
        rows = [row for row in importances if row.target == target]
        parts.append(_draw_importances(rows, f"importances{f'-{number + 1}' if number else ''}", target))
    return parts


def _draw_importances(rows: Sequence[Importance], name: str, target: str) -> Plot:
    """A bar a method for each setting; a panel for all arms, and one for each part of a conditional space."""
    sizes = {row.within: row.num_arms for row in rows}
    short = name_settings({row.setting for row in rows})
    compared = {(row.within, row.setting, row.method) for row in rows}
    # What all arms of a part have alike is 0 by either method.
    shares = {(row.within, row.setting, row.method): row.importance for row in rows if row.importance > 0}
    settings: dict[str, list[str]] = {}
    for part in sorted(sizes, key=lambda part: (part != "", -sizes[part])):
        largest = {name: max(share for key, share in shares.items() if key[:2] == (part, name))
                   for name in dict.fromkeys(key[1] for key in shares if key[0] == part)}  # fmt: skip
        # Of a setting alone there is nothing to compare.
        if (len(largest) > 1 or not part) and len(settings) <= MOST_PARTS:
            settings[part] = sorted(largest, key=lambda name: -largest[name])
    parts = list(settings)
    # A part of the space has bars of fANOVA alone.
    heights = [0.55 + (0.28 if part else 0.42) * len(settings[part]) for part in parts]
    figure, panels = start_figure(
        len(parts), height=(0.5 + sum(heights)) / len(parts), gridspec_kw={"height_ratios": heights}, sharex=True
    )
    for panel, part in zip(panels[:, 0], parts, strict=True):
        methods = [method for method in HATCHES if any(key[0] == part and key[2] == method for key in shares)]
        for number, method in enumerate(methods):
            colour, hatch = HATCHES[method]
            aside = 0.38 * (number - (len(methods) - 1) / 2)
            for place, setting in enumerate(settings[part]):
                share = shares.get((part, setting, method))
                told = f" {share or 0.0:.2f}"
                if (part, setting, method) not in compared:
                    told = f" no {method}: not all arms read it"
                elif sum(key[::2] == (part, method) for key in compared) == 1:
                    told += ", as the only one that all arms read"
                look = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.8}
                panel.barh(place + aside, share or 0.0, 0.34, label=method if not place else None, **look)
                panel.text(share or 0.0, place + aside, told, va="center", fontsize=7)
        panel.set_yticks(range(len(settings[part])), [wrap_label(short[setting], 30) for setting in settings[part]])
        panel.set_ylim(len(settings[part]) - 0.5, -0.5)
        panel.set_xlim(0, 1.12 * max([0.1, *shares.values()]))
        where = f"arms of {part}" if part else "all searched arms"
        panel.set_title(wrap_label(f"{where} ({sizes[part]})", 80), loc="left", fontsize=9)
    panels[-1, 0].set_xlabel("importance; not an ablation")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    told = "; ".join(
        f"{method}{f' among arms of {part}' if part else ''}: "
        + ", ".join(f"{short[s]} {shares[part, s, method]:.2f}" for s in settings[part] if (part, s, method) in shares)
        for part in parts
        for method in HATCHES
        if any((part, s, method) in shares for s in settings[part])
    )
    left = len(sizes) - len(parts)
    alt = f"Importances for {target}, not an ablation. {told}." + (f" {left} more parts are in the table." * bool(left))
    return Plot(name, f"Importances for {target}: not an ablation", alt, figure, [row._asdict() for row in rows])


def _draw_coordinates(study: Study, arms: Mapping[str, Searched], known: Mapping[str, float]) -> Plot:
    """Every searched arm as a line across its settings to its value; the best confirmed ones thick, on top."""
    from matplotlib.collections import LineCollection

    job, target = study.job, study.job.search.targets[0]
    lower = target.mode == "min"
    # The best last, and so on top.
    order = sorted(known, key=lambda arm: known[arm], reverse=not lower)[::-1]
    names, short = order_space(job), name_settings(job.search.space)
    axes = [_place_setting(name, short[name], job.search.space[name], arms, order) for name in names]
    # What all arms have alike tells nothing.
    axes = [axis for axis in axes if len(axis.ticks) > 1] or axes[:1]
    value = _place_values(target, known, lower)
    size = math.ceil(len(axes) / math.ceil(len(axes) / MOST_AXES))
    chunks = [axes[start : start + size] for start in range(0, len(axes), size)]
    best = _find_best(study, known)
    figure, panels = start_figure(len(chunks), height=3.6 + 0.3 * len(best) / len(chunks))
    for panel, chunk in zip(panels[:, 0], chunks, strict=True):
        shown = [*chunk, value]
        lines = [[(x, axis.places[arm]) for x, axis in enumerate(shown)] for arm in order]
        ranks = np.linspace(0.86, 0.35, len(order)) if len(order) > 1 else [0.35]
        panel.add_collection(
            LineCollection(
                lines, colors=[str(round(grey, 3)) for grey in ranks], linewidths=0.6 if len(order) > 100 else 1
            )
        )
        for (arm, label), style in zip(best.items(), ("-", "--", ":"), strict=False):
            line = [axis.places[arm] for axis in shown]
            panel.plot(line, color="white", linewidth=5, zorder=3)
            panel.plot(line, color="black", linewidth=2.4, linestyle=style, zorder=4, label=label)
        _draw_axes(panel, shown)
    if best:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", handlelength=3.5)
    rows = [_list_row(study, arms[arm], arm, known[arm], best) for arm in reversed(order)]
    told = "; ".join(best.values())
    top, bottom = (f"{known[arm]:.3f}" for arm in (order[-1], order[0]))
    alt = (
        f"{len(order)} searched arms as lines across {', '.join(axis.title for axis in axes)} to their value on the "
        f"search's seeds, from {bottom} (light) to {top} (dark)"
        + (f". Thick: {told}." if told else ".")
    )  # fmt: skip
    title = f"The searched arms, darker the better; thick: the best confirmed. Value: {name_target(target)}"
    return Plot("search-coordinates", title, alt, figure, rows)


def _find_best(study: Study, known: Mapping[str, float]) -> dict[str, str]:
    """The confirmed arms of the best means over the fresh seeds, with what to call them."""
    job, target = study.job, study.job.search.targets[0]
    ranked = rank_arms(
        study.results, job, target.table, resolve_target(job, target), target.mode, "", arms=list(study.arms.rows)
    )
    own = [row for row in ranked if row.arm in known][:MOST_BEST]
    return {
        row.arm: wrap_label(f"{place}. confirmed {row.value.mean:.3f}: {name_arm(study, row.arm)}", 105)
        for place, row in enumerate(own, 1)
    }


def _list_row(study: Study, found: Searched, arm: str, value: float, best: Mapping[str, str]) -> Row:
    places = {name: place for place, name in enumerate(best, 1)}
    settings = {name: found.row[name] if name in found.values else None for name in order_space(study.job)}
    return {"arm": arm, "value": value, "confirmed_rank": places.get(arm), **settings}


def _place_setting(
    name: str, title: str, entry: Choices | Range, arms: Mapping[str, Searched], order: Sequence[str]
) -> Axis:
    """Levels evenly, numbers by size or logarithm; arms that don't read the setting stand under the axis."""
    values = {arm: _read_cell(name, arms[arm].values[name]) for arm in order if name in arms[arm].values}
    if not values:
        return Axis(title, {}, ())
    if isinstance(entry, Choices):
        levels = list(dict.fromkeys(_read_cell(name, value) for value in entry.choices))
        if all(isinstance(value, (int, float)) for value in levels):
            levels.sort()
    else:
        levels = sorted(set(values.values()))
    if isinstance(entry, Choices) or ((is_integer(name) or entry.step is not None) and len(levels) <= MOST_LEVELS):
        places, ticks = _place_levels(name, levels, values)
    else:
        places, ticks = _place_numbers(entry, values)
    if len(values) < len(order):
        ticks = [(UNREAD, "not read"), *ticks]
        others = [arm for arm in order if arm not in values]
        places |= {arm: UNREAD + _spread(number, len(others)) for number, arm in enumerate(others)}
    return Axis(title, places, ticks)


def _read_cell(name: str, value: Any) -> Any:
    """A value of the space as tables hold it."""
    return plain_value(as_setting(name, value))


def _spread(number: int, count: int) -> float:
    """How far aside one of so many arms stands: the more, the wider."""
    return SPREAD * min(1.0, count / 10) * (2 * number / max(count - 1, 1) - 1)


def _place_levels(
    name: str, levels: Sequence[Any], values: Mapping[str, Any]
) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Levels at equal distances, their arms spread about them: else many would lie on one line."""
    middle = {level: place / (len(levels) - 1) if len(levels) > 1 else 0.5 for place, level in enumerate(levels)}
    counts, members = dict.fromkeys(levels, 0), list(values.values())
    places = {}
    for arm, level in values.items():
        places[arm] = middle[level] + _spread(counts[level], members.count(level))
        counts[level] += 1
    return places, [(place, tell_level(name, level)) for level, place in middle.items()]


def _place_numbers(entry: Range, values: Mapping[str, float]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Numbers between the ends of their range."""
    from matplotlib.ticker import MaxNLocator

    low, high = (math.log(end) if entry.log else end for end in (entry.low, entry.high))

    def place(value: float) -> float:
        return ((math.log(value) if entry.log else value) - low) / (high - low)

    if entry.log:
        powers = range(math.floor(math.log10(entry.low)), math.ceil(math.log10(entry.high)) + 1)
        steps = (1,) if len(powers) > 3 else (1, 2, 5)
        marks = [float(f"{step}e{power}") for power in powers for step in steps]
    else:
        marks = [float(mark) for mark in MaxNLocator(4, steps=STEPS).tick_values(entry.low, entry.high)]
    marks = [mark for mark in marks if entry.low <= mark <= entry.high]
    # A narrow range may hold no round number, or one.
    marks = marks if len(marks) > 1 else [entry.low, entry.high]
    return {arm: place(value) for arm, value in values.items()}, [(place(mark), f"{mark:g}") for mark in marks]


def _place_values(target: Target, known: Mapping[str, float], lower: bool) -> Axis:
    """The last axis: the value, better ones up."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(known.values()), max(known.values())
    if low == high:
        return Axis(target.metric, dict.fromkeys(known, 0.5), [(0.5, f"{low:.3g}")])

    def place(value: float) -> float:
        share = (value - low) / (high - low)
        return 1 - share if lower else share

    marks = [float(mark) for mark in MaxNLocator(5, steps=STEPS).tick_values(low, high) if low <= mark <= high]
    digits = max((len(f"{mark:.4g}".partition(".")[2]) for mark in marks), default=0)
    places = {arm: place(value) for arm, value in known.items()}
    return Axis(target.metric, places, [(place(mark), f"{mark:.{digits}f}") for mark in marks])


def _draw_axes(panel: Any, axes: Sequence[Axis]) -> None:
    """An upright line for each axis with its ticks to the left, on white so that lines don't hide them."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.6, foreground="white")]
    for x, axis in enumerate(axes):
        panel.plot([x, x], [-SPREAD, 1 + SPREAD], color="black", linewidth=0.8, zorder=5)
        for place, label in axis.ticks:
            panel.plot([x - 0.02, x + 0.02], [place, place], color="black", linewidth=0.8, zorder=5)
            panel.text(x - 0.04, place, wrap_label(label, 14), ha="right", va="center", fontsize=7, path_effects=halo,
                       zorder=6)  # fmt: skip
    crowded = len(axes) > 5
    panel.set_xticks(range(len(axes)), [wrap_label(axis.title, 24) for axis in axes], fontsize=8,
                     **({"rotation": 20, "ha": "right"} if crowded else {}))  # fmt: skip
    panel.tick_params(axis="x", length=0)
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    unread = any(place < -SPREAD for axis in axes for place, _ in axis.ticks)
    panel.set_ylim(UNREAD - 2 * SPREAD if unread else -2 * SPREAD, 1 + 2 * SPREAD)
    panel.set_xlim(-0.55, len(axes) - 0.85)
