import numpy as np
import pytest
from sklearn import metrics

from raylab.scores import METRICS, compute_f1_macro, compute_scores


def build_case(seed: int, num_classes: int, num_rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # Every class is present, and the probabilities carry some signal, so that no score is trivial.
    labels = rng.permutation(np.append(np.arange(num_classes), rng.integers(0, num_classes, num_rows - num_classes)))
    logits = rng.normal(size=(num_rows, num_classes)) + np.eye(num_classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed, num_classes):
    labels, probabilities = build_case(seed, num_classes)
    predictions = probabilities.argmax(axis=1)
    auc_input = probabilities[:, 1] if num_classes == 2 else probabilities
    expected = {
        "f1_macro": metrics.f1_score(labels, predictions, average="macro"),
        "accuracy": metrics.accuracy_score(labels, predictions),
        "precision_macro": metrics.precision_score(labels, predictions, average="macro", zero_division=0),
        "recall_macro": metrics.recall_score(labels, predictions, average="macro"),
        "roc_auc": metrics.roc_auc_score(labels, auc_input, multi_class="ovr", average="macro"),
    }
    scores = compute_scores(labels, probabilities)
    assert tuple(scores) == METRICS
    assert scores == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_class_missing_from_the_labels_is_left_out_of_averages(seed):
    labels, probabilities = build_case(seed, 4)
    keep = labels != 2
    labels, probabilities = labels[keep], probabilities[keep]
    predictions = probabilities.argmax(axis=1)
    assert (predictions == 2).any()
    present = [0, 1, 3]
    scores = compute_scores(labels, probabilities)
    aucs = [metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in present]
    assert scores["roc_auc"] == pytest.approx(np.mean(aucs))
    for name, function in (
        ("f1_macro", metrics.f1_score),
        ("precision_macro", metrics.precision_score),
        ("recall_macro", metrics.recall_score),
    ):
        per_class = function(labels, predictions, labels=present, average=None, zero_division=0)
        assert scores[name] == pytest.approx(per_class.mean())
    assert scores["f1_macro"] > metrics.f1_score(labels, predictions, average="macro", zero_division=0)


def test_worked_example():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    assert compute_scores(labels, probabilities) == pytest.approx(
        {"f1_macro": (2 / 3 + 4 / 5) / 2, "accuracy": 0.75, "precision_macro": (1 + 2 / 3) / 2, "recall_macro": 0.75,
         "roc_auc": 1.0}
    )  # fmt: skip


def test_a_class_never_predicted_scores_zero():
    labels = np.array([0, 1])
    scores = compute_scores(labels, np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert scores["precision_macro"] == 0.25
    assert scores["recall_macro"] == 0.5
    assert scores["f1_macro"] == pytest.approx(1 / 3)


def test_one_class_has_no_auc():
    scores = compute_scores(np.zeros(3, dtype=np.int64), np.tile([0.9, 0.1], (3, 1)))
    assert np.isnan(scores["roc_auc"])
    assert scores["f1_macro"] == 1.0


def test_a_tie_goes_to_the_lowest_class():
    assert compute_scores(np.array([0, 1]), np.full((2, 2), 0.5))["recall_macro"] == 0.5
    assert compute_scores(np.array([0, 0]), np.full((2, 2), 0.5))["accuracy"] == 1.0


def test_f1_macro_ignores_classes_that_are_only_predicted():
    assert compute_f1_macro(np.array([0, 0, 1]), np.array([0, 0, 2])) == 0.5


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.array([0, 2]), np.full((2, 2), 0.5), r"0\.\.1"),
        (np.array([0, -1]), np.full((2, 2), 0.5), r"0\.\.1"),
        (np.array([0]), np.full((2, 2), 0.5), "m > 0"),
        (np.array([], dtype=np.int64), np.empty((0, 2)), "m > 0"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]), "1 of 2 rows"),
    ],
)
def test_wrong_input_is_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        compute_scores(labels, probabilities)
