"""The shape of the embedding spaces: cosines within and between classes, graphs by threshold, and metrics of all arms.

All from the table `geometry`: validation, last rung, mean over the seeds of ranked trials.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raylab.measures.definitions import BIN_WIDTH, BINS, DEFINITIONS
from raylab.report.drawing import label_powers, list_styles, start_figure
from raylab.report.parts import MissingError, Part, Plot, Row, Section, Study, Table, name_arm
from raylab.report.picks import Pick, list_best, pick_encoders, tell_picks, write_title
from raylab.results.queries import open_tables

Key = tuple[str, float | None]
GRAPHS = {
    "graph": ("fixed threshold", "cosine from which points are joined"),
    "density": ("matched density", "share of the pairs that are joined"),
    "centred": ("centred", "cosine less the mean vector"),
}
MOST_TICKS = 6
GAUSSIAN = "Gaussian vectors"
MEASURES = {
    "components": "components",
    "largest_share": "share in the largest",
    "isolated_share": "share without an edge",
}
BETTER = {"max": "higher", "min": "lower", "none": ""}
REFERENCES = {"labels": "shuffled labels", "pairs": "random pairs", "gaussian": GAUSSIAN}
# Of the pairs, in a bin that is drawn.
LEAST_SHARE = 0.001
# Of a table that has all, those that fit on a page.
MAIN = (
    "uniformity", "anisotropy", "rankme", "isoscore", "cosine_within", "cosine_between", "silhouette", "knn_purity",
)  # fmt: skip


class Measured(NamedTuple):
    """A metric of an arm: its mean and its reference's over seeds, None where it is not defined or not asked for."""

    value: float | None
    reference: float | None


Space = Mapping[Key, Measured]


def tell_shapes(study: Study) -> Section:
    """Cosine histograms and components of the start, the base and the best arm, and the metrics of every ranked arm."""
    task = study.cell["task"]
    ranked = list_best(study)
    picks = pick_encoders(study, ranked)
    spaces = read_spaces(study, task, [pick.arm for pick in picks])
    found = [(pick, spaces[pick.arm, pick.rung]) for pick in picks if (pick.arm, pick.rung) in spaces]
    if not found:
        raise MissingError(f"no ranked arm has geometry of {task}")
    lead = [f"Of {task}'s validation embeddings, mean over seeds."]
    for pick, space in found:
        within, between = (_value(space, name) for name in ("cosine_within", "cosine_between"))
        if within is not None and between is not None:
            lead[0] += (
                f" {pick.role.capitalize()}: mean cosine {within:.3f} within classes, {between:.3f} between, "
                f"{within - between:+.3f} apart."
            )
    parts: list[Part] = [
        tell_picks(picks),
        "Cosines and graphs compare encoders only together with their references: where all vectors point one way, "
        "every cosine is high. Shuffled labels say what classes of such sizes have by chance, Gaussian vectors what as "
        "many independent vectors of such a length have. A matched density joins the same share of the pairs in every "
        "space, so that its graphs compare; the centred graph has the mean vector subtracted. None of this is a score.",
    ]
    parts += _draw_cosines(task, found)
    parts += _draw_components(task, found)
    parts.append(_table_metrics(found, [spaces[arm, None] for arm in ranked if (arm, None) in spaces]))
    parts.append(_table_arms(study, ranked, spaces))
    return Section("shapes", "Shape of the embedding spaces", lead, parts)


def read_spaces(study: Study, task: str, more: Sequence[str] = ()) -> dict[tuple[str, int | None], dict[Key, Measured]]:
    """(arm, None for the last rung or 1 for the first of several) -> metric and parameter -> its mean over seeds.

    Of `more` arms that are not ranked, all complete trials count.
    """
    arms = [*study.arms.rows, *more]
    rows = open_tables(study.results, "trials geometry", study.job.name).execute(
        """
        select t.arm, if(s.rung = t.num_rungs, null, s.rung), s.metric, s.parameter,
            avg(s.value) filter (not isnan(s.value)), avg(s.reference) filter (not isnan(s.reference))
        from geometry s join trials t using (job, trial_id)
        where job = ? and t.status = 'complete' and t.arm in (select unnest(?))
            and (t.phase in ('fixed', 'confirm') or t.arm not in (select unnest(?)))
            and s.task = ? and s.split = 'validation' and (s.rung = t.num_rungs or s.rung = 1)
        group by all order by all
        """,
        [study.job.name, arms, list(study.arms.rows), task],
    ).fetchall()  # fmt: skip
    found: dict[tuple[str, int | None], dict[Key, Measured]] = {}
    for arm, rung, metric, parameter, value, reference in rows:
        found.setdefault((arm, rung), {})[metric, parameter] = Measured(value, reference)
    return found


def _value(space: Space, metric: str, parameter: float | None = None) -> float | None:
    measured = space.get((metric, parameter))
    return None if measured is None else measured.value


def _draw_cosines(task: str, found: Sequence[tuple[Pick, Space]]) -> list[Part]:
    """The cosines of pairs within and between classes, a panel an encoder."""
    rows: list[Row] = []
    told, panels_of = [], []
    for pick, space in found:
        shares = {
            name: [_value(space, f"cosine_{name}_share", left) or 0.0 for left in BINS]
            for name in ("within", "between")
        }
        all_pairs = [measured.reference if (measured := space.get(("cosine_within_share", left))) else None
                     for left in BINS]  # fmt: skip
        if not any(shares["within"]) and not any(shares["between"]):
            continue
        panels_of.append((pick, shares, all_pairs))
        rows += [
            {"encoder": pick.role, "cosine_from": left, "cosine_to": round(left + BIN_WIDTH, 1), "within": within,
             "between": between, "all_pairs": every}
            for left, within, between, every in zip(BINS, *shares.values(), all_pairs, strict=True)
        ]  # fmt: skip
        tops = [
            f"{name} {_tell_bin(*max(zip(values, BINS, strict=True)))}" if any(values) else f"{name} there are none"
            for name, values in zip(("of pairs within a class", "between classes"), shares.values(), strict=True)
        ]
        told.append(f"{pick.role}: {', '.join(tops)}")
    if not rows:
        return []
    figure, panels = start_figure(1, len(panels_of), height=2.9, sharex=True, sharey=True)
    edges = [*BINS, 1.0]
    filled = [
        left for row in rows for left in [row["cosine_from"]] if max(row["within"], row["between"]) >= LEAST_SHARE
    ]
    for panel, (pick, shares, all_pairs) in zip(panels.flat, panels_of, strict=True):
        panel.stairs(shares["within"], edges, fill=True, color="#d0d0d0", label="within classes")
        panel.stairs(shares["within"], edges, color="#8c8c8c", linewidth=0.8)
        panel.stairs(shares["between"], edges, color="black", linewidth=1.4, label="between classes")
        if None not in all_pairs:
            panel.stairs(all_pairs, edges, color="black", linewidth=1.0, linestyle=":", label="all pairs")
        panel.set_title(write_title(pick.role, pick.label, len(panels_of)))
        panel.set_xlabel("cosine")
        panel.set_xlim(min(filled) - BIN_WIDTH, min(1.0, max(filled) + 2 * BIN_WIDTH))
    panels[0, 0].set_ylabel("share of the pairs")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return [Plot("cosines", f"Cosines of pairs of {task}'s validation rows", "; ".join(told) + ".", figure, rows)]


def _tell_bin(share: float, left: float) -> str:
    return f"most, {share:.0%}, have a cosine of {left:.1f} to {left + BIN_WIDTH:.1f}"


def _draw_components(task: str, found: Sequence[tuple[Pick, Space]]) -> list[Part]:
    """Components, the largest's share and the isolated by threshold, density and centred threshold."""
    rows: list[Row] = [
        {"encoder": pick.role, "graph": graph, "parameter": parameter}
        | {name: _value(space, f"{graph}_{name}", parameter) for name in MEASURES}
        | {f"{name}_gaussian": space.get((f"{graph}_{name}", parameter), Measured(None, None)).reference
           for name in MEASURES}
        for graph in GRAPHS
        for pick, space in found
        for parameter in sorted(p for metric, p in space if metric == f"{graph}_components" and p is not None)
    ]  # fmt: skip
    graphs = [graph for graph in GRAPHS if any(row["graph"] == graph for row in rows)]
    if not graphs:
        return []
    figure, panels = start_figure(len(MEASURES), len(graphs), height=1.9, sharey="row", sharex="col")
    for column, graph in enumerate(graphs):
        for line, (measure, title) in enumerate(MEASURES.items()):
            here = [row for row in rows if row["graph"] == graph]
            _draw_lines(panels[line, column], here, measure)
            if column == 0:
                panels[line, column].set_ylabel(title)
        panels[0, column].set_title(GRAPHS[graph][0])
        at = sorted({row["parameter"] for row in rows if row["graph"] == graph})
        if graph == "density":
            panels[-1, column].set_xscale("log")
            label_powers(panels[-1, column].xaxis)
        if len(at) <= MOST_TICKS:
            panels[-1, column].set_xticks(at, [f"{value:g}" for value in at])
            panels[-1, column].set_xticks([], minor=True)
        panels[-1, column].set_xlabel(GRAPHS[graph][1], fontsize=8)
    most = max((row["components"] or 1 for row in rows), default=1)
    if most > 20:
        panels[0, 0].set_yscale("log")
        label_powers(panels[0, 0].yaxis)
    handles = sorted(panels[0, 0].get_legend_handles_labels()[0], key=lambda line: line.get_label() == GAUSSIAN)
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return [
        Plot("components", f"Components of graphs over {task}'s validation rows", _tell_components(rows), figure, rows)
    ]


def _draw_lines(panel: Any, rows: Sequence[Row], measure: str) -> None:
    """A line an encoder; Gaussian vectors once, or for each encoder where their numbers differ."""
    drawn: list[list[float]] = []
    # The first marks are the largest: where lines lie on each other, all show.
    sizes = itertools.chain((8.0, 5.5), itertools.repeat(3.5))
    for encoder, style, size in zip(dict.fromkeys(row["encoder"] for row in rows), list_styles(), sizes, strict=False):
        own = [row for row in rows if row["encoder"] == encoder]
        x = [row["parameter"] for row in own]
        values, gaussian = ([_or_nan(row[name]) for row in own] for name in (measure, f"{measure}_gaussian"))
        panel.plot(x, values, color=style["color"], marker=style["marker"], markersize=size, linewidth=1.3,
                   label=encoder)  # fmt: skip
        if gaussian not in drawn and not all(map(math.isnan, gaussian)):
            panel.plot(x, gaussian, color="#8c8c8c", linestyle="--", linewidth=1.2,
                       label=None if drawn else GAUSSIAN)  # fmt: skip
            drawn.append(gaussian)
    panel.grid(axis="y")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _tell_components(rows: Sequence[Row]) -> str:
    told = []
    for row in rows:
        if row["components"] is None:
            continue
        gaussian = row["components_gaussian"]
        told.append(
            f"{row['encoder']}, {row['graph']} {row['parameter']:g}: {row['components']:.0f} components"
            + (f" (Gaussian {gaussian:.0f})" if gaussian is not None else "")
            + (f", {row['largest_share']:.0%} in the largest" if row["largest_share"] is not None else "")
            + (f", {row['isolated_share']:.0%} without an edge" if row["isolated_share"] is not None else "")
        )
    return "; ".join(told) + "."


def _list_single(space: Space) -> list[Key]:
    """The metrics of one number, and purity at each number of neighbours: not the histograms, nor the graphs."""
    return [
        (metric, parameter)
        for metric in DEFINITIONS
        for parameter in sorted({p for name, p in space if name == metric}, key=lambda p: p or 0.0)
        if DEFINITIONS[metric].parameter is None
        or metric == "knn_purity"
        or (isinstance(DEFINITIONS[metric].parameter, tuple) and len(DEFINITIONS[metric].parameter or ()) == 1)
    ]


def _name(key: Key) -> str:
    metric, parameter = key
    return f"{metric} at {parameter:g}" if metric == "knn_purity" and parameter is not None else metric


def _table_metrics(found: Sequence[tuple[Pick, Space]], spaces: Sequence[Space]) -> Table:
    """A row a metric: direction, the shown encoders' values, the best one's reference, the range over ranked arms."""
    rows: list[Row] = []
    last = found[-1][1]
    for key in _list_single(last):
        definition = DEFINITIONS[key[0]]
        values = [space[key].value for space in spaces if key in space]
        defined = [value for value in values if value is not None]
        rows.append(
            {"metric": _name(key), "better": BETTER[definition.direction]}
            | {pick.role: space[key].value if key in space else None for pick, space in found}
            | {"reference": last[key].reference, "reference_is": REFERENCES[definition.reference],
               "lowest": min(defined, default=None), "highest": max(defined, default=None), "unit": definition.unit,
               "definition": definition.text, "source": definition.source}
        )  # fmt: skip
    columns = {"metric": "metric", "better": "better"} | {pick.role: pick.role for pick, _ in found}
    columns |= {"reference": "reference", "reference_is": "of", "lowest": "lowest arm", "highest": "highest arm",
                "unit": "unit"}  # fmt: skip
    title = "Metrics of the spaces, mean over seeds; reference of the last encoder; lowest and highest of ranked arms"
    return Table("geometry", title, rows, columns, shown=30)


def _table_arms(study: Study, ranked: Sequence[str], spaces: Mapping[tuple[str, int | None], Space]) -> Table:
    """A row a ranked arm, a column a metric; in the file also each one's reference."""
    keys = list(
        dict.fromkeys(key for arm in ranked if (arm, None) in spaces for key in _list_single(spaces[arm, None]))
    )
    rows: list[Row] = []
    for arm in ranked:
        space = spaces.get((arm, None))
        if space is not None:
            blank = Measured(None, None)
            rows.append(
                {"arm": name_arm(study, arm)}
                | {_name(key): space.get(key, blank).value for key in keys}
                | {f"{_name(key)}, reference": space.get(key, blank).reference for key in keys}
            )
    shown = [key for key in keys if key[0] in MAIN]
    better = {key: BETTER[DEFINITIONS[key[0]].direction] for key in shown}
    columns = {"arm": "arm"} | {_name(key): f"{_name(key)} ({better[key]})" for key in shown}
    title = (
        "Metrics of the ranked arms, best arm first; in brackets which way is better; the file has all, with references"
    )
    return Table("geometry-arms", title, rows, columns)
