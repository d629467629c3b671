"""How the arms learned: training losses and held-out measures over tokens, and the target's score rung by rung."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raylab.report.drawing import list_styles, start_figure, wrap_label
from raylab.report.parts import MissingError, Part, Plot, Row, Section, Study, name_arm, tell_cell
from raylab.results.queries import list_ranked, match_cell, open_tables
from raylab.results.ranking import compute_interval, split_depths

# Lines that can be told apart; the tables have the others.
MOST_DRAWN = 8
# Rows of a table that are of arms not drawn: fewer points of each where there would be more.
MOST_ROWS = 4_000
# Training notes its means as often, at each such part of an arm's tokens.
NUM_POINTS = 50

TRAINING = {
    "train_mlm_loss": "masked-language loss (nats a token)",
    "train_declutr_loss": "contrastive loss (nats)",
    "train_metadata_loss": "metadata loss",
    "train_loss": "weighted sum of the losses",
}
HELD_OUT = {
    "heldout_mlm_loss": "masked-language loss (nats a token)",
    "heldout_mlm_accuracy": "masked-language accuracy",
    "heldout_retrieval_accuracy": "retrieval accuracy",
    "heldout_category_accuracy": "category accuracy",
}
# What a measure stands beside: a metric of the same name in every curve, and how it is told.
ENTROPY, CANDIDATES = "heldout_unigram_entropy", "heldout_retrieval_candidates"


class Point(NamedTuple):
    """A measure of an arm after so many tokens: means over seeds."""

    arm: str
    metric: str
    tokens: float
    value: float
    num_seeds: int


def tell_learning(study: Study) -> Section:
    """Curves of pre-training, training and held-out, and the scores at each rung, of the best arms and some others."""
    points = _read_curves(study)
    if not points:
        raise MissingError("no arm has a curve of its pre-training")
    by_rung = _read_rungs(study)
    drawn = _choose_arms(study, by_rung)
    parts: list[Part] = [
        "Tokens are those that entered the encoder, padding left out. Lines are means over seeds. Losses of different "
        "objectives or weights are sums of different things: compare each part, not the sums."
    ]
    lead = [_tell_choice(study, drawn)]
    for name, title, metrics in (
        ("learning-training", "Training losses", TRAINING),
        ("learning-heldout", "Held-out measures, of validation documents", HELD_OUT),
    ):
        there = [metric for metric in metrics if any(p.metric == metric and p.arm in drawn for p in points)]
        if "train_loss" in there and len(there) == 2:
            there.remove("train_loss")  # of one part it is that part, weighted
        if there:
            plot, told = _draw_curves(study, points, drawn, there, {m: metrics[m] for m in there}, name, title)
            parts.append(plot)
            lead += told if metrics is HELD_OUT else []
    if (rungs := _draw_rungs(study, by_rung, drawn)) is not None:
        parts.append(rungs)
    return Section("learning", "How the arms learned", lead, parts)


def _list_trials(study: Study) -> list[str]:
    return [row["trial_id"] for row in list_ranked(study.results, study.job.name) if row["arm"] in study.arms.rows]


def _read_curves(study: Study) -> list[Point]:
    """The means over seeds: of training at each part of the tokens, of held-out measures at each rung."""
    connection = open_tables(study.results, "trials curves", study.job.name, _list_trials(study))
    rows = connection.execute(
        f"""
        with points as (
            select t.arm, t.seed, c.metric, c.tokens, c.value,
                case when c.metric like 'heldout%'
                    then row_number() over (partition by t.trial_id, c.metric order by c.step)
                    else floor({NUM_POINTS} * c.tokens / t."pretrain.num_tokens") end as place
            from curves c join trials t using (job, trial_id)
            where job = ? and (c.metric like 'heldout%' or c.metric like 'train%loss')
        )
        select arm, metric, avg(tokens), avg(value), count(distinct seed) from points
        group by arm, metric, place order by arm, metric, place
        """,
        [study.job.name],
    )
    return [Point(*row) for row in rows.fetchall()]


def _choose_arms(study: Study, by_rung: Mapping[str, Sequence[Row]]) -> list[str]:
    """Up to 8 arms, best first: the best four, the base arm, and others evenly down to the last."""
    order = sorted(by_rung, key=lambda arm: by_rung[arm][-1]["mean"], reverse=study.target.mode == "max")
    order += [arm for arm in study.arms.rows if arm not in order]
    if len(order) <= MOST_DRAWN:
        return order
    best = MOST_DRAWN // 2
    chosen = dict.fromkeys([*order[:best], *([study.arms.base] if study.arms.base is not None else [])])
    left = [arm for arm in order if arm not in chosen]
    num = MOST_DRAWN - len(chosen)
    chosen |= dict.fromkeys(left[round((place + 1) * (len(left) - 1) / num)] for place in range(num))
    return [arm for arm in order if arm in chosen]


def _tell_choice(study: Study, drawn: Sequence[str]) -> str:
    total = len(study.arms.rows)
    if len(drawn) == total:
        if total == 1:
            return "There is one arm."
        return f"{'Both' if total == 2 else f'All {total}'} arms are drawn, best at {tell_cell(study.cell)} first."
    base = ", the base arm" if study.arms.base is not None else ""
    return (
        f"Drawn are {len(drawn)} of {total} arms: the best {MOST_DRAWN // 2} at {tell_cell(study.cell)}{base}, and "
        "others spread evenly down to the last. The tables have every arm, those not drawn with fewer points."
    )


def _count(drawn: Sequence[str]) -> str:
    return f"{len(drawn)} arm{'s' * (len(drawn) != 1)}"


def _label_arms(study: Study, drawn: Sequence[str]) -> dict[str, str]:
    return {arm: name_arm(study, arm) for arm in drawn}


def _draw_curves(
    study: Study,
    points: Sequence[Point],
    drawn: Sequence[str],
    metrics: Sequence[str],
    titles: Mapping[str, str],
    name: str,
    title: str,
) -> tuple[Plot, list[str]]:
    """A panel a measure; and in words where the drawn arms came to, measure by measure."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        lines.setdefault((point.arm, point.metric), []).append(point)
    labels = _label_arms(study, drawn)
    columns = 3 if len(metrics) == 3 else min(2, len(metrics))
    figure, panels = _start(math.ceil(len(metrics) / columns), columns, labels.values())
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    held_out, told = name == "learning-heldout", []
    for panel, metric in zip(panels.flat, metrics, strict=False):
        for arm, style in zip(drawn, list_styles(), strict=False):
            line = lines.get((arm, metric), [])
            # Few of many points are marked, each line's at other places.
            every = max(1, len(line) // 5)
            start = drawn.index(arm) % every
            x, y = [point.tokens for point in line], [point.value for point in line]
            panel.plot(x, y, label=labels[arm], linewidth=1.3, markersize=4, markevery=(start, every), **style)
        if held_out:
            _draw_reference(panel, metric, lines)
        panel.set_title(wrap_label(titles[metric], 30 if columns > 2 else 60), loc="left", fontsize=9)
        _label_tokens(panel)
        ends = {arm: lines[arm, metric][-1].value for arm in drawn if (arm, metric) in lines}
        told.append(f"{titles[metric]} at the end: {_tell_ends(ends, labels)}")
    _add_legend(figure, panels)
    rows = _list_rows(study, points, drawn, metrics)
    what = "Held-out" if held_out else "Training"
    alt = f"{what} curves of {_count(drawn)} over tokens. {'; '.join(told)}."
    first = [f"Held-out {told[0]}."] if held_out else []
    return Plot(name, title, alt, figure, rows), first


def _tell_ends(ends: Mapping[str, float], labels: Mapping[str, str]) -> str:
    low, high = (choose(ends, key=lambda arm: ends[arm]) for choose in (min, max))
    if ends[low] == ends[high]:
        return f"{ends[low]:.3g}"
    return f"from {ends[low]:.3g} ({labels[low]}) to {ends[high]:.3g} ({labels[high]})"


def _draw_reference(panel: Any, metric: str, lines: Mapping[tuple[str, str], Sequence[Point]]) -> None:
    """What a model that has learned nothing would have."""
    found = {name: points[-1].value for (_, name), points in lines.items() if name in (ENTROPY, CANDIDATES)}
    if metric == "heldout_mlm_loss" and ENTROPY in found:
        value, label = found[ENTROPY], "word frequencies alone"
    elif metric == "heldout_retrieval_accuracy" and found.get(CANDIDATES):
        value, label = 1 / found[CANDIDATES], "chance"
    else:
        return
    panel.axhline(value, color="#8c8c8c", linewidth=1, linestyle=(0, (1, 3)))
    panel.annotate(label, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                   ha="right", va="bottom", fontsize=7)  # fmt: skip


def _list_rows(study: Study, points: Sequence[Point], drawn: Sequence[str], metrics: Sequence[str]) -> list[Row]:
    """The drawn arms' points, best arm first, then those of others, thinned; the last one of a line always stays."""
    wanted = [point for point in points if point.metric in metrics]
    shown = {arm: [point for point in wanted if point.arm == arm] for arm in drawn}
    rest = [point for point in wanted if point.arm not in shown]
    every = max(1, math.ceil(len(rest) / MOST_ROWS))
    ends = {(point.arm, point.metric): place for place, point in enumerate(rest)}
    kept = [
        point for place, point in enumerate(rest) if not place % every or ends[point.arm, point.metric] == place
    ]  # fmt: skip
    return [
        {
            "arm": point.arm, "label": name_arm(study, point.arm), "metric": point.metric,
            "tokens": round(point.tokens), "value": point.value, "num_seeds": point.num_seeds,
            "drawn": point.arm in shown,
        }
        for point in [*(point for line in shown.values() for point in line), *kept]
    ]  # fmt: skip


def _draw_rungs(study: Study, found: Mapping[str, Sequence[Row]], drawn: Sequence[str]) -> Plot | None:
    """The target's score at each rung, with intervals over seeds; None where no arm has more than one."""
    if not any(len(line) > 1 for line in found.values()):
        return None
    labels = _label_arms(study, drawn)
    figure, panels = _start(1, 1, labels.values())
    panel = panels[0, 0]
    most = max(row["tokens"] for line in found.values() for row in line)
    for number, (arm, style) in enumerate(zip(drawn, list_styles(), strict=False)):
        # Else intervals at one rung would hide each other.
        aside = 0.008 * most * (number - (len(drawn) - 1) / 2)
        line = found.get(arm, [])
        for row in line:
            if row["low"] is not None:
                panel.plot([row["tokens"] + aside] * 2, [row["low"], row["high"]], color=style["color"], linewidth=0.9)
        panel.plot([row["tokens"] + aside for row in line], [row["mean"] for row in line], label=labels[arm],
                   linewidth=1.3, markersize=5, **style)  # fmt: skip
    panel.set_ylabel(study.cell["metric"])
    _label_tokens(panel)
    _add_legend(figure, panels)
    rows = [row for arm in [*drawn, *(arm for arm in found if arm not in drawn)] for row in found.get(arm, [])]
    told = "; ".join(
        f"{labels[arm]} from {found[arm][0]['mean']:.3f} to {found[arm][-1]['mean']:.3f}"
        for arm in drawn
        if len(found.get(arm, [])) > 1
    )
    alt = f"Scores of {_count(drawn)} after each rung, from the first to the last: {told}."
    return Plot("learning-scores", f"Score at each rung: {tell_cell(study.cell)}", alt, figure, rows)


def _read_rungs(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Arm -> its means over seeds at each rung, draws averaged within a seed."""
    connection = open_tables(study.results, f"trials {study.target.table}", study.job.name, _list_trials(study))
    found: dict[str, list[dict[str, Any]]] = {}
    for here, arms in split_depths(study.results, study.job, dict(study.cell)):
        rows = connection.execute(
            f"""
            with seeds as (
                select t.arm, t.seed, s.rung, avg(s.value) as value,
                    any_value(s.rung * coalesce(t."pretrain.num_tokens", 0) / t.num_rungs) as tokens
                from {study.target.table} s join trials t using (job, trial_id)
                where job = ? and s.split = 'validation' and s.value is not null and {match_cell(here)}
                group by t.arm, t.seed, s.rung
            )
            select arm, rung, any_value(tokens), list(value) from seeds group by arm, rung order by arm, rung
            """,
            [study.job.name, *here.values()],
        )
        for arm, rung, tokens, values in rows.fetchall():
            if arms is None or arm in arms:
                mean = compute_interval(values)
                low, high = (None, None) if math.isnan(mean.low) else (mean.low, mean.high)
                found.setdefault(arm, []).append(
                    {
                        "arm": arm, "label": name_arm(study, arm), "rung": rung, "tokens": tokens, "mean": mean.mean,
                        "low": low, "high": high, "num_seeds": mean.num_seeds,
                    }
                )  # fmt: skip
    return found


def _start(rows: int, columns: int, labels: Any) -> Any:
    """A figure with room for a legend of all labels below its panels."""
    lines = sum(1 + wrap_label(label, 115).count("\n") for label in labels)
    return start_figure(rows, columns, height=2.5 + (0.25 + 0.17 * lines) / rows)


def _add_legend(figure: Any, panels: Any) -> None:
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, [wrap_label(label, 115) for label in labels], loc="outside lower left", handlelength=3.5)


def _label_tokens(panel: Any) -> None:
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlabel("tokens")
    panel.grid(axis="y")
