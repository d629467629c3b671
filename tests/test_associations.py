"""Geometry against scores in a report: what is told are scipy's correlations, with how many were looked at."""

import datetime

import numpy as np
import pytest
from scipy import stats

from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.report.associations import MOST_DRAWN, tell_associations
from raylab.report.parts import MissingError, Plot, Study, Table
from raylab.results.tables import write_rows
from raylab.statistics.analysis import default_target, list_arms
from raylab.statistics.correlations import BINS

RATES = [round(1e-4 * 1.3**place, 7) for place in range(12)]
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
NOISE = [f"mutual_{name}" for name in ("clustering", "components", "assortativity")]


@pytest.fixture
def make_study(make_job, tmp_path):
    """`make_study(24)`: so many arms of two objectives on two seeds; rankme rises with the score, the rest is noise."""

    def make(num_arms, objectives=("mlm", "declutr")):
        space = {"pretrain.objective": [*objectives], "pretrain.learning_rate": RATES[: num_arms // len(objectives)]}
        job = make_job("declutr", {"search": {"design": "grid", "space": space, "seeds": [0, 1]}})
        rng = np.random.default_rng(0)
        means = {}
        for number in range(num_arms):
            rate, objective = RATES[number // len(objectives)], objectives[number % len(objectives)]
            settings = list_settings(
                with_settings(job, {"pretrain.objective": objective, "pretrain.learning_rate": rate})
            )
            level = rng.normal() + 2 * (objective == "declutr")
            seen = []
            for seed in (0, 1):
                trial = f"arm{number}-{seed}"
                row = {"arm": f"arm{number}", "seed": seed, "phase": "fixed", "status": "complete", "started_at": START}
                write_rows(tmp_path, job.name, "trials", trial, [settings | row | {"rung": 2, "num_rungs": 2}])
                shared = {"task": "severity", "rung": 2, "split": "validation"}
                score = shared | {"metric": "f1_macro", "frozen_layers": "all", "probe": "logistic", "draw": 0}
                value = level + rng.normal(0, 0.05)
                rows = [score | {"shots": 2, "value": value}, score | {"shots": None, "value": rng.normal()}]
                write_rows(tmp_path, job.name, "scores", trial, rows)
                metrics = {("rankme", None): value + rng.normal(0, 0.3)}
                metrics |= {(name, k): rng.normal() for name in NOISE for k in range(1, 9)}
                metrics |= {("cosine_within_share", left): rng.random() for left in BINS}
                write_rows(tmp_path, job.name, "geometry", trial, [
                    shared | {"metric": name, "parameter": parameter, "value": value}
                    for (name, parameter), value in metrics.items()
                ])  # fmt: skip
                seen.append((value, metrics["rankme", None]))
            means[f"arm{number}"] = (*np.mean(seen, axis=0), objective)
        target = default_target(job)
        return Study(tmp_path, job, target, resolve_target(job, target), list_arms(tmp_path, job)), means

    return make


def test_the_strongest_is_told_with_how_many_were_looked_at(make_study):
    study, means = make_study(24)
    section = tell_associations(study)
    [plot] = [part for part in section.parts if isinstance(part, Plot)]
    [table] = [part for part in section.parts if isinstance(part, Table)]
    score, rankme, objective = map(np.array, zip(*means.values(), strict=True))
    rho = stats.spearmanr(score, rankme).statistic
    first = table.rows[0]
    assert (first["metric"], first["num_arms"], first["shots"]) == ("rankme", 24, 2)
    assert first["rho"] == pytest.approx(rho)
    assert first["low"] < rho < first["high"]
    assert f"The strongest is rankme, Spearman's rho {rho:+.2f}" in section.lead[1]
    here = [row for row in table.rows if row["shots"] == 2]
    shown = sum(row["low"] > 0 or row["high"] < 0 for row in here)
    num = 1 + 8 * len(NOISE)  # no bins of histograms
    assert section.lead[0].startswith(
        f"{num} geometry metrics were set against metric=f1_macro, task=severity, shots=2"
    )
    assert f"{shown} of their intervals leave out 0, where by chance alone one in 20 would, about 1." in section.lead[0]
    assert f"{2 * num} pairs were looked at" in section.parts[0]
    inner = [values - np.array([values[objective == name].mean() for name in objective]) for values in (score, rankme)]
    assert first["within_rho"] == pytest.approx(stats.spearmanr(*inner).statistic)
    strongest = sorted(here, key=lambda row: -abs(row["rho"]))[:MOST_DRAWN]
    assert list(plot.rows) == strongest
    assert plot.figure.axes[0].get_yticklabels()[0].get_text() == "rankme"
    assert f"rankme {rho:+.2f}" in plot.alt
    assert f"{num - MOST_DRAWN} more are in the table" in plot.alt


def test_no_more_than_by_chance_is_said_to_show_nothing(make_study):
    study, _ = make_study(24)
    section = tell_associations(study._replace(cell=study.cell | {"shots": None}))  # a score of noise
    [plot] = [part for part in section.parts if isinstance(part, Plot)]
    assert sum(row["low"] > 0 or row["high"] < 0 for row in plot.rows) <= 1
    assert section.lead[0].endswith("about 1: no more than that, so no metric is shown to go with the score.")


def test_one_objective_has_nothing_within(make_study):
    section = tell_associations(make_study(8, ("mlm",))[0])
    [table] = [part for part in section.parts if isinstance(part, Table)]
    assert "within_rho" not in table.columns
    assert {row["within_rho"] for row in table.rows} == {None}


def test_few_arms_are_not_correlated(make_study):
    with pytest.raises(MissingError, match="4 ranked arms have both a score and geometry; an interval needs 6"):
        tell_associations(make_study(4)[0])


def test_without_the_score_it_is_missing(make_study):
    study = make_study(8)[0]
    with pytest.raises(MissingError, match="under two ranked arms with geometry and accuracy"):
        tell_associations(study._replace(cell=study.cell | {"metric": "accuracy"}))
