import functools
import itertools
import math

import networkx as nx
import numpy as np
import pytest
import sklearn.metrics
import torch
from sklearn.neighbors import NearestNeighbors

from raylab.measures import components, cosines, graphs, spaces
from raylab.measures.cosines import Level, Space, centre, cosines_of, find_cosine, load_rows, sample_pairs, scan
from raylab.measures.definitions import BINS, BOUNDS, DEFINITIONS, ISOSCORE_SHRINKAGE, NUM_PERMUTATIONS
from raylab.measures.geometry import SUBSAMPLE_SHARE, Options, code_classes, list_parameters, measure_geometry
from raylab.measures.graphs import compute_clustering, link_mutual, measure_classes, measure_graph, shuffle_classes

OPTIONS = Options((0.0, 0.5), (0.05, 0.3), (1, 4))
LIMITS = {"max_points": 100, "graph_points": 100, "seed": 0}
THRESHOLDS = (-1.0, -0.2, 0.3, 0.8, 0.95, 1.0)
CASES = range(50)


def build_case(seed: int, num_points: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, num_points)
    # Off-centre and of unequal lengths, so that forgetting to normalise shows.
    x = (rng.normal(size=(num_points, 6)) + 0.5 + np.eye(6)[labels]) * rng.uniform(0.1, 10, size=(num_points, 1))
    return x.astype(np.float32), labels


def measure(x: np.ndarray, labels: np.ndarray, options: Options = OPTIONS, **changes: object) -> dict:
    rows = measure_geometry(x, labels, **{"options": options, **LIMITS, **changes})
    return {(row.metric, row.parameter): row for row in rows}


@functools.cache
def measure_case(seed: int) -> tuple:
    """Random points, their labels (some without in every second case), unit vectors, all that is measured, tolerance.

    The pass works in tiles smaller than the set, with ragged last ones; in one third of the cases in float64, in
    another in float32, in the last in float32 without lists of edges.
    """
    x, labels = build_case(seed)
    if seed % 2:
        labels[:5] = -1
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cosines.TILES, "cpu", (7, 11 + seed % 9))
        if seed % 3:
            patch.setattr(cosines, "EXACT_ROWS", 10)
        if seed % 3 == 2:
            patch.setattr(cosines, "DENSE", -1.0)
            patch.setattr(cosines, "MOST_EDGES", -1)
        found = measure(x, labels, Options(THRESHOLDS, (), (1, 4)))
    return x, labels, unit, found, {"abs": 1e-10 if seed % 3 == 0 else 1e-5}


@pytest.fixture(params=CASES)
def case(request):
    return measure_case(request.param)


def list_distances(unit: np.ndarray, labels: np.ndarray) -> tuple[list, list]:
    pairs = [(a, b) for a, b in itertools.combinations(range(len(unit)), 2) if labels[a] >= 0 and labels[b] >= 0]
    within = [unit[a] @ unit[b] for a, b in pairs if labels[a] == labels[b]]
    return within, [unit[a] @ unit[b] for a, b in pairs if labels[a] != labels[b]]


def test_metrics_of_pairs_equal_their_formulas(case):
    _, labels, unit, found, close = case
    kernel = [math.exp(-2 * sum((a - b) ** 2)) for a, b in itertools.combinations(unit, 2)]
    means = []
    for label in set(labels) - {-1}:
        distances = [sum((a - b) ** 2) for a, b in itertools.combinations(unit[labels == label], 2)]
        means.append(sum(distances) / len(distances))
    within, between = list_distances(unit, labels)
    everything = [a @ b for a, b in itertools.combinations(unit, 2)]
    expected = {
        ("uniformity", 2.0): math.log(sum(kernel) / len(kernel)),
        ("alignment", 2.0): sum(means) / len(means),
        ("cosine_within", None): np.mean(within),
        ("cosine_between", None): np.mean(between),
        ("anisotropy", None): np.mean(everything),
    }
    assert {key: found[key].value for key in expected} == pytest.approx(expected, **close)
    for name, values in (("within", within), ("between", between)):
        shares = np.histogram(values, bins=[*BINS, 1.0])[0] / len(values)
        assert [found[f"cosine_{name}_share", left].value for left in BINS] == pytest.approx(shares, abs=1e-12)


def test_metrics_of_classes_equal_scikit_learn(case):
    _, labels, unit, found, close = case
    known, own = unit[labels >= 0], labels[labels >= 0]
    expected = sklearn.metrics.silhouette_score(known, own, metric="cosine")
    assert found["silhouette", None].value == pytest.approx(expected, **close)
    expected = sklearn.metrics.davies_bouldin_score(known, own)
    assert found["davies_bouldin", None].value == pytest.approx(expected, **close)
    for k in (1, 4):
        # Neighbours are looked for among all rows; those without a class don't count.
        index = NearestNeighbors(n_neighbors=k).fit(unit).kneighbors(return_distance=False)
        shares = []
        for i in np.flatnonzero(labels >= 0):
            near = labels[index[i]]
            if (near >= 0).any():
                shares.append((near[near >= 0] == labels[i]).mean())
        assert found["knn_purity", k].value == pytest.approx(np.mean(shares), abs=1e-12)


def test_spectra_equal_their_formulas(case):
    x, _, _, found, _ = case
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert found["rankme", None].value == pytest.approx(np.exp(-sum(p * math.log(p) for p in shares)), abs=1e-9)
    covariance = np.cov(x.T.astype(np.float64))
    variances = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    assert found["first_component", None].value == pytest.approx(variances[0] / variances.sum())
    assert found["isoscore", None].value == pytest.approx(isoscore_by_steps(covariance))


def isoscore_by_steps(covariance: np.ndarray) -> float:
    """The steps of the authors' code, which are those of the paper's algorithm in another form."""
    n = len(covariance)
    values = np.linalg.svd(covariance, compute_uv=False)
    normed = values * math.sqrt(n) / np.linalg.norm(values)
    defect = np.linalg.norm(normed - np.ones(n)) / math.sqrt(2 * (n - math.sqrt(n)))
    return ((n - defect**2 * (n - math.sqrt(n))) ** 2 - n) / (n * (n - 1))


def test_isoscore_of_a_sample_is_shrunk_to_all_rows():
    x, labels = build_case(0, num_points=90)
    row = measure(x, labels, max_points=30)["isoscore", None]
    chosen = x[np.random.default_rng(0).permutation(90)[:30]]
    part, whole = (np.cov(rows.T.astype(np.float64)) for rows in (chosen, x))
    expected = isoscore_by_steps((1 - ISOSCORE_SHRINKAGE) * part + ISOSCORE_SHRINKAGE * whole)
    assert row.value == pytest.approx(expected)
    assert row.value != pytest.approx(isoscore_by_steps(part), rel=1e-3)


def test_intrinsic_dimension_equals_its_steps(case):
    _, _, unit, found, _ = case
    ratios = []
    for i in range(len(unit)):
        nearest = sorted(np.linalg.norm(unit[i] - unit[j]) for j in range(len(unit)) if j != i)
        ratios.append(nearest[1] / nearest[0])
    ratios.sort()
    kept = [(math.log(mu), -math.log(1 - (i + 1) / len(ratios))) for i, mu in enumerate(ratios[:36])]
    expected = sum(a * b for a, b in kept) / sum(a * a for a, _ in kept)
    assert found["intrinsic_dimension", None].value == pytest.approx(expected, rel=1e-4)


def describe_with_networkx(graph: nx.Graph, labels: np.ndarray) -> dict[str, float]:
    sizes = [len(part) for part in nx.connected_components(graph)]
    degrees = dict(graph.degree())
    known = graph.subgraph(np.flatnonzero(labels >= 0))
    nx.set_node_attributes(known, {i: int(labels[i]) for i in known}, "class")
    parts = [[i for i in known if labels[i] == label] for label in set(labels) - {-1}]
    pairs = sum(d * (d - 1) / 2 for d in degrees.values())
    # networkx divides by zero where all edges have their ends in one class.
    mixing = nx.attribute_mixing_matrix(known, "class") if known.number_of_edges() else np.zeros((1, 1))
    spread = 1 - (mixing @ mixing).sum() if known.number_of_edges() else 0.0
    return {
        "components": len(sizes),
        "largest_share": max(sizes) / len(degrees),
        "isolated_share": sum(d == 0 for d in degrees.values()) / len(degrees),
        "mean_degree": sum(degrees.values()) / len(degrees),
        "clustering": nx.transitivity(graph) if pairs else math.nan,
        "assortativity": nx.attribute_assortativity_coefficient(known, "class") if spread > 1e-12 else math.nan,
        "modularity": nx.community.modularity(known, parts) if known.number_of_edges() else math.nan,
    }


def build_graph(cosine: np.ndarray, threshold: float) -> nx.Graph:
    return nx.from_numpy_array(np.triu(cosine >= threshold - 1e-6, k=1).astype(int))


@pytest.mark.parametrize("name", ["graph", "centred"])
def test_threshold_graphs_equal_networkx(case, name):
    _, labels, unit, found, _ = case
    rows = unit if name == "graph" else unit - unit.mean(0)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for threshold in THRESHOLDS:
        expected = describe_with_networkx(build_graph(rows @ rows.T, threshold), labels)
        values = {metric: found[f"{name}_{metric}", threshold] for metric in expected}
        sampled = values.pop("clustering")
        clustering = expected.pop("clustering")
        if not math.isnan(sampled.low):
            # Estimated: the interval covers 95 % of cases; twice its width, all of these.
            half = sampled.high - sampled.low + 0.01
            assert sampled.value - half <= clustering <= sampled.value + half
        else:
            assert sampled.value == pytest.approx(clustering, abs=1e-12, nan_ok=True)
        plain = {metric: row.value for metric, row in values.items()}
        assert plain == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_mutual_neighbour_graphs_equal_networkx(case):
    _, labels, unit, found, _ = case
    for k in (1, 4):
        near = NearestNeighbors(n_neighbors=k).fit(unit).kneighbors(return_distance=False)
        graph = nx.Graph([(i, j) for i in range(40) for j in near[i] if i in near[j]])
        graph.add_nodes_from(range(40))
        expected = describe_with_networkx(graph, labels)
        values = {metric: found[f"mutual_{metric}", k].value for metric in expected}
        assert values == pytest.approx(expected, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("seed", range(5))
def test_graphs_of_matched_density_have_that_share_of_the_pairs(seed):
    x, labels = build_case(seed)
    found = measure(x, labels)
    for density in OPTIONS.densities:
        assert found["density_mean_degree", density].value * 40 / 2 == round(density * 40 * 39 / 2)
        unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        values = np.sort((unit @ unit.T)[np.triu_indices(40, 1)])[::-1]
        graph = build_graph(unit @ unit.T, values[round(density * len(values)) - 1] + 9e-7)
        expected = describe_with_networkx(graph, labels)
        measured = {metric: found[f"density_{metric}", density].value for metric in expected}
        assert measured == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_span_alignment_equals_its_formula_and_floor():
    x, labels = build_case(0)
    rng = np.random.default_rng(1)
    first = rng.normal(size=(9, 6)).astype(np.float32)
    second = (first + rng.normal(size=(9, 6))).astype(np.float32)
    row = measure(x, labels, spans=(first, second), references=True)["alignment_spans", 2.0]
    a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second))
    assert row.num_points == 9
    assert row.value == pytest.approx(np.mean([sum((a[i] - b[i]) ** 2) for i in range(9)]), abs=1e-6)
    others = [sum((a[i] - b[j]) ** 2) for i in range(9) for j in range(9) if i != j]
    assert row.reference == pytest.approx(np.mean(others), abs=1e-6)
    assert math.isnan(measure(x, labels)["alignment_spans", 2.0].value)


def test_components_don_t_depend_on_how_edges_come_in():
    rng = np.random.default_rng(0)
    for num_edges in (0, 10, 60, 400):
        joined = np.zeros((90, 90))
        joined[tuple(rng.integers(0, 90, (2, num_edges)))] = 1
        graph = nx.Graph(list(zip(*joined.nonzero(), strict=True)))
        graph.add_nodes_from(range(90))
        names = torch.arange(90)
        for top, left in itertools.product(range(0, 90, 20), range(0, 90, 35)):
            rows, columns = slice(top, min(90, top + 20)), slice(left, min(90, left + 35))
            names = components.join_tile(names, torch.from_numpy(joined[rows, columns]), rows, columns)
        listed = components.join(torch.arange(90), *(torch.from_numpy(ends) for ends in joined.nonzero()))
        expected = {frozenset(part) for part in nx.connected_components(graph)}
        for found in (names, listed):
            parts = {frozenset(np.flatnonzero(found.numpy() == name).tolist()) for name in set(found.tolist())}
            assert parts == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triangles_of_many_points_are_those_of_networkx(monkeypatch, device):
    # What counts on a GPU runs on any device.
    monkeypatch.setitem(graphs.COUNTERS, "cpu", graphs.COUNTERS[device])
    monkeypatch.setattr(graphs, "DENSE_POINTS", 10)
    monkeypatch.setattr(graphs, "SPARSE_ROWS", 32)
    monkeypatch.setattr(graphs, "MARKED_BYTES", 120 * 50)
    monkeypatch.setattr(graphs, "PATHS_AT_ONCE", 1000)
    for seed in range(5):
        graph = nx.gnp_random_graph(120, 0.2, seed=seed)
        edges = torch.tensor(list(graph.edges()), dtype=torch.int32).T
        degrees = np.array([graph.degree(i) for i in range(120)])
        assert graphs.count_triangles(edges, degrees) == sum(nx.triangles(graph).values()) // 3


def test_edges_are_listed_up_to_a_number(monkeypatch):
    x, _ = build_case(3)
    levels = [Level(False, 0.2), Level(False, 0.6), Level(False, 0.9)]
    space = Space(load_rows(x))
    full = scan(space, levels).links
    sizes = [full[level].edges.shape[1] for level in levels]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    monkeypatch.setattr(cosines, "MOST_EDGES", sizes[1])
    monkeypatch.setitem(cosines.TILES, "cpu", (5, 8))
    some = scan(space, levels).links
    assert some[levels[0]].edges is None
    for level in levels:
        assert np.array_equal(some[level].degrees, full[level].degrees)
        if some[level].edges is not None:
            listed = [set(zip(*of[level].edges.tolist(), strict=True)) for of in (some, full)]
            assert listed[0] == listed[1]
    assert some[levels[1]].edges is not None


def test_sampled_clustering_is_near_the_exact_one(monkeypatch):
    x = np.random.default_rng(0).normal(size=(600, 5)).astype(np.float32)
    level = Level(False, 0.6)
    space = centre(load_rows(x))
    exact = compute_clustering(scan(space, [level]).links[level], space, level)
    monkeypatch.setattr(cosines, "MOST_EDGES", -1)
    sampled = compute_clustering(scan(space, [level]).links[level], space, level)
    assert math.isnan(exact.low)
    assert sampled.low < exact.value < sampled.high
    assert sampled.high - sampled.low < 0.03


def test_float32_numbers_are_those_of_float64(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 1500)
    # A narrow cone, as encoders make it: centring takes most of the length.
    x = (rng.normal(size=(1500, 32)) + 8 + rng.normal(size=(5, 32))[labels]).astype(np.float32)
    options = Options((0.1, 0.9), (), (3,))
    limits = {"max_points": 1500, "graph_points": 1500}
    exact = measure(x, labels, options, **limits)
    monkeypatch.setattr(cosines, "EXACT_ROWS", 100)
    monkeypatch.setitem(cosines.TILES, "cpu", (128, 300))
    quick = measure(x, labels, options, **limits)
    assert load_rows(x).dtype == torch.float32
    for key, row in exact.items():
        assert quick[key].value == pytest.approx(row.value, abs=1e-4, rel=1e-3, nan_ok=True), key


def test_a_large_set_samples_its_densities():
    x = np.random.default_rng(0).normal(size=(1200, 16)).astype(np.float32)
    space = Space(load_rows(x))
    exact, sampled = sample_pairs(space, False), sample_pairs(space, False, num_rows=500)
    assert len(exact) == 1200 * 1199 / 2
    assert len(sampled) == 500 * 500
    for density in (0.01, 0.2):
        share = float((exact >= find_cosine(sampled, density)).double().mean())
        assert share == pytest.approx(density, rel=0.1)


def test_points_spread_evenly_over_the_sphere_have_known_values():
    # For independent uniform directions in d dimensions the cosine has variance 1 / d and is nearly normal, so that
    # log E exp(-4 + 4 cos) is about -4 + 16 / (2 d) = -3.875 for d = 64.
    x = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    space = Space(load_rows(x))
    assert space.rows.dtype == torch.float32
    assert math.log(scan(space, []).kernel) == pytest.approx(-3.875, abs=0.01)
    found = spaces.spectrum(x)
    assert spaces.rankme(found.singular) == pytest.approx(64, abs=0.1)
    assert spaces.isoscore(found.covariance) > 0.99
    assert spaces.first_component(found.covariance) == pytest.approx(1 / 64, rel=0.15)
    rows = measure(x[:3000], np.arange(3000) % 3, max_points=3000)
    assert rows["alignment", 2.0].value == pytest.approx(2.0, abs=0.01)
    assert rows["anisotropy", None].value == pytest.approx(0.0, abs=0.001)


def test_points_in_few_dimensions_have_their_intrinsic_dimension():
    x = np.zeros((4000, 30), dtype=np.float32)
    x[:, :3] = np.random.default_rng(0).normal(size=(4000, 3))
    # Three dimensions are two on the sphere.
    rows = load_rows(x)
    near = scan(Space(rows), [], num_neighbours=2).neighbours
    assert spaces.intrinsic_dimension(rows, near) == pytest.approx(2.0, abs=0.15)


def test_one_direction_has_known_values():
    x = (np.random.default_rng(0).uniform(1, 9, size=(50, 1)) * np.array([[0.1, 0.7, -0.3]])).astype(np.float32)
    labels = np.arange(50) % 2
    found = measure(x, labels, Options((1.0,), (), (2,)))
    value = {key: row.value for key, row in found.items()}
    assert value["uniformity", 2.0] == pytest.approx(0, abs=1e-6)
    assert value["alignment", 2.0] == pytest.approx(0, abs=1e-6)
    assert value["cosine_within", None] == pytest.approx(1)
    assert value["cosine_between", None] == pytest.approx(1)
    assert value["rankme", None] == pytest.approx(1, abs=1e-4)
    assert value["first_component", None] == pytest.approx(1)
    assert value["isoscore", None] == pytest.approx(0, abs=1e-6)
    assert (value["graph_components", 1.0], value["graph_largest_share", 1.0]) == (1, 1.0)
    # Less their mean, equal vectors are nothing: no cosine joins them.
    assert value["centred_isolated_share", 1.0] == 1


def test_opposite_points_have_known_values():
    x, labels = np.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-5.0, 0.0]]), np.array([0, 0, 1, 1])
    found = {key: row.value for key, row in measure(x, labels, Options((0.0, -1.0), (), (1,))).items()}
    assert found["uniformity", 2.0] == pytest.approx(math.log((2 + 4 * math.exp(-8)) / 6))
    assert found["cosine_between", None] == -1
    assert found["silhouette", None] == 1
    assert (found["graph_components", 0.0], found["graph_largest_share", 0.0]) == (2, 0.5)
    assert (found["graph_components", -1.0], found["graph_largest_share", -1.0]) == (1, 1.0)
    assert found["graph_assortativity", 0.0] == 1
    assert found["knn_purity", 1] == 1


def test_alignment_weighs_classes_and_cosine_within_weighs_pairs():
    # Class 0: 3 pairs at distance 0. Class 1: 1 pair at a right angle. Class 2 has no pair.
    x = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [-1, 0]])
    found = measure(x, np.array([0, 0, 0, 1, 1, 2]))
    assert found["alignment", 2.0].value == pytest.approx((0 + 2) / 2)
    assert found["cosine_within", None].value == pytest.approx(3 / 4)


def test_undefined_values_are_nan():
    three = {key: row.value for key, row in measure(np.eye(3), np.arange(3)).items()}
    for key in [("alignment", 2.0), ("cosine_within", None), ("silhouette", None), ("davies_bouldin", None)]:
        assert math.isnan(three[key])
    one_class = {key: row.value for key, row in measure(np.eye(3), np.zeros(3, dtype=np.int64)).items()}
    for key in [("cosine_between", None), ("silhouette", None), ("graph_assortativity", 0.0)]:
        assert math.isnan(one_class[key])
    assert math.isnan(measure(np.eye(3)[:1], np.arange(1))["uniformity", 2.0].value)


def test_measure_gives_every_metric_at_its_parameters():
    x, labels = build_case(0)
    found = measure(x, labels)
    expected = [(metric, at) for metric in DEFINITIONS for at in list_parameters(OPTIONS, metric)]
    assert list(found) == expected
    assert {metric for metric, _ in found} == set(DEFINITIONS)
    assert {row.num_points for (metric, _), row in found.items() if metric != "alignment_spans"} == {40}
    assert all(math.isnan(value) for row in found.values() for value in (row.reference, row.low, row.high))


def test_every_definition_is_whole():
    for name, definition in DEFINITIONS.items():
        assert "\n" not in definition.text
        assert definition.source
        assert definition.unit, name
        assert definition.direction in ("min", "max", "none")


def test_several_labels_a_row_are_a_class_of_their_own():
    labels = np.array([[1, 0], [1, 0], [0, 0], [1, 1], [1, -1], [0, 0]], dtype=np.int8)
    codes = code_classes(labels)
    assert codes[4] == -1
    assert (codes[0] == codes[1], codes[2] == codes[5], len(set(codes[[0, 2, 3]]))) == (True, True, 3)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    assert measure(x, labels)["alignment", 2.0] == measure(x, codes)["alignment", 2.0]


def test_subsample_is_bounded_seeded_and_without_replacement():
    # Orthogonal rows: a row drawn twice would give a pair of cosine 1.
    x, labels = np.eye(60, dtype=np.float32), np.arange(60) % 2
    options, limits = Options((0.5,)), {"max_points": 30, "graph_points": 20}
    rows = measure(x, labels, options, **limits)
    whole = {row.num_points for (metric, _), row in rows.items() if not metric.startswith(("graph", "centred"))}
    assert whole == {0, 30}
    assert {row.num_points for (metric, _), row in rows.items() if metric.startswith("graph")} == {20}
    assert rows["graph_components", 0.5].value == 20
    assert rows["uniformity", 2.0].value == pytest.approx(-4)

    x, labels = build_case(1, num_points=60)
    first = measure(x, labels, options, **limits)
    assert repr(first) == repr(measure(x, labels, options, **limits))
    assert repr(first) != repr(measure(x, labels, options, **{**limits, "seed": 1}))


def test_unlabelled_rows_enter_only_what_needs_no_class():
    x, labels = build_case(0)
    labels[:10] = -1
    found = measure(x, labels)
    assert found["uniformity", 2.0].num_points == found["graph_components", 0.0].num_points == 40
    assert found["uniformity", 2.0].value == pytest.approx(measure(x, build_case(0)[1])["uniformity", 2.0].value)
    assert found["alignment", 2.0].num_points == found["graph_modularity", 0.0].num_points == 30
    assert found["alignment", 2.0].value == pytest.approx(measure(x[10:], labels[10:])["alignment", 2.0].value)
    nothing = measure(x, np.full(40, -1), references=True)
    assert math.isnan(nothing["silhouette", None].value)
    assert math.isnan(nothing["graph_modularity", 0.0].reference)
    assert nothing["cosine_within", None].num_points == 0


def test_references_are_those_of_shuffled_labels_and_gaussian_vectors():
    x, labels = build_case(4)
    found = measure(x, labels, references=True)
    rng = np.random.default_rng(0)
    order = np.random.default_rng(0).permutation(40)
    shuffles = [measure(x[order], rng.permutation(labels[order]), seed=0) for _ in range(NUM_PERMUTATIONS)]
    assert found["silhouette", None].reference != found["silhouette", None].value
    for metric in ("silhouette", "davies_bouldin", "alignment", "cosine_between"):
        key = (metric, 2.0 if metric == "alignment" else None)
        values = [row[key].value for row in shuffles]
        # The same shuffles, of rows in another order: equal on average.
        assert found[key].reference == pytest.approx(np.mean(values), abs=4 * np.std(values) / NUM_PERMUTATIONS**0.5)
    gaussian = np.random.default_rng(0).standard_normal((40, 6), dtype=np.float32)
    expected = measure(gaussian, np.full(40, -1))
    for metric, definition in DEFINITIONS.items():
        for at in list_parameters(OPTIONS, metric):
            if definition.reference == "gaussian":
                # Its rows are drawn in another order; what depends on the first rows alone has them all here.
                assert found[metric, at].reference == pytest.approx(expected[metric, at].value, rel=1e-6, nan_ok=True)
            elif metric.startswith("graph"):
                assert abs(found[metric, at].reference) < 0.1


def test_floors_of_graphs_are_means_over_shuffled_labels():
    x, labels = build_case(5, num_points=60)
    level = Level(False, 0.5)
    links = scan(Space(load_rows(x)), [level], codes=torch.from_numpy(labels)).links[level]
    rng = np.random.default_rng(0)
    shuffles = [rng.permutation(labels) for _ in range(400)]
    found = shuffle_classes(links, shuffles)
    graph = nx.Graph(list(zip(*links.edges.tolist(), strict=True)))
    graph.add_nodes_from(range(60))
    direct = [nx.community.modularity(graph, [np.flatnonzero(s == c) for c in range(4)]) for s in shuffles]
    assert found["modularity"] == pytest.approx(np.mean(direct), abs=4 * np.std(direct) / 20)
    assert found["modularity"] < measure_classes(links, labels)["modularity"]


def test_intervals_come_from_half_of_the_groups_and_cover():
    covered, widths = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), 3)
        # Rows of a group share most of what they are: as if there were 60 of them.
        x = (np.repeat(rng.normal(size=(60, 4)), 3, axis=0) + 0.1 * rng.normal(size=(180, 4)) + 1).astype(np.float32)
        row = measure(x, groups % 2, Options(()), max_points=200, subsamples=20, groups=groups)["anisotropy", None]
        truth = 0.507  # of four million groups
        covered += row.low <= truth <= row.high
        widths.append(row.high - row.low)
        assert row.low < row.value < row.high
    assert covered >= 34
    rows = measure(x, groups % 2, Options(()), max_points=200, subsamples=20)["anisotropy", None]
    assert rows.high - rows.low < 0.8 * np.mean(widths)
    assert SUBSAMPLE_SHARE == 0.5


def test_what_grows_with_the_points_is_compared_a_point():
    x = np.eye(60, dtype=np.float32)
    row = measure(x, np.arange(60) % 2, Options((0.5,)), subsamples=5)["graph_components", 0.5]
    assert (row.low, row.value, row.high) == (60, 60, 60)


def test_no_interval_leaves_what_a_value_can_be():
    x, labels = build_case(1)
    clipped = 0
    for (metric, _), row in measure(x, labels, subsamples=5).items():
        lowest, highest = BOUNDS[DEFINITIONS[metric].unit]
        assert not row.low < lowest, metric
        assert not row.high > highest, metric
        clipped += row.low == lowest < row.value < row.high
    assert clipped


def test_very_short_and_very_long_rows_are_fine():
    x, labels = build_case(2)
    expected = {key: row.value for key, row in measure(x, labels).items()}
    for factor in (1e-30, 1e30):
        found = measure((x * np.float32(factor)).astype(np.float32), labels)
        assert {k: row.value for k, row in found.items()} == pytest.approx(expected, abs=1e-5, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(("bad", "message"), [(0.0, "zero vectors"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_bad_rows_are_refused_with_their_count_even_if_not_drawn(bad, message):
    x, labels = build_case(0)
    x[[3, 17]] = bad
    with pytest.raises(ValueError, match=f"2 of 40 embeddings.*{message}"):
        measure(x, labels, Options(()), max_points=2, graph_points=2)
    with pytest.raises(ValueError, match=message):
        load_rows(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": Options((1.5,))}, "threshold is 1.5"),
        ({"options": Options((math.nan,))}, "threshold is nan"),
        ({"options": Options((), (0.0,))}, "density is 0.0"),
        ({"options": Options((), (), (0,))}, "neighbours is 0"),
        ({"max_points": 1}, "max_points is 1"),
        ({"graph_points": 0}, "graph_points 0"),
        ({"subsamples": 1}, "subsamples is 1"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        measure(*build_case(0), **change)


def test_wrong_shapes_are_refused():
    x, labels = build_case(0)
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        measure(x, labels[:-1])
    with pytest.raises(ValueError, match="n > 0"):
        measure(x[:0], labels[:0])


def test_cosines_of_the_centred_space_are_those_of_both():
    x, _ = build_case(7)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    space, rows = centre(load_rows(x)), torch.tensor([3, 30])
    assert cosines_of(space, rows, slice(None), False).numpy() == pytest.approx((unit @ unit.T)[[3, 30]], abs=1e-12)
    less = unit - unit.mean(0)
    less /= np.linalg.norm(less, axis=1, keepdims=True)
    assert cosines_of(space, rows, slice(None), True).numpy() == pytest.approx((less @ less.T)[[3, 30]], abs=1e-12)


def test_measures_of_the_parts_are_those_of_measure():
    x, labels = build_case(8)
    order = np.random.default_rng(0).permutation(40)
    found = measure(x, labels)
    near = scan(Space(load_rows(x[order])), [], num_neighbours=4).neighbours.numpy()
    links = link_mutual(near, labels[order])
    estimates = measure_graph(links, lambda: compute_clustering(links, Space(load_rows(x[order])), None))
    for metric, estimate in estimates.items():
        assert found[f"mutual_{metric}", 4].value == pytest.approx(estimate.value)
