"""How the lengths and numbers of DeCLUTR's spans go together: mean values, and the documents long enough for them."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raylab.job.designs import FIXED
from raylab.job.specs import Range
from raylab.report.drawing import SHADES, start_figure, write_values
from raylab.report.parts import MissingError, Part, Plot, Section, Study, name_settings, name_target
from raylab.statistics.analysis import read_scores
from raylab.statistics.importances import list_searched

# Which settings span a surface: how long, and how many.
SURFACES = (
    ("pretrain.declutr.max_span", "pretrain.declutr.num_anchors"),
    ("pretrain.declutr.min_span", "pretrain.declutr.num_positives"),
)
# More values of a setting are drawn as ranges, of so many at most.
MOST_LEVELS = 8
NUM_RANGES = 6


class Point(NamedTuple):
    """An arm: its settings, its value, and what its spans made of the documents (None: not kept)."""

    row: Mapping[str, Any]
    value: float
    spans: Mapping[str, float] | None


def tell_spans(study: Study) -> Section:
    """Mean value and documents kept at each combination of span length and number, where both vary."""
    varied = [names for names in SURFACES if all(name in study.job.search.space for name in names)]
    # Read only where there may be something to show.
    points = _list_points(study) if varied else []
    drawn = [pair for names in varied if (pair := _draw_surface(study, names, points)) is not None]
    if not drawn:
        short = name_settings(name for names in SURFACES for name in names)
        pairs = " or ".join(" with ".join(short[name] for name in names) for names in SURFACES)
        raise MissingError(f"the arms don't vary a length of spans with a number of them ({pairs})")
    alike = (
        "Each cell is the mean over its arms. "
        if study.job.search.design in FIXED
        else "Each cell is the mean over the searched arms in it, which differ in other settings too and were chosen "
        "by their results. "
    ) + "It describes them and compares none: no interval, no test."
    about = (
        "A document is kept for training where it is long enough for its spans. Short ones that shrink their spans "
        "(short_documents) are kept too, with a longest span under max_span: the median over documents tells how long."
    )
    return Section(
        "spans", "Span lengths and numbers", [told for told, _ in drawn], [alike, about, *(p for _, p in drawn)]
    )


def _list_points(study: Study) -> list[Point]:
    job = study.job
    found: list[tuple[Mapping[str, Any], float]]
    if job.search.design in FIXED:
        scores = read_scores(study.results, job, study.cell, "validation", list(study.arms.rows))
        found = [
            (study.arms.rows[arm], float(np.mean([np.mean(list(draws.values())) for draws in seeds.values()])))
            for arm, seeds in scores.items()
        ]
    else:
        arms = list_searched(study.results, job).values()
        found = [(arm.row, value) for arm in arms if (value := arm.targets[0]) is not None]
    return [Point(row, value, json.loads(row["effective_spans"] or "null")) for row, value in found]


def _draw_surface(study: Study, names: tuple[str, str], points: Sequence[Point]) -> tuple[str, Part] | None:
    """A heat map of values above one of documents kept; None where a setting does not vary."""
    points = [point for point in points if all(point.row[name] is not None for name in names)]
    levels = [_group(study, name, [point.row[name] for point in points]) for name in names]
    if min(len(set(found)) for found in levels) < 2:
        return None
    ticks = [list(dict.fromkeys(sorted(found))) for found in levels]
    cells: dict[tuple[Any, Any], list[Point]] = {}
    for point, *key in zip(points, *levels, strict=True):
        cells.setdefault((key[0], key[1]), []).append(point)
    target = study.target if study.job.search.design in FIXED else study.job.search.targets[0]
    short, what = name_settings(names), name_target(target)
    rows: list[dict[str, Any]] = [
        {
            short[names[0]]: length[1], short[names[1]]: number[1], "num_arms": len(found),
            "mean_value": _mean([point.value for point in found]),
            "documents_kept": _mean_span(found, "documents"), "share_kept": _mean_span(found, "share"),
            "median_max_span": _mean_span(found, "median_max_span"),
        }
        for length, number in itertools.product(*ticks)
        if (found := cells.get((length, number)))
    ]  # fmt: skip
    known = any(row["documents_kept"] is not None for row in rows)
    figure, panels = start_figure(1 + known, height=1.1 + 0.42 * len(ticks[1]), sharex=True)
    values = _fill(ticks, cells, lambda found: _mean([point.value for point in found]))
    arms = _fill(ticks, cells, lambda found: f"{len(found)} arm{'s' * (len(found) != 1)}", "")
    _draw_map(panels[0, 0], values, "{:.3f}", arms, f"mean {what}")
    if known:
        kept = _fill(ticks, cells, lambda found: _mean_span(found, "documents"))
        spans = _fill(ticks, cells, _tell_spans, "")
        _draw_map(
            panels[1, 0], kept, "{:,.0f}", spans, "documents kept for training, their share and median longest span"
        )
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(ticks[1])), [label for _, label in ticks[1]])
        panel.set_ylabel(short[names[1]])
    panels[-1, 0].set_xticks(range(len(ticks[0])), [label for _, label in ticks[0]])
    panels[-1, 0].set_xlabel(short[names[0]])
    ranked = sorted(rows, key=lambda row: row["mean_value"], reverse=target.mode == "max")

    def tell(row: Mapping[str, Any]) -> str:
        kept = "" if row["documents_kept"] is None else f", {row['documents_kept']:,.0f} documents kept"
        where = f"{short[names[0]]} {row[short[names[0]]]} and {short[names[1]]} {row[short[names[1]]]}"
        return f"{row['mean_value']:.3f} at {where} ({row['num_arms']} arm{'s' * (row['num_arms'] != 1)}{kept})"

    told = f"Mean {what}: best {tell(ranked[0])}, worst {tell(ranked[-1])}."
    name = "-".join(name.replace("_", "-") for name in short.values())
    alt = f"{len(rows)} combinations. {told}"
    return told, Plot(f"surface-{name}", f"{' and '.join(short.values())}: {what}", alt, figure, rows)


def _group(study: Study, name: str, values: Sequence[int]) -> list[tuple[int, str]]:
    """Each value's place and label: its own where there are few, else that of a range."""
    levels = sorted(set(values))
    if len(levels) <= MOST_LEVELS:
        return [(value, f"{value:,}") for value in values]
    entry = study.job.search.space[name]
    space = np.geomspace if isinstance(entry, Range) and entry.log else np.linspace
    edges = sorted({round(edge) for edge in space(levels[0], levels[-1] + 1, NUM_RANGES + 1)})
    places = np.searchsorted(edges, values, side="right") - 1
    return [(edges[place], f"{edges[place]:,} to {edges[place + 1] - 1:,}") for place in places]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_span(points: Sequence[Point], key: str) -> float | None:
    known = [point.spans[key] for point in points if point.spans is not None]
    return _mean(known) if known else None


def _tell_spans(points: Sequence[Point]) -> str:
    share, longest = (_mean_span(points, key) or 0.0 for key in ("share", "median_max_span"))
    return f"{100 * share:.0f} %, {longest:.0f}"


def _fill(
    ticks: Sequence[Sequence[Any]], cells: Mapping[Any, list[Point]], tell: Any, empty: Any = None
) -> list[list[Any]]:
    """Numbers upwards, lengths along: rows of what is told of each cell."""
    return [
        [tell(cells[length, number]) if (length, number) in cells else empty for length in ticks[0]]
        for number in ticks[1]
    ]


def _draw_map(
    panel: Any, values: Sequence[Sequence[float | None]], form: str, below: Sequence[Sequence[str]], title: str
) -> None:
    numbers = np.array(values, float)
    panel.imshow(numbers, cmap=SHADES, aspect="auto", origin="lower")
    # Combinations without an arm.
    panel.patch.set(hatch="///", edgecolor="#c8c8c8", linewidth=0)
    write_values(panel, numbers, np.nanmin(numbers), np.nanmax(numbers), form, below=below)
    panel.set_title(title, loc="left", fontsize=9)
