import itertools
import math

import networkx as nx
import numpy as np
import pytest

from raylab import geometry
from raylab.geometry import (
    DEFINITIONS,
    alignment,
    cosine_between,
    cosine_within,
    graph_components,
    measure_geometry,
    silhouette,
    uniformity,
)

OPTIONS = {"thresholds": [0.0, 0.5], "max_points": 100, "graph_points": 100, "seed": 0}


def build_case(seed: int, num_points: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, num_points)
    # Off-centre and of unequal lengths, so that forgetting to normalise shows.
    x = (rng.normal(size=(num_points, 6)) + 0.5 + np.eye(6)[labels]) * rng.uniform(0.1, 10, size=(num_points, 1))
    return x.astype(np.float32), labels


@pytest.fixture(params=range(4))
def case(request, monkeypatch):
    # Blocks smaller than the set, with a ragged last one.
    monkeypatch.setattr(geometry, "BLOCK_ROWS", 7)
    x, labels = build_case(request.param)
    unit = [row / math.sqrt(sum(v * v for v in row)) for row in x.astype(np.float64)]
    return x, labels, unit


def test_uniformity_equals_its_formula(case):
    x, _, unit = case
    kernel = [math.exp(-2 * sum((a - b) ** 2)) for a, b in itertools.combinations(unit, 2)]
    assert uniformity(x) == pytest.approx(math.log(sum(kernel) / len(kernel)), abs=1e-10)


def test_alignment_equals_its_formula(case):
    x, labels, unit = case
    means = []
    for label in set(labels):
        members = [row for row, own in zip(unit, labels, strict=True) if own == label]
        distances = [sum((a - b) ** 2) for a, b in itertools.combinations(members, 2)]
        means.append(sum(distances) / len(distances))
    assert alignment(x, labels) == pytest.approx(sum(means) / len(means), abs=1e-10)


def test_cosines_equal_their_formulas(case):
    x, labels, unit = case
    within, between = [], []
    for (a, own), (b, other) in itertools.combinations(zip(unit, labels, strict=True), 2):
        (within if own == other else between).append(sum(a * b))
    assert cosine_within(x, labels) == pytest.approx(sum(within) / len(within), abs=1e-10)
    assert cosine_between(x, labels) == pytest.approx(sum(between) / len(between), abs=1e-10)


def test_silhouette_equals_its_formula(case):
    x, labels, unit = case
    values = []
    for i, (a, own) in enumerate(zip(unit, labels, strict=True)):
        means = {}
        for label in set(labels):
            others = [j for j in range(len(unit)) if labels[j] == label and j != i]
            means[label] = sum(1 - sum(a * unit[j]) for j in others) / len(others)
        inner, outer = means.pop(own), min(means.values())
        values.append((outer - inner) / max(inner, outer))
    assert silhouette(x, labels) == pytest.approx(sum(values) / len(values), abs=1e-9)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.8, 0.9, 0.95, 1.0])
def test_graph_equals_union_find_and_networkx(case, threshold):
    x, _, unit = case
    parents = list(range(len(unit)))

    def find(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    pairs = [(i, j) for i, j in itertools.combinations(range(len(unit)), 2) if sum(unit[i] * unit[j]) >= threshold]
    for i, j in pairs:
        parents[find(i)] = find(j)
    sizes = np.unique([find(i) for i in range(len(unit))], return_counts=True)[1]
    graph = nx.Graph(pairs)
    graph.add_nodes_from(range(len(unit)))
    assert sorted(sizes) == sorted(map(len, nx.connected_components(graph)))
    assert graph_components(x, threshold) == (len(sizes), pytest.approx(max(sizes) / len(unit)))


def test_points_spread_evenly_over_the_sphere_have_the_known_uniformity():
    # For independent uniform directions in d dimensions the cosine has variance 1 / d and is nearly normal, so that
    # log E exp(-4 + 4 cos) is about -4 + 16 / (2 d) = -3.875 for d = 64.
    x = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
    assert uniformity(x) == pytest.approx(-3.875, abs=0.01)
    assert alignment(x, np.arange(3000) % 3) == pytest.approx(2.0, abs=0.01)


def test_one_direction_has_known_values():
    x = np.random.default_rng(0).uniform(1, 9, size=(50, 1)) * np.array([[0.1, 0.7, -0.3]])
    labels = np.arange(50) % 2
    assert uniformity(x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, labels) == pytest.approx(0, abs=1e-12)
    assert cosine_within(x, labels) == pytest.approx(1)
    assert cosine_between(x, labels) == pytest.approx(1)
    assert graph_components(x, 1.0) == (1, 1.0)


def test_opposite_points_have_known_values():
    x, labels = np.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-5.0, 0.0]]), np.array([0, 0, 1, 1])
    assert uniformity(x) == pytest.approx(math.log((2 + 4 * math.exp(-8)) / 6))
    assert cosine_between(x, labels) == -1
    assert silhouette(x, labels) == 1
    assert graph_components(x, 0.0) == (2, 0.5)
    assert graph_components(x, -1.0) == (1, 1.0)


def test_alignment_weighs_classes_and_cosine_within_weighs_pairs():
    # Class 0: 3 pairs at distance 0. Class 1: 1 pair at a right angle. Class 2 has no pair.
    x = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [-1, 0]])
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert alignment(x, labels) == pytest.approx((0 + 2) / 2)
    assert cosine_within(x, labels) == pytest.approx(3 / 4)


def test_undefined_values_are_nan():
    x = np.eye(3)
    assert math.isnan(uniformity(x[:1]))
    assert math.isnan(alignment(x, np.arange(3)))
    assert math.isnan(cosine_within(x, np.arange(3)))
    assert math.isnan(cosine_between(x, np.zeros(3, dtype=np.int64)))
    assert math.isnan(silhouette(x, np.arange(3)))
    assert math.isnan(silhouette(x, np.zeros(3, dtype=np.int64)))


def test_measure_gives_every_metric_as_the_single_functions_do():
    x, labels = build_case(0)
    values = {(row.metric, row.parameter): row for row in measure_geometry(x, labels, **OPTIONS)}
    assert {metric for metric, _ in values} == set(DEFINITIONS)
    assert all(row.num_points == 40 for row in values.values())
    expected = {
        ("uniformity", 2.0): uniformity(x),
        ("alignment", 2.0): alignment(x, labels),
        ("cosine_within", None): cosine_within(x, labels),
        ("cosine_between", None): cosine_between(x, labels),
        ("silhouette", None): silhouette(x, labels),
        ("graph_components", 0.0): graph_components(x, 0.0)[0],
        ("graph_largest_share", 0.0): graph_components(x, 0.0)[1],
        ("graph_components", 0.5): graph_components(x, 0.5)[0],
        ("graph_largest_share", 0.5): graph_components(x, 0.5)[1],
    }
    assert {key: row.value for key, row in values.items()} == pytest.approx(expected)


def test_every_definition_states_a_direction():
    for line in DEFINITIONS.values():
        assert "\n" not in line
        assert any(phrase in line for phrase in ("lower is better", "higher is better", "no better direction"))


def test_subsample_is_bounded_seeded_and_without_replacement():
    # Orthogonal rows: a row drawn twice would give a pair of cosine 1.
    x, labels = np.eye(60, dtype=np.float32), np.arange(60) % 2
    options = {"thresholds": [0.5], "max_points": 30, "graph_points": 20}
    rows = measure_geometry(x, labels, seed=0, **options)
    by_metric = {row.metric: row for row in rows}
    assert {row.num_points for row in rows if row.metric.startswith("graph")} == {20}
    assert {row.num_points for row in rows if not row.metric.startswith("graph")} == {30}
    assert by_metric["graph_components"].value == 20
    assert by_metric["uniformity"].value == pytest.approx(-4)

    x, labels = build_case(1, num_points=60)
    first = measure_geometry(x, labels, seed=0, **options)
    assert first == measure_geometry(x, labels, seed=0, **options)
    assert first != measure_geometry(x, labels, seed=1, **options)


def test_unlabelled_rows_enter_only_uniformity_and_graph():
    x, labels = build_case(0)
    labels[:10] = -1
    values = {row.metric: row for row in measure_geometry(x, labels, **OPTIONS)}
    assert values["uniformity"].num_points == values["graph_components"].num_points == 40
    assert values["uniformity"].value == pytest.approx(uniformity(x))
    assert values["alignment"].num_points == 30
    assert values["alignment"].value == pytest.approx(alignment(x[10:], labels[10:]))
    nothing_labelled = {row.metric: row for row in measure_geometry(x, np.full(40, -1), **OPTIONS)}
    assert math.isnan(nothing_labelled["silhouette"].value)
    assert nothing_labelled["cosine_within"].num_points == 0


def test_very_short_and_very_long_rows_are_fine():
    x, _ = build_case(2)
    for factor in (1e-30, 1e30):
        assert uniformity((x * np.float32(factor)).astype(np.float32)) == pytest.approx(uniformity(x), abs=1e-5)


@pytest.mark.parametrize(("bad", "message"), [(0.0, "zero vectors"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_bad_rows_are_refused_with_their_count_even_if_not_drawn(bad, message):
    x, labels = build_case(0)
    x[[3, 17]] = bad
    with pytest.raises(ValueError, match=f"2 of 40 embeddings.*{message}"):
        measure_geometry(x, labels, thresholds=[], max_points=2, graph_points=2, seed=0)
    with pytest.raises(ValueError, match=message):
        uniformity(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [1.5]}, "threshold is 1.5"),
        ({"thresholds": [math.nan]}, "threshold is nan"),
        ({"max_points": 1}, "max_points is 1"),
        ({"graph_points": 0}, "graph_points 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        measure_geometry(*build_case(0), **{**OPTIONS, **change})


def test_wrong_shapes_are_refused():
    x, labels = build_case(0)
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        measure_geometry(x, labels[:-1], **OPTIONS)
    with pytest.raises(ValueError, match="n > 0"):
        measure_geometry(x[:0], labels[:0], **OPTIONS)
