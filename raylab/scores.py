"""Classification scores of one set of predictions."""

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

METRICS = ("f1_macro", "accuracy", "precision_macro", "recall_macro", "roc_auc")


def compute_scores(labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> dict[str, float]:
    """Score class probabilities against labels; keys are METRICS, higher is better for each.

    labels: int64 [m], each in 0..C-1. probabilities: float [m, C]. The predicted class is the most probable one, the
    lowest index on a tie. Macro averages run over the classes present in `labels`, and a class that is never
    predicted has precision and F1 of 0. `roc_auc` is one-vs-rest, averaged over the classes that have both positives
    and negatives in `labels`; NaN if there is none. ValueError if there are no rows, the shapes do not fit, a label
    is out of range or a probability is not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not probabilities.size:
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} must be [m] and [m, C], m > 0")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}: they must lie in 0..{probabilities.shape[1] - 1}"
        )
    if num_bad := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise ValueError(f"{num_bad} of {len(labels)} rows have a probability that is not finite")

    predictions = probabilities.argmax(axis=1)
    macro = {"labels": np.unique(labels), "average": "macro", "zero_division": 0}
    return {
        "f1_macro": compute_f1_macro(labels, predictions),
        "accuracy": float(accuracy_score(labels, predictions)),
        "precision_macro": float(precision_score(labels, predictions, **macro)),
        "recall_macro": float(recall_score(labels, predictions, **macro)),
        "roc_auc": _compute_roc_auc(labels, probabilities),
    }


def compute_f1_macro(labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64]) -> float:
    """Mean F1 over the classes present in `labels`. Both int64 [m], m > 0."""
    return float(f1_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0))


def _compute_roc_auc(labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    # A class of which every row is a member has no negatives, so one present class leaves nothing to average.
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    return float(roc_auc_score(labels[:, None] == present, probabilities[:, present], average="macro"))
