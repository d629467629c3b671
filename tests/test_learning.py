"""The report's section on learning: curves and scores by rung, against means taken separately."""

import datetime

import numpy as np
import pytest
from scipy import stats

import raylab.report.learning
from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.report.drawing import render
from raylab.report.learning import tell_learning
from raylab.report.parts import MissingError, Plot, Study
from raylab.results.tables import write_rows
from raylab.statistics.analysis import default_target, list_arms

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
CELL = {"task": "severity", "metric": "f1_macro", "shots": 2, "frozen_layers": "all", "probe": "logistic"}
OBJECTIVE, RATE, TOKENS = "pretrain.objective", "pretrain.learning_rate", 12_000
SEEDS = 3


@pytest.fixture
def write(tmp_path):
    """`write(job, values, "arm", 0, [0.4, 0.5], 3.0)`: a trial with such scores at its rungs, and curves about a loss.

    The curves are returned: metric -> tokens and values.
    """

    def write_trial(job, values, arm, seed, by_rung, loss, curves=True):
        settings = list_settings(with_settings(job, values))
        row = {
            **settings, "arm": arm, "seed": seed, "phase": "fixed", "status": "complete", "rung": len(by_rung),
            "num_rungs": len(by_rung), "started_at": START, "target_values": [by_rung[-1]],
        }  # fmt: skip
        write_rows(tmp_path, job.name, "trials", f"{arm}-{seed}", [row])
        scores = [
            {**CELL, "rung": rung, "split": "validation", "draw": draw, "value": value + off}
            for rung, value in enumerate(by_rung, 1)
            for draw, off in ((0, -0.1), (1, 0.1))
        ]
        write_rows(tmp_path, job.name, "scores", f"{arm}-{seed}", scores)
        # An unsealed score is no part of any curve.
        unsealed = [row | {"split": "test", "value": 9.0} for row in scores]
        write_rows(tmp_path, job.name, "scores", f"{arm}-{seed}", unsealed, ".test")
        found = {}
        if curves:
            rng, objective = np.random.default_rng(seed), settings[OBJECTIVE]
            # As training notes them: behind each 50th part, a little later on each seed.
            noted = [(step, 240 * step + int(rng.integers(0, 200))) for step in range(1, 50)]
            if objective != "none":
                found["train_mlm_loss"] = [
                    (step, at, loss + 50 / (step + 5) + rng.normal(0, 0.01)) for step, at in noted
                ]
                found["train_loss"] = [(step, at, 2 * value) for step, at, value in found["train_mlm_loss"]]
            if objective == "declutr":
                found["train_declutr_loss"] = [(step, at, value / 3) for step, at, value in found["train_mlm_loss"]]
            rungs = range(0, 1 if objective == "none" else len(by_rung) + 1)
            for rung in rungs:
                at = TOKENS * rung // len(by_rung) + 7 * seed
                for metric, value in (
                    ("heldout_mlm_loss", loss + 2 - rung / 2 + rng.normal(0, 0.01)), ("heldout_unigram_entropy", 4.5),
                    ("heldout_retrieval_accuracy", 0.2 + rung / 10), ("heldout_retrieval_candidates", 8.0),
                ):  # fmt: skip
                    found.setdefault(metric, []).append((20 * rung, at, value))
        rows = [
            {"step": step, "tokens": at, "metric": metric, "value": float(value)}
            for metric, points in found.items()
            for step, at, value in points
        ]
        write_rows(tmp_path, job.name, "curves", f"{arm}-{seed}", rows)
        return {metric: np.array([point[1:] for point in points]) for metric, points in found.items()}

    return write_trial


@pytest.fixture
def study_of(tmp_path):
    def read(job):
        target = default_target(job)
        return Study(tmp_path, job, target, resolve_target(job, target), list_arms(tmp_path, job))

    return read


@pytest.fixture
def objectives(make_job, write):
    """A grid of objectives at two rungs and three seeds; and by arm its scores by seed and rung, and curves by seed."""
    names = {"none": 0.3, "mlm": 0.5, "declutr": 0.6}
    job = make_job("declutr", {"search": {"design": "grid", "space": {OBJECTIVE: list(names)}, "seeds": [0, 1, 2]}})
    rng, scores, curves = np.random.default_rng(0), {}, {}
    for name, mean in names.items():
        rungs = 1 if name == "none" else 2
        scores[name] = mean + rng.normal(0, 0.02, (SEEDS, rungs)) + 0.1 * np.arange(rungs)
        curves[name] = [
            write(job, {OBJECTIVE: name}, name, seed, scores[name][seed].tolist(), 3.0 + mean) for seed in range(SEEDS)
        ]
    return job, scores, curves


def plots_of(section):
    return {part.name: part for part in section.parts if isinstance(part, Plot)}


def line_of(panel, label):
    [line] = [line for line in panel.lines if line.get_label() == label]
    return np.column_stack([line.get_xdata(), line.get_ydata()])


def test_curves_are_means_over_seeds(objectives, study_of):
    job, _, curves = objectives
    section = tell_learning(study_of(job))
    plots = plots_of(section)
    assert section.lead[0].startswith("All 3 arms are drawn, best at task=severity, ")
    panels = {panel.get_title(loc="left"): panel for panel in plots["learning-training"].figure.axes}
    assert len(panels) == 3
    masked = next(panel for title, panel in panels.items() if title.startswith("masked"))
    for name in ("mlm", "declutr"):
        wanted = np.mean([found["train_mlm_loss"] for found in curves[name]], 0)
        np.testing.assert_allclose(line_of(masked, f"objective={name}"), wanted)
    rows = [row for row in plots["learning-training"].rows if (row["arm"], row["metric"]) == ("mlm", "train_mlm_loss")]
    assert len(rows) == 49
    assert {row["num_seeds"] for row in rows} == {SEEDS}
    assert not any(row["metric"].startswith("train_learning") for row in plots["learning-training"].rows)
    assert all(render(plots["learning-training"].figure))


def test_heldout_measures_stand_beside_what_nothing_learned_would_have(objectives, study_of):
    job, _, curves = objectives
    section = tell_learning(study_of(job))
    plot = plots_of(section)["learning-heldout"]
    loss, retrieval = plot.figure.axes
    wanted = np.mean([found["heldout_mlm_loss"] for found in curves["declutr"]], 0)
    np.testing.assert_allclose(line_of(loss, "objective=declutr"), wanted)
    # The untrained encoder has a start alone.
    assert len(line_of(loss, "objective=none")) == 1
    flat = [line.get_ydata() for panel in (loss, retrieval) for line in panel.lines if len(line.get_ydata()) == 2]
    levels = [values[0] for values in flat if values[0] == values[1]]
    assert levels == [4.5, 1 / 8]
    ends = {name: np.mean([found["heldout_mlm_loss"][-1, 1] for found in curves[name]]) for name in curves}
    low, high = min(ends, key=ends.get), max(ends, key=ends.get)
    told = f"at the end: from {ends[low]:.3g} (objective={low}) to {ends[high]:.3g} (objective={high})"
    assert section.lead[1] == f"Held-out masked-language loss (nats a token) {told}."
    assert told in plot.alt


def test_scores_by_rung_have_intervals_over_seeds(objectives, study_of):
    job, scores, _ = objectives
    plot = plots_of(tell_learning(study_of(job)))["learning-scores"]
    rows = {(row["arm"], row["rung"]): row for row in plot.rows}
    assert set(rows) == {("none", 1), ("mlm", 1), ("mlm", 2), ("declutr", 1), ("declutr", 2)}
    for (arm, rung), row in rows.items():
        values = scores[arm][:, rung - 1]
        half = stats.t.ppf(0.975, SEEDS - 1) * stats.sem(values)
        wanted = (values.mean(), values.mean() - half, values.mean() + half)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(wanted)
        assert row["tokens"] == (0 if arm == "none" else TOKENS * rung / 2)
    first, last = scores["mlm"].mean(0)
    assert f"objective=mlm from {first:.3f} to {last:.3f}" in plot.alt
    assert all(render(plot.figure))


@pytest.fixture
def many(make_job, write):
    """Twenty arms, later ones worse; the base arm is the twelfth."""
    rates = [1e-3 * (1 + number) for number in range(20)]
    base = {RATE: rates[11]}
    job = make_job("mlm", {**base, "search": {"design": "grid", "space": {RATE: rates}, "seeds": [0]}})
    for number, rate in enumerate(rates):
        write(job, {RATE: rate}, f"arm{number}", 0, [0.9 - number / 50], 3.0)
    return job


def test_of_many_arms_the_best_the_base_and_some_others_are_drawn(many, study_of):
    section = tell_learning(study_of(many))
    plot = plots_of(section)["learning-training"]
    [panel] = plot.figure.axes  # of one loss, whose weighted sum is the same
    labels = [line.get_label() for line in panel.lines]
    assert len(labels) == 8
    assert labels[:4] == [f"learning_rate={1e-3 * (1 + number):g}" for number in range(4)]
    assert "learning_rate=0.012" in labels
    assert labels[-1] == "learning_rate=0.02"
    assert section.lead[0].startswith("Drawn are 8 of 20 arms: the best 4 at task=severity, ")
    assert "the base arm" in section.lead[0]
    # One rung each: nothing to draw.
    assert "learning-scores" not in plots_of(section)
    assert {row["arm"] for row in plot.rows} == {f"arm{number}" for number in range(20)}


def test_arms_not_drawn_are_thinned_but_keep_their_ends(many, study_of, monkeypatch):
    whole = plots_of(tell_learning(study_of(many)))["learning-training"].rows
    monkeypatch.setattr(raylab.report.learning, "MOST_ROWS", 60)
    rows = plots_of(tell_learning(study_of(many)))["learning-training"].rows
    assert [row for row in rows if row["drawn"]] == [row for row in whole if row["drawn"]]
    others = [row for row in rows if not row["drawn"]]
    assert len(others) <= 60 + 12
    ends = {row["arm"]: row for row in whole if not row["drawn"]}
    assert len(ends) == 12
    assert all(end in others for end in ends.values())


def test_without_curves_there_is_nothing_to_show(make_job, write, study_of):
    job = make_job("mlm", {"search": {"design": "grid", "space": {RATE: [1e-3]}, "seeds": [0]}})
    write(job, {RATE: 1e-3}, "arm", 0, [0.5, 0.6], 3.0, curves=False)
    with pytest.raises(MissingError, match="no arm has a curve of its pre-training"):
        tell_learning(study_of(job))
