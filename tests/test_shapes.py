"""The shape of embedding spaces in a report: what is told and drawn are the numbers of the embeddings."""

import datetime

import numpy as np
import pytest

from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.measures.definitions import BINS, DEFINITIONS
from raylab.measures.geometry import Options, measure_geometry
from raylab.report.page import write_page
from raylab.report.parts import MissingError, Plot, Study
from raylab.report.shapes import tell_shapes
from raylab.results.tables import write_rows
from raylab.statistics.analysis import default_target, list_arms

OPTIONS = Options((0.3, 0.7), (0.01, 0.05), (1, 10))
SEEDS = (0, 1)
LABELS = np.random.default_rng(0).integers(0, 3, 120)
# Objective -> how far its classes are apart, and its score.
ARMS = {"none": (0.0, 0.2), "mlm": (1.0, 0.4), "declutr": (3.0, 0.6)}


def make_embeddings(objective, seed):
    rng = np.random.default_rng([seed, len(objective)])
    apart, _ = ARMS[objective]
    return (rng.normal(size=(120, 16)) + 1 + apart * np.eye(16)[LABELS]).astype(np.float32)


def write_trials(folder, job, arms, *, with_geometry=True, num_rungs=1, searched=()):
    for objective in (*arms, *searched):
        settings = list_settings(with_settings(job, {"pretrain.objective": objective}))
        for seed in SEEDS:
            trial = f"{objective}-{seed}"
            rungs = 1 if objective == "none" else num_rungs
            phase = "search" if objective in searched else "fixed"
            row = {"arm": objective, "seed": seed, "phase": phase, "status": "complete", "rung": rungs,
                   "num_rungs": rungs, "started_at": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)}  # fmt: skip
            write_rows(folder, job.name, "trials", trial, [settings | row])
            found = {"task": "severity", "split": "validation"}
            score = found | {"rung": rungs, "metric": "f1_macro", "frozen_layers": "all", "probe": "logistic",
                             "shots": 2, "draw": 0, "value": ARMS[objective][1] + 0.01 * seed}  # fmt: skip
            write_rows(folder, job.name, "scores", trial, [score])
            rows = []
            for rung in range(1, rungs + 1 if with_geometry else 1):
                x = make_embeddings(objective, seed if rung == rungs else 100 + seed)
                values = measure_geometry(
                    x, LABELS, options=OPTIONS, max_points=120, graph_points=120, seed=0, references=True
                )
                rows += [found | {"rung": rung} | {k: None if v != v else v for k, v in value._asdict().items()}
                         for value in values]  # fmt: skip
            write_rows(folder, job.name, "geometry", trial, rows)


@pytest.fixture
def make_study(make_job, tmp_path):
    """`make_study(["none", "mlm"])`: a study of an arm an objective, in tables alone."""

    def make(arms, **options):
        job = make_job("mlm", {
            "search": {"design": "grid", "space": {"pretrain.objective": [*arms]}, "seeds": [*SEEDS]},
            "pretrain.declutr": {"num_anchors": 2, "num_positives": 2, "max_span": 24, "min_span": 8},
        })  # fmt: skip
        write_trials(tmp_path, job, arms, **options)
        target = default_target(job)
        return Study(tmp_path, job, target, resolve_target(job, target), list_arms(tmp_path, job))

    return make


def cosines(objective, seed):
    """Of all pairs: their cosine, and whether both are of a class."""
    x = make_embeddings(objective, seed).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    above = np.triu_indices(len(x), 1)
    return (x @ x.T)[above], (LABELS[:, None] == LABELS)[above]


def find_parts(section):
    return {part.name: part for part in section.parts if not isinstance(part, str)}


def test_start_base_and_best_are_shown_with_their_cosines(make_study):
    section = tell_shapes(make_study(["none", "mlm", "declutr"]))
    for role, objective in (("Start", "none"), ("Base", "mlm"), ("Best", "declutr")):
        means = np.mean(
            [[c[same].mean(), c[~same].mean()] for c, same in (cosines(objective, s) for s in SEEDS)], axis=0
        )
        told = f"{role}: mean cosine {means[0]:.3f} within classes, {means[1]:.3f} between, {means[0] - means[1]:+.3f}"
        assert told in section.lead[0]
    rows = find_parts(section)["cosines"].rows
    assert {row["encoder"] for row in rows} == {"start", "base", "best"}
    edges = [*BINS, 1.0 + 1e-9]
    for encoder, objective in (("start", "none"), ("best", "declutr")):
        for name, of in (("within", True), ("between", False)):
            expected = np.mean(
                [
                    np.histogram(c[same == of], edges)[0] / (same == of).sum()
                    for c, same in (cosines(objective, s) for s in SEEDS)
                ],
                axis=0,
            )
            assert [row[name] for row in rows if row["encoder"] == encoder] == pytest.approx(expected, abs=1e-4)


def test_graphs_by_threshold_are_means_over_seeds_beside_gaussian_vectors(make_study):
    part = find_parts(tell_shapes(make_study(["none", "mlm", "declutr"])))["components"]
    assert {(row["graph"], row["parameter"]) for row in part.rows} == {
        (graph, at) for graph, parameters in (("graph", (0.3, 0.7)), ("centred", (0.3, 0.7)), ("density", (0.01, 0.05)))
        for at in parameters
    }  # fmt: skip
    [row] = [row for row in part.rows if (row["encoder"], row["graph"], row["parameter"]) == ("best", "graph", 0.7)]
    isolated, components = [], []
    for seed in SEEDS:
        x = make_embeddings("declutr", seed).astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        joined = (x @ x.T >= 0.7) & ~np.eye(len(x), dtype=bool)
        isolated.append((~joined.any(axis=1)).mean())
        components.append(count_components(joined))
    assert row["isolated_share"] == pytest.approx(np.mean(isolated), abs=1e-6)
    assert row["components"] == pytest.approx(np.mean(components))
    gaussian = np.random.default_rng(0).standard_normal((120, 16), dtype=np.float32)
    gaussian /= np.linalg.norm(gaussian, axis=1, keepdims=True)
    assert row["components_gaussian"] == count_components((gaussian @ gaussian.T >= 0.7) & ~np.eye(120, dtype=bool))
    assert f"best, graph 0.7: {row['components']:.0f} components" in part.alt
    dashed = [line for line in part.figure.axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1  # one reference, though three encoders


def count_components(joined):
    import networkx

    return networkx.number_connected_components(networkx.from_numpy_array(joined))


def test_tables_tell_every_arm_reference_and_direction(make_study):
    parts = find_parts(tell_shapes(make_study(["none", "mlm", "declutr"])))
    metrics = {row["metric"]: row for row in parts["geometry"].rows}
    assert {"uniformity", "knn_purity at 1", "knn_purity at 10", "silhouette"} <= metrics.keys()
    assert not any(name.startswith(("graph_", "density_", "cosine_within_share")) for name in metrics)
    within = [np.mean([c[same].mean() for c, same in (cosines(arm, s) for s in SEEDS)]) for arm in ARMS]
    row = metrics["cosine_within"]
    assert (row["start"], row["base"], row["best"]) == pytest.approx(within, abs=1e-5)
    assert (row["lowest"], row["highest"]) == pytest.approx((min(within), max(within)), abs=1e-5)
    assert (row["better"], row["reference_is"]) == ("higher", "shuffled labels")
    assert metrics["uniformity"]["better"] == "lower"
    assert metrics["uniformity"]["definition"] == DEFINITIONS["uniformity"].text
    arms = parts["geometry-arms"].rows
    assert [row["arm"] for row in arms] == ["objective=declutr", "objective=mlm", "objective=none"]  # best first
    assert [row["cosine_within"] for row in arms] == pytest.approx(within[::-1], abs=1e-5)
    assert arms[0]["cosine_within, reference"] == metrics["cosine_within"]["reference"]


def test_without_an_untrained_arm_the_first_rung_is_shown(make_study):
    section = tell_shapes(make_study(["mlm", "declutr"], num_rungs=2))
    rows = find_parts(section)["cosines"].rows
    assert list(dict.fromkeys(row["encoder"] for row in rows)) == ["best, at its first rung", "base", "best"]
    assert any("start was not measured" in part for part in section.parts if isinstance(part, str))
    first = [row["within"] for row in rows if row["encoder"] == "best, at its first rung"]
    assert first != [row["within"] for row in rows if row["encoder"] == "best"]


def test_a_start_that_was_only_searched_is_shown_but_not_ranked(make_study):
    parts = find_parts(tell_shapes(make_study(["mlm", "declutr"], num_rungs=2, searched=["none"])))
    assert list(dict.fromkeys(row["encoder"] for row in parts["cosines"].rows)) == ["start", "base", "best"]
    pairs = [cosines("none", seed) for seed in SEEDS]
    [row] = [row for row in parts["geometry"].rows if row["metric"] == "cosine_within"]
    assert row["start"] == pytest.approx(np.mean([c[same].mean() for c, same in pairs]), abs=1e-5)
    assert len(parts["geometry-arms"].rows) == 2


def test_one_arm_alone_is_shown_once(make_study, tmp_path):
    section = tell_shapes(make_study(["mlm"]))
    assert {row["encoder"] for row in find_parts(section)["cosines"].rows} == {"base and best"}
    page = write_page([section], "shapes", "now", tmp_path / "report").read_text()
    assert page.count("<img") == len([part for part in section.parts if isinstance(part, Plot)]) == 2


def test_of_one_class_no_pair_is_said_to_lie_between_classes(make_study, monkeypatch):
    monkeypatch.setattr("test_shapes.LABELS", np.zeros(120, dtype=np.int64))
    plot = find_parts(tell_shapes(make_study(["mlm"])))["cosines"]
    assert plot.alt.endswith("between classes there are none.")


def test_without_geometry_it_is_missing(make_study):
    with pytest.raises(MissingError, match="no ranked arm has geometry of severity"):
        tell_shapes(make_study(["mlm"], with_geometry=False))
