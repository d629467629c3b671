"""Geometry against scores over the ranked arms: which metrics of a space go with the score, and how sure that is."""

import math
from typing import Any

from raylab.base.mistakes import JobError
from raylab.job.specs import Target
from raylab.report.drawing import start_figure, wrap_label
from raylab.report.parts import MissingError, Plot, Row, Section, Study, Table, tell_cell
from raylab.statistics.correlations import ALL, FEWEST_ARMS, WITHIN, correlate_job

# Rows of a figure that can be read.
MOST_DRAWN = 20
# Of intervals of 95 % over nothing at all.
CHANCE = 1 / 20
CELL = ("task", "score", "class", "shots", "frozen_layers", "probe")


def tell_associations(study: Study) -> Section:
    """Spearman's rho of each geometry metric and each score over arms, the strongest in the compared cell drawn."""
    of_scores = study.target.table == "scores"
    metric = study.cell["metric"] if of_scores else Target(task=study.cell["task"]).metric
    try:
        found = correlate_job(study.results, study.job, metric, study.arms)
    except JobError as error:
        raise MissingError("; ".join(error.problems)) from None
    most = max(row["num_arms"] for row in found)
    if most < FEWEST_ARMS:
        raise MissingError(f"{most} ranked arms have both a score and geometry; an interval needs {FEWEST_ARMS}")
    rows = _join_scopes(found)
    cell = _choose_cell(study, rows)
    rows.sort(key=lambda row: (_name_cell(row) != cell, -abs(row["rho"] or 0.0)))
    here = [row for row in rows if _name_cell(row) == cell and row["low"] is not None]
    if not here:
        raise MissingError("no metric of a space varies over the ranked arms")
    named = tell_cell({"metric": metric} | {key: value for key, value in cell.items() if key != "score"})
    first, shown = here[0], sum(map(_leaves_out_zero, here))
    lead = [
        f"{len(here)} geometry metrics were set against {named} over {first['num_arms']} arms: {shown} of their "
        f"intervals leave out 0, where by chance alone one in 20 would, about {len(here) * CHANCE:.0f}"
        + ("." if shown > len(here) * CHANCE else ": no more than that, so no metric is shown to go with the score."),
        f"The strongest is {_name(first)}, Spearman's rho {_tell(first)}: {first['verdict']}. It is the strongest of "
        f"{len(here)}, so it looks stronger than it is.",
    ]
    tried = [row for row in rows if row["low"] is not None]
    about = (
        "Rho is over arms, each a mean over seeds and draws; the interval is a percentile bootstrap over arms. Arms of "
        "one sweep share most of their settings and metrics go with each other, so that many can rise by chance "
        "together. 'Within objectives' takes each objective's mean out: what is gone there was a difference between "
        "objectives. No cause is shown."
    )
    if study.target.mode == "min":
        about += f" Lower {metric} is better: a space's metric that falls with it goes with better arms."
    if len(tried) > len(here):
        about += (
            f" Over all tasks, shots, freeze depths and probes {len(tried):,} pairs were looked at, of which "
            f"{sum(map(_leaves_out_zero, tried)):,} leave out 0 (about {len(tried) * CHANCE:,.0f} by chance)."
        )
    columns = {
        "metric": "geometry", "parameter": "at", "task": "task", "shots": "shots", "frozen_layers": "frozen layers",
        "probe": "probe", "num_arms": "arms", "rho": "rho", "low": "low", "high": "high",
        "within_rho": "rho within objectives", "verdict": "verdict",
    }  # fmt: skip
    if not any(row["within_rho"] is not None for row in rows):
        del columns["within_rho"]
    table = Table("associations", "Geometry against scores, the compared cell and the strongest first", rows, columns)
    return Section("associations", "Geometry against scores", lead, [about, _draw(named, here), table])


def _join_scopes(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a pair of metric and score over all arms, with the rho within objectives beside it."""
    within = {_name_pair(row): row for row in found if row["scope"] == WITHIN}
    rows = []
    for row in found:
        if row["scope"] == ALL:
            inner = within.get(_name_pair(row), {})
            shots = "full" if row["shots"] is None else row["shots"]
            rows.append(
                {key: value for key, value in row.items() if key != "scope"}
                | {"shots": shots} | {f"within_{end}": inner.get(end) for end in ("rho", "low", "high")}
            )  # fmt: skip
    return rows


def _name_pair(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in (*CELL, "metric", "parameter"))


def _name_cell(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in CELL}


def _choose_cell(study: Study, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The compared cell, or the one most like it that was scored."""
    wanted = {"class": None, "probe": None, "frozen_layers": None, **study.cell}
    wanted["shots"] = "full" if wanted.get("shots") is None else wanted["shots"]
    keys = ("task", "class", "shots", "frozen_layers", "probe")
    return max(map(_name_cell, rows), key=lambda cell: [cell[key] == wanted[key] for key in keys])


def _leaves_out_zero(row: Row) -> bool:
    return bool(row["low"] is not None and (row["low"] > 0 or row["high"] < 0))


def _name(row: Row) -> str:
    return row["metric"] if row["parameter"] is None else f"{row['metric']} at {row['parameter']:g}"


def _tell(row: Row) -> str:
    return f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _draw(named: str, rows: list[dict[str, Any]]) -> Plot:
    """The strongest rhos with their intervals, and beside each that within objectives."""
    drawn = rows[:MOST_DRAWN]
    both = any(row["within_rho"] is not None for row in drawn)
    figure, panels = start_figure(height=0.9 + 0.28 * len(drawn))
    panel = panels[0, 0]
    panel.axvline(0, color="#595959", linewidth=0.8)
    for place, row in enumerate(drawn):
        up = -0.16 if both else 0.0
        panel.plot([row["low"], row["high"]], [place + up] * 2, color="black", linewidth=1.6)
        panel.plot(row["rho"], place + up, "o", color="black", markersize=5)
        if row["within_rho"] is not None:
            if row["within_low"] is not None:
                panel.plot([row["within_low"], row["within_high"]], [place + 0.18] * 2, color="#8c8c8c", linewidth=1.2)
            panel.plot(row["within_rho"], place + 0.18, "s", color="#8c8c8c", markerfacecolor="white", markersize=4.5)
    panel.set_yticks(range(len(drawn)), [wrap_label(_name(row)) for row in drawn])
    panel.set_ylim(len(drawn) - 0.5, -0.5)
    panel.set_xlim(-1.03, 1.03)
    panel.set_xlabel(
        "Spearman's rho over arms, 95 % interval" + ("; hollow: within objectives" if both else ""), fontsize=8
    )
    panel.grid(axis="x")
    told = "; ".join(
        f"{_name(row)} {_tell(row)}"
        + (f", within objectives {row['within_rho']:+.2f}" if not math.isnan(row["within_rho"] or math.nan) else "")
        for row in drawn
    )
    left = f" {len(rows) - len(drawn)} more are in the table." if len(rows) > len(drawn) else ""
    title = f"Geometry metrics against {named}, the strongest {len(drawn)} of {len(rows)}"
    return Plot("associations-strongest", title, f"Strongest first: {told}.{left}", figure, drawn)
