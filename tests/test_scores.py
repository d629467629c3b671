import numpy as np
import pytest
from sklearn import metrics

from raylab.measures.scores import (
    CALIBRATION_BINS,
    DEFINITIONS,
    MAX_CLASSES,
    METRICS,
    compute_f1_macro,
    compute_scores,
    list_confusions,
    list_scores,
)

CASES = range(50)


def build_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [m] and probabilities [m, C] with some signal; in some cases classes are absent, and scores tie."""
    rng = np.random.default_rng(seed)
    num_classes, num_rows = int(rng.integers(2, 8)), int(rng.integers(5, 80))
    labels = rng.integers(0, num_classes, num_rows)
    if seed % 3 == 0:
        labels[labels == rng.integers(num_classes)] = 0
    logits = rng.normal(size=(num_rows, num_classes)) + np.eye(num_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, np.round(probabilities, 1 if seed % 2 else 12)


def build_multi_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [m, L] of 1, 0 and, in most cases, -1; in some cases a label is never or always there."""
    rng = np.random.default_rng(seed)
    num_labels, num_rows = int(rng.integers(1, 7)), int(rng.integers(5, 80))
    labels = (rng.random((num_rows, num_labels)) < rng.uniform(0.1, 0.7, num_labels)).astype(np.int8)
    if seed % 4 == 0:
        labels[:, 0] = seed % 8 == 0
    probabilities = np.clip(rng.normal(0.2 + 0.5 * labels, 0.3), 0, 1)
    if seed % 5:
        labels[rng.random(labels.shape) < 0.2] = -1
        labels[0, 0] = max(labels[0, 0], 0)
    return labels, np.round(probabilities, 1 if seed % 2 else 12)


def by_name(labels: np.ndarray, probabilities: np.ndarray) -> dict[tuple[str, int | None], float]:
    return {(metric, label): value for metric, label, value in compute_scores(labels, probabilities)}


def sides(labels: np.ndarray, probabilities: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each class: truth, decision and probability of the rows in which it is known, one class against the rest."""
    if labels.ndim == 1:
        predicted = probabilities.argmax(axis=1)
        return [(labels == c, predicted == c, probabilities[:, c]) for c in range(probabilities.shape[1])]
    known = [labels[:, c] >= 0 for c in range(labels.shape[1])]
    return [(labels[k, c] == 1, probabilities[k, c] > 0.5, probabilities[k, c]) for c, k in enumerate(known)]


def expect_class(metric: str, truth: np.ndarray, decision: np.ndarray, probability: np.ndarray) -> float:
    if not truth.any() or (metric == "roc_auc_class" and truth.all()):
        return float("nan")
    functions = {
        "f1_class": lambda: metrics.f1_score(truth, decision, zero_division=0),
        "precision_class": lambda: metrics.precision_score(truth, decision, zero_division=0),
        "recall_class": lambda: metrics.recall_score(truth, decision),
        "roc_auc_class": lambda: metrics.roc_auc_score(truth, probability),
        "average_precision_class": lambda: metrics.average_precision_score(truth, probability),
    }
    return float(functions[metric]())


def expect_calibration(is_right: np.ndarray, confidence: np.ndarray) -> float:
    """Bin by bin, as Guo et al. write it."""
    total = 0.0
    for b in range(CALIBRATION_BINS):
        here = (confidence * CALIBRATION_BINS > b) & (confidence * CALIBRATION_BINS <= b + 1)
        if here.any():
            total += here.mean() * abs(is_right[here].mean() - confidence[here].mean())
    return total


@pytest.mark.parametrize("build", [build_case, build_multi_case])
@pytest.mark.parametrize("seed", CASES)
def test_scores_of_each_class_equal_scikit_learns(seed, build):
    labels, probabilities = build(seed)
    found = by_name(labels, probabilities)
    for metric in METRICS:
        if metric.endswith("_class"):
            for label, side in enumerate(sides(labels, probabilities)):
                expected = expect_class(metric, *side)
                assert found[metric, label] == pytest.approx(expected, abs=1e-12, nan_ok=True), (metric, label)
    assert {metric for metric, label in found if label is None} == {m for m in METRICS if not m.endswith("_class")}
    assert len(found) == 10 + 5 * probabilities.shape[1]


@pytest.mark.parametrize("seed", CASES)
def test_single_label_scores_equal_scikit_learns(seed):
    labels, probabilities = build_case(seed)
    predicted, present = probabilities.argmax(axis=1), np.unique(labels)
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    one_hot = (labels[:, None] == present).astype(int)
    expected = {
        "f1_macro": metrics.f1_score(labels, predicted, **macro),
        "f1_micro": metrics.f1_score(labels, predicted, average="micro"),
        "f1_weighted": metrics.f1_score(labels, predicted, average="weighted", zero_division=0),
        "accuracy": metrics.accuracy_score(labels, predicted),
        "balanced_accuracy": metrics.recall_score(labels, predicted, **macro),
        "precision_macro": metrics.precision_score(labels, predicted, **macro),
        "recall_macro": metrics.recall_score(labels, predicted, **macro),
        "roc_auc": metrics.roc_auc_score(one_hot, probabilities[:, present]) if len(present) > 1 else float("nan"),
        "average_precision": metrics.average_precision_score(one_hot, probabilities[:, present]),
        "calibration_error": expect_calibration(predicted == labels, probabilities.max(axis=1)),
    }
    if set(predicted) <= set(labels):
        assert expected["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    found = by_name(labels, probabilities)
    assert {metric: found[metric, None] for metric in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", CASES)
def test_multi_label_scores_equal_scikit_learns(seed):
    labels, probabilities = build_multi_case(seed)
    known, decisions = labels >= 0, (probabilities > 0.5).astype(int)
    each = sides(labels, probabilities)
    there = [side for side in each if side[0].any()]
    both = [side for side in there if not side[0].all()]
    truth, called = (np.concatenate([side[i] for side in each]) for i in (0, 1))

    def mean(metric: str, among: list) -> float:
        values = [expect_class(metric, *side) for side in among]
        return float(np.mean(values)) if values else float("nan")

    weights = [side[0].sum() for side in there]
    f1 = [expect_class("f1_class", *side) for side in there]
    exact = [(labels[row] == decisions[row])[known[row]].all() for row in range(len(labels)) if known[row].any()]
    balanced = [metrics.balanced_accuracy_score(side[0], side[1]) for side in both]
    expected = {
        "f1_macro": mean("f1_class", there),
        "f1_micro": metrics.f1_score(truth, called, zero_division=0),
        "f1_weighted": np.average(f1, weights=weights) if there else float("nan"),
        "accuracy": np.mean(exact),
        "balanced_accuracy": np.mean(balanced) if both else float("nan"),
        "precision_macro": mean("precision_class", there),
        "recall_macro": mean("recall_class", there),
        "roc_auc": mean("roc_auc_class", both),
        "average_precision": mean("average_precision_class", there),
        "calibration_error": expect_calibration(
            (labels == decisions)[known], np.maximum(probabilities, 1 - probabilities)[known]
        ),
    }
    found = by_name(labels, probabilities)
    assert {metric: found[metric, None] for metric in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    if known.all() and len(there) == labels.shape[1] > 1:
        macro = {"average": "macro", "zero_division": 0}
        assert found["f1_macro", None] == pytest.approx(metrics.f1_score(labels, decisions, **macro))
        assert found["accuracy", None] == pytest.approx(metrics.accuracy_score(labels, decisions))


def test_worked_example():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    found = by_name(labels, probabilities)
    expected = {
        ("f1_macro", None): (2 / 3 + 4 / 5) / 2,
        ("f1_micro", None): 0.75,
        ("accuracy", None): 0.75,
        ("precision_macro", None): (1 + 2 / 3) / 2,
        ("recall_macro", None): 0.75,
        ("roc_auc", None): 1.0,
        ("f1_class", 0): 2 / 3,
        ("f1_class", 1): 4 / 5,
        ("calibration_error", None): (0.1 + 0.6 + 0.3 + 0.2) / 4,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_known_answers_of_calibration():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    honest = (rng.random(len(confidence)) > confidence).astype(np.int64)
    assert by_name(honest, probabilities)["calibration_error", None] < 0.01
    boastful = rng.integers(0, 2, len(confidence))
    assert by_name(boastful, probabilities)["calibration_error", None] == pytest.approx(0.25, abs=0.01)


def test_a_class_never_predicted_scores_zero():
    scores = by_name(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert scores["precision_macro", None] == 0.25
    assert scores["precision_class", 1] == 0
    assert scores["recall_macro", None] == 0.5
    assert scores["f1_macro", None] == pytest.approx(1 / 3)


def test_a_class_that_the_labels_lack_has_no_scores():
    scores = by_name(np.zeros(3, dtype=np.int64), np.tile([0.9, 0.1], (3, 1)))
    assert np.isnan(scores["roc_auc", None])
    assert scores["f1_macro", None] == 1.0
    for metric in METRICS:
        if metric.endswith("_class"):
            assert np.isnan(scores[metric, 1])
            assert np.isnan(scores[metric, 0]) == (metric == "roc_auc_class")


def test_a_tie_goes_to_the_lowest_class_and_to_no_label():
    assert by_name(np.array([0, 1]), np.full((2, 2), 0.5))["recall_macro", None] == 0.5
    assert by_name(np.array([0, 0]), np.full((2, 2), 0.5))["accuracy", None] == 1.0
    assert by_name(np.zeros((2, 2), dtype=np.int8), np.full((2, 2), 0.5))["accuracy", None] == 1.0


def test_f1_macro_ignores_classes_that_are_only_predicted():
    assert compute_f1_macro(np.array([0, 0, 1]), np.array([0, 0, 2])) == 0.5


def test_missing_labels_change_nothing():
    labels, probabilities = build_multi_case(2)
    more = np.concatenate([labels, np.full_like(labels, -1)])
    twice = np.concatenate([probabilities, 1 - probabilities])
    assert by_name(more, twice) == pytest.approx(by_name(labels, probabilities), nan_ok=True)


def test_many_classes_have_no_rows_of_their_own():
    rng = np.random.default_rng(0)
    for num_classes, own in ((MAX_CLASSES, 5 * MAX_CLASSES), (MAX_CLASSES + 1, 0)):
        labels, probabilities = rng.integers(0, num_classes, 300), rng.dirichlet(np.ones(num_classes), 300)
        assert len(compute_scores(labels, probabilities)) == 10 + own


def test_ranking_in_blocks_changes_nothing(monkeypatch):
    for labels, probabilities in (build_case(4), build_multi_case(6)):
        whole = compute_scores(labels, probabilities)
        monkeypatch.setattr("raylab.measures.scores.BLOCK_CELLS", 2 * len(labels))
        assert repr(compute_scores(labels, probabilities)) == repr(whole)


def test_rows_name_classes_and_hold_no_nan():
    rows = list_scores(np.array([0, 0, 2]), np.eye(3)[[0, 1, 2]], ["a", "b", "c"])
    assert {row["class"] for row in rows} == {None, "a", "b", "c"}
    values = {(row["metric"], row["class"]): row["value"] for row in rows}
    assert values["f1_class", "a"] == pytest.approx(2 / 3)
    assert values["f1_class", "b"] is None
    assert {metric for metric, _ in values} == set(DEFINITIONS)


@pytest.mark.parametrize("seed", CASES)
def test_confusions_equal_scikit_learns(seed):
    labels, probabilities = build_case(seed)
    names = [f"c{i}" for i in range(probabilities.shape[1])]
    matrix = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(names)))
    found = {(row["class"], row["predicted"]): row["count"] for row in list_confusions(labels, probabilities, names)}
    assert found == {(names[i], names[j]): matrix[i, j] for i, j in np.argwhere(matrix)}

    labels, probabilities = build_multi_case(seed)
    names = [f"c{i}" for i in range(probabilities.shape[1])]
    found = {(row["class"], row["predicted"]): row["count"] for row in list_confusions(labels, probabilities, names)}
    expected = {}
    for name, (truth, decision, _) in zip(names, sides(labels, probabilities), strict=True):
        matrix = metrics.confusion_matrix(truth, decision, labels=[False, True])
        expected |= {(name, name): matrix[1, 1], (name, None): matrix[1, 0], (None, name): matrix[0, 1]}
    assert found == {pair: count for pair, count in expected.items() if count}


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.array([0, 2]), np.full((2, 2), 0.5), r"0\.\.1"),
        (np.array([0, -1]), np.full((2, 2), 0.5), r"0\.\.1"),
        (np.array([0]), np.full((2, 2), 0.5), "m > 0"),
        (np.array([], dtype=np.int64), np.empty((0, 2)), "m > 0"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]), "1 of 2 rows"),
        (np.array([[0, 1]], dtype=np.int8), np.full((1, 3), 0.5), "m > 0"),
        (np.array([[0, 2]], dtype=np.int8), np.full((1, 2), 0.5), r"-1\.\.1"),
        (np.full((3, 2), -1, dtype=np.int8), np.full((3, 2), 0.5), "none of 3 rows has a known label"),
    ],
)
def test_wrong_input_is_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        compute_scores(labels, probabilities)
