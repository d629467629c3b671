"""Geometry against scores over arms."""

import datetime
import math

import numpy as np
import pytest
from scipy import stats

from raylab.base.mistakes import JobError
from raylab.job.settings import list_settings, with_settings
from raylab.results.tables import write_rows
from raylab.statistics.correlations import (
    ALL,
    BETWEEN,
    WITHIN,
    correlate_arms,
    correlate_job,
    correlate_scopes,
    spearman,
)

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize("case", range(100))
def test_rho_is_that_of_scipy(case):
    rng = np.random.default_rng(case)
    x, y = rng.normal(0, 1, (2, rng.integers(3, 30)))
    if case % 2:
        x, y = np.round(x), np.round(2 * y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize("case", range(5))
def test_the_interval_is_that_of_scipys_bootstrap(case):
    rng = np.random.default_rng(case)
    x = rng.normal(0, 1, 30)
    y = 0.5 * x + rng.normal(0, 1, 30)
    found = correlate_arms(x, y)
    expected = stats.bootstrap(
        (x, y), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False, method="percentile",
        n_resamples=2000, rng=np.random.default_rng(99),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05)
    assert correlate_arms(x, y) == found


def test_intervals_hold_the_true_rho_in_most_sweeps():
    true = 6 / np.pi * np.arcsin(0.6 / 2)
    held = 0
    for case in range(200):
        x, y = np.random.default_rng(case).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 25).T
        found = correlate_arms(x, y)
        held += found.low <= true <= found.high
    assert held >= 176  # 88 %: percentile intervals of 25 arms are somewhat narrow


def test_few_or_equal_arms_are_said():
    few = correlate_arms(np.arange(5.0), np.arange(5.0))
    assert (few.rho, math.isnan(few.low)) == (pytest.approx(1), True)
    assert few.verdict == "too few arms: 6 are needed for an interval"
    assert correlate_arms(np.zeros(9), np.arange(9.0)).verdict == "does not vary over the arms"
    assert correlate_arms(np.arange(9.0), -np.arange(9.0)).verdict == "falls with the score"


def scopes(x, y, objectives):
    return {row.scope: row for row in correlate_scopes(x, y, objectives)}


def test_where_the_sign_flips_within_objectives_it_is_said():
    """Simpson's paradox: objectives that are better have higher values, and within each it is the other way."""
    rng = np.random.default_rng(0)
    objectives = np.repeat(["declutr", "mlm", "none"], 8)
    level, inner = np.repeat([3.0, 2.0, 1.0], 8), np.tile(np.linspace(-0.3, 0.3, 8), 3)
    found = scopes(level + inner, level - inner + rng.normal(0, 0.02, 24), list(objectives))
    assert found[ALL].rho > 0
    assert found[ALL].verdict.startswith("rises with the score; breaks down: the sign flips within objectives")
    assert "objective=declutr" in found[ALL].verdict
    assert found[WITHIN].rho < -0.9
    assert found["objective=mlm"].verdict == "falls with the score"
    assert (found[BETWEEN].num_arms, found[BETWEEN].verdict) == (3, "too few arms: 6 are needed for an interval")


def test_what_holds_between_objectives_alone_is_said():
    rng = np.random.default_rng(1)
    level = np.repeat([3.0, 2.0, 1.0], 8)
    noise = rng.normal(0, 0.1, (2, 24))
    found = scopes(level + noise[0], level + noise[1], list(np.repeat(["a", "b", "c"], 8)))
    assert found[ALL].verdict == "rises with the score; breaks down: not shown within objectives"
    both = scopes(level + noise[0], level + noise[0], list(np.repeat(["a", "b", "c"], 8)))
    assert both[ALL].verdict == "rises with the score"


def test_one_objective_has_one_scope():
    assert set(scopes(range(8), range(8), ["mlm"] * 8)) == {ALL}


@pytest.fixture
def job(make_job, tmp_path):
    """Eight arms of two objectives on two seeds, uniformity falling as the score rises."""
    space = {"pretrain.objective": ["mlm", "declutr"], "pretrain.learning_rate": [1e-4, 2e-4, 3e-4, 4e-4]}
    job = make_job("declutr", {"search": {"design": "grid", "space": space, "seeds": [0, 1]}})
    points = [(objective, rate) for objective in ("mlm", "declutr") for rate in (1e-4, 2e-4, 3e-4, 4e-4)]
    for number, (objective, rate) in enumerate(points):
        settings = list_settings(with_settings(job, {"pretrain.objective": objective, "pretrain.learning_rate": rate}))
        for seed in (0, 1):
            trial = f"arm{number}-{seed}"
            row = {
                **settings, "arm": f"arm{number}", "seed": seed, "phase": "fixed", "status": "complete", "rung": 1,
                "num_rungs": 1, "started_at": START,
            }  # fmt: skip
            write_rows(tmp_path, job.name, "trials", trial, [row])
            shared = {"task": "severity", "rung": 1, "split": "validation"}
            score = {**shared, "metric": "f1_macro", "frozen_layers": "all", "probe": "logistic"}
            rows = [
                {**score, "shots": shots, "draw": draw, "value": 0.1 * number + off * 0.3}
                for shots, off in ((2, 1), (None, 2))
                for draw in (0, 1)
            ]
            write_rows(tmp_path, job.name, "scores", trial, rows)
            geometry = [
                {**shared, "metric": "uniformity", "parameter": 2.0, "value": -0.2 * number + 0.01 * seed},
                {**shared, "metric": "rankme", "value": float("nan") if number else 3.0},
            ]
            write_rows(tmp_path, job.name, "geometry", trial, geometry)
    return job


def test_every_metric_is_set_against_every_score_of_its_task(job, tmp_path):
    rows = correlate_job(tmp_path, job)
    assert {(row["metric"], row["shots"]) for row in rows} == {("uniformity", 2), ("uniformity", None)}
    assert [row["scope"] for row in rows[:5]] == [ALL, WITHIN, "objective=declutr", "objective=mlm", BETWEEN]
    first = rows[0]
    assert (first["num_arms"], first["rho"]) == (8, pytest.approx(-1))
    assert first["verdict"] == "falls with the score"
    assert (rows[1]["num_arms"], rows[2]["low"]) == (8, None)
    with pytest.raises(JobError, match="has under two ranked arms with geometry and accuracy"):
        correlate_job(tmp_path, job, "accuracy")
