"""What an encoder scores by shots and freeze depth, and what that takes: parameters updated and training time."""

import math
from typing import Any

import numpy as np

from raylab.base.counts import FEWEST, show_count
from raylab.job.specs import Target
from raylab.report.drawing import SHADES, label_powers, list_styles, start_figure, wrap_label, write_values
from raylab.report.parts import MissingError, Part, Plot, Section, Study, Table, ask, name_arm
from raylab.results.queries import list_ranked, open_tables
from raylab.results.ranking import BASELINE, compute_interval

# Arms of a heat map, and lines of a figure, that can be read beside each other.
MOST_MAPS = 2
MOST_LINES = 6
Row = dict[str, Any]
COLUMNS = {
    "label": "arm", "frozen_layers": "frozen layers", "probe": "probe", "shots": "shots", "mean": "mean", "low": "low",
    "high": "high", "num_seeds": "seeds", "parameters_updated": "parameters updated", "train_seconds": "seconds a cell",
}  # fmt: skip


def tell_grid(study: Study) -> Section:
    """Heat maps of shots x freeze depth, lines over shots, and the score beside the parameters updated."""
    task = study.cell["task"]
    metric = study.cell["metric"] if study.target.table == "scores" else Target(task=task).metric
    name = study.cell.get("class") if study.target.table == "scores" else None
    rows = read_grid(study, task, metric, name)
    own = [row for row in rows if not row["arm"].startswith(BASELINE)]
    if not own:
        raise MissingError(f"no ranked arm has {metric} of {task}")
    arms = _order_arms(study, own)
    what = f"{metric} of {task}" + (f", class {name}" if name is not None else "")
    parts: list[Part] = []
    depths, shots = list_depths(own), _list_shots(own)
    if len(depths) > 1 or len(shots) > 1:
        parts.append(_draw_maps(study, own, arms, what))
    if len(shots) > 1:
        parts.append(_draw_shots(study, rows, arms, what))
    if len({row["parameters_updated"] for row in own}) > 1:
        parts += _draw_parameters(study, own, what)
    shown = sorted(
        own, key=lambda row: (arms.index(row["arm"]), depths.index(row["frozen_layers"]), _place(row["shots"]))
    )
    parts.append(Table("grid", f"{what}: every arm, freeze depth, probe and number of shots", shown, COLUMNS))
    lead = [
        f"{what}, on validation: mean over seeds, draws averaged within each. Shots are labelled examples a class; "
        "'full' is every training row. Frozen layers: 'all' trains a classifier on fixed embeddings, 'none' the whole "
        "encoder." + (" Lower is better." if study.target.mode == "min" else "")
    ]
    if len(shots) == 1 and len(depths) == 1:
        lead.append("One number of shots and one freeze depth were asked for, so there is no map of them.")
    return Section("grid", "Shots and freeze depths", lead, parts)


def read_grid(study: Study, task: str, metric: str, name: str | None = None) -> list[Row]:
    """A row an arm (baselines included), freeze depth, probe and number of shots, with a 95 % t interval over seeds.

    Baselines count on the arms' seeds alone, as in the ranking.
    """
    ranked, arms = [row["trial_id"] for row in list_ranked(study.results, study.job.name)], list(study.arms.rows)
    found = ask(
        open_tables(study.results, "trials scores", study.job.name, ranked),
        """
        select arm, frozen_layers, probe, shots, list(value order by seed) as "values", avg(updated) as updated,
            avg(seconds) as seconds, min(num_train) as num_train
        from (
            select t.arm, s.frozen_layers, s.probe, s.shots, t.seed, avg(s.value) as value,
                avg(s.parameters_updated) as updated, avg(s.train_seconds) as seconds, min(s.num_train) as num_train
            from scores s join trials t using (job, trial_id)
            where job = ? and s.split = 'validation' and s.rung = t.num_rungs and s.value is not null
                and s.task = ? and s.metric = ? and s."class" is not distinct from ?
                and (t.arm in (select unnest(?)) or t.arm like 'baseline:%' and t.seed in (
                    select seed from trials where arm in (select unnest(?))))
            group by all
        ) group by all order by all
        """,
        [study.job.name, task, metric, name, arms, arms],
    )
    rows = []
    for row in found:
        updated, num_train = row["updated"], row["num_train"]
        mean, low, high, num_seeds = compute_interval(row["values"])
        rows.append(
            {
                "arm": row["arm"], "label": name_arm(study, row["arm"]), "frozen_layers": row["frozen_layers"],
                "probe": row["probe"], "shots": tell_shots(row["shots"]),
                "mean": mean, "low": None if math.isnan(low) else low, "high": None if math.isnan(high) else high,
                "num_seeds": num_seeds, "parameters_updated": None if updated is None else round(updated),
                "train_seconds": row["seconds"],
                "num_train": show_count(num_train) if num_train is not None and num_train < FEWEST else num_train,
            }
        )  # fmt: skip
    return rows


def tell_shots(shots: int | None) -> str:
    """Shots as a job file has them."""
    return "full" if shots is None else str(shots)


def _place(shots: str) -> float:
    return math.inf if shots == "full" else int(shots)


def _list_shots(rows: list[Row]) -> list[str]:
    return sorted({row["shots"] for row in rows}, key=_place)


def list_depths(rows: list[Row]) -> list[str]:
    """The freeze depths of rows, from all layers frozen to none."""
    places = {"none": -1.0, "embeddings": 0.0, "all": math.inf}
    depths = {row["frozen_layers"] for row in rows}
    return sorted(depths, key=lambda depth: -places[depth] if depth in places else -int(depth))


def _order_arms(study: Study, rows: list[Row]) -> list[str]:
    """The arms by their mean over the whole grid, best first, the base arm second where it is not the best."""
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["arm"], []).append(row["mean"])
    sign = 1 if study.target.table == "scores" and study.target.mode == "min" else -1
    arms = sorted(means, key=lambda arm: (sign * float(np.mean(means[arm])), arm))
    if study.arms.base in arms[1:]:
        arms.remove(study.arms.base)
        arms.insert(1, study.arms.base)
    return arms


def _choose_probe(study: Study, rows: list[Row], depth: str) -> str | None:
    """The probe that a depth is shown with: the target's, where that depth has it."""
    probes = sorted({row["probe"] for row in rows if row["frozen_layers"] == depth})
    wanted = study.cell.get("probe")
    return wanted if wanted in probes else (probes[0] if probes else None)


def _draw_maps(study: Study, rows: list[Row], arms: list[str], what: str) -> Plot:
    """The first of the arms that have a score with the probes that are shown."""
    depths, shots = list_depths(rows), _list_shots(rows)
    probes = {depth: _choose_probe(study, rows, depth) for depth in depths}
    scored = {row["arm"] for row in rows if row["probe"] == probes[row["frozen_layers"]]}
    arms = [arm for arm in arms if arm in scored][:MOST_MAPS]
    maps = []
    for arm in arms:
        known = {
            (row["frozen_layers"], row["shots"]): row["mean"]
            for row in rows
            if row["arm"] == arm and row["probe"] == probes[row["frozen_layers"]]
        }
        maps.append(np.array([[known.get((depth, n), np.nan) for n in shots] for depth in depths], float))
    low, high = (float(pick([pick(values) for values in maps])) for pick in (np.nanmin, np.nanmax))
    figure, panels = start_figure(1, len(arms), height=1.7 + 0.34 * len(depths), sharey=True)
    for panel, arm, values in zip(panels[0], arms, maps, strict=True):
        image = panel.imshow(values, cmap=SHADES, vmin=low, vmax=high, aspect="auto")
        write_values(panel, values, low, high)
        panel.set_xticks(range(len(shots)), shots)
        panel.set_yticks(range(len(depths)), [f"{depth} ({probes[depth]})" for depth in depths])
        panel.set_title(wrap_label(name_arm(study, arm), 42))
        panel.set_xlabel("shots")
        panel.spines[:].set_visible(False)
    panels[0, 0].set_ylabel("frozen layers (probe)")
    figure.colorbar(image, ax=panels, shrink=0.85, label=what.partition(" of ")[0])
    told = []
    for arm, values in zip(arms, maps, strict=True):
        row, column = np.unravel_index(np.nanargmax(values), values.shape)
        told.append(
            f"{name_arm(study, arm)}: from {np.nanmin(values):.3f} to {np.nanmax(values):.3f}, highest with "
            f"{shots[int(column)]} shots and frozen layers {depths[int(row)]}"
        )
    chosen = [row for row in rows if row["arm"] in arms and row["probe"] == probes[row["frozen_layers"]]]
    names = " and the base arm" if len(arms) > 1 and arms[1] == study.arms.base else ""
    title = f"{what} by shots and freeze depth: the arm that is best over all of them{names}"
    return Plot("shots-by-depth", title, "; ".join(told) + ".", figure, chosen)


def _draw_shots(study: Study, rows: list[Row], arms: list[str], what: str) -> Plot:
    """Lines over shots, at the freeze depth of the target."""
    own = [row for row in rows if not row["arm"].startswith(BASELINE)]
    depths = list_depths(own)
    depth = study.cell.get("frozen_layers")
    depth = depth if depth in depths else depths[0]
    probe = _choose_probe(study, own, depth)
    shots = _list_shots(rows)
    there = {row["arm"] for row in own if (row["frozen_layers"], row["probe"]) == (depth, probe)}
    lines = [arm for arm in arms if arm in there]
    baselines = sorted({row["arm"] for row in rows if row["arm"].startswith(BASELINE)})
    chosen = [
        row
        for arm in [*lines[:MOST_LINES], *baselines]
        for row in sorted(rows, key=lambda row: _place(row["shots"]))
        if row["arm"] == arm and (arm in baselines or (row["frozen_layers"], row["probe"]) == (depth, probe))
    ]
    figure, panels = start_figure(height=3.6)
    panel, told = panels[0, 0], []
    for arm, style in zip([*lines[:MOST_LINES], *baselines], list_styles(), strict=False):
        here = [row for row in chosen if row["arm"] == arm]
        x = [shots.index(row["shots"]) for row in here]
        look = style | {"color": "#8c8c8c"} if arm in baselines else style
        panel.plot(x, [row["mean"] for row in here], label=wrap_label(here[0]["label"], 100), markersize=5, **look)
        if all(row["low"] is not None for row in here):
            panel.fill_between(x, [row["low"] for row in here], [row["high"] for row in here], color=look["color"],
                               alpha=0.1, linewidth=0)  # fmt: skip
        told.append(f"{here[0]['label']}: " + ", ".join(f"{row['mean']:.3f} at {row['shots']}" for row in here))
    panel.set_xticks(range(len(shots)), shots)
    panel.set_xlabel(f"shots; frozen layers {depth}, probe {probe}; bands: 95 % intervals")
    panel.set_ylabel(what.partition(" of ")[0])
    panel.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=1 if len(lines) > 3 else 2)
    left = f" ({MOST_LINES} of {len(lines)} arms)" if len(lines) > MOST_LINES else ""
    return Plot("score-by-shots", f"{what} over shots{left}", "; ".join(told) + ".", figure, chosen)


def _draw_parameters(study: Study, rows: list[Row], what: str) -> list[Part]:
    """Score beside parameters updated, at the most shots that the target's cell or the grid has, with the front."""
    shots = _list_shots(rows)
    wanted = tell_shots(study.cell.get("shots")) if study.target.table == "scores" else shots[-1]
    wanted = wanted if wanted in shots else shots[-1]
    here = [row for row in rows if row["shots"] == wanted and row["parameters_updated"] is not None]
    if len({row["parameters_updated"] for row in here}) < 2:
        return []
    sign = -1 if study.target.table == "scores" and study.target.mode == "min" else 1
    front = _find_front(here, sign)
    chosen = [row | {"on_front": row in front} for row in sorted(here, key=lambda row: row["parameters_updated"])]
    figure, panels = start_figure(height=3.6)
    panel = panels[0, 0]
    for depth, style in zip(list_depths(here), list_styles(), strict=False):
        points = [row for row in here if row["frozen_layers"] == depth]
        panel.plot([row["parameters_updated"] for row in points], [row["mean"] for row in points], linestyle="",
                   marker=style["marker"], color="#595959", markerfacecolor="white", markersize=6, alpha=0.8,
                   label=f"frozen layers {depth}")  # fmt: skip
    panel.plot([row["parameters_updated"] for row in front], [row["mean"] for row in front], color="black",
               drawstyle="steps-post", linewidth=1.2, zorder=1, label="Pareto front")  # fmt: skip
    panel.set_xscale("log")
    label_powers(panel.xaxis)
    panel.set_xlabel(f"parameters updated, {wanted} shots")
    panel.set_ylabel(what.partition(" of ")[0])
    panel.grid()
    figure.legend(loc="outside lower center", ncols=4)
    told = "; ".join(
        f"{row['label']} with frozen layers {row['frozen_layers']}: {row['mean']:.3f} for "
        f"{row['parameters_updated']:,} parameters"
        for row in front[:8]
    )
    alt = f"On the front, cheapest first: {told}" + (f"; and {len(front) - 8} more." if len(front) > 8 else ".")
    return [Plot("score-by-parameters", f"{what} beside the parameters updated for it", alt, figure, chosen)]


def _find_front(rows: list[Row], sign: int) -> list[Row]:
    """The cells that none with as few parameters beats, from the fewest parameters on."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["parameters_updated"], -sign * row["mean"])):
        if not found or sign * row["mean"] > sign * found[-1]["mean"]:
            found.append(row)
    return found
