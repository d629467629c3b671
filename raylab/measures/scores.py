"""Classification scores and confusions of one set of predictions, of single-label and multi-label tasks."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MAX_CLASSES = 100  # up to so many, each class has rows of its own
CALIBRATION_BINS = 15
BLOCK_CELLS = 4_000_000  # rows x classes that are ranked at once

_MACRO = "mean over the classes that the labels hold"
_NONE = "NaN for a class that the labels lack"
DEFINITIONS: dict[str, str] = {
    "f1_macro": f"F1, {_MACRO}; 0 to 1, higher is better",
    "f1_micro": "F1 of all decisions pooled (of a single-label task: the accuracy); 0 to 1, higher is better",
    "f1_weighted": "F1, mean over classes weighted by their rows; 0 to 1, higher is better",
    "accuracy": "share of rows predicted right, multi-label: in all labels that are known; 0 to 1, higher is better",
    "balanced_accuracy": f"recall, {_MACRO}; multi-label: mean of the recalls with and without a label, then over "
    "labels with both; 0 to 1, higher is better",
    "precision_macro": f"precision, {_MACRO}; 0 to 1, higher is better",
    "recall_macro": f"recall, {_MACRO}; 0 to 1, higher is better",
    "roc_auc": "area under the ROC curve of each class against the rest, ties counted half, mean over the classes with "
    "rows on both sides (NaN: none); 0 to 1, 0.5 is chance, higher is better",
    "average_precision": "sum of precision times gain in recall down the ranking of each class's probability, "
    f"no interpolation, {_MACRO}; 0 to 1, the class's share is chance, higher is better",
    "calibration_error": "expected calibration error (Guo et al. 2017, arXiv 1706.04599): |share right - mean "
    f"probability| of the predictions, in {CALIBRATION_BINS} bins of equal width of it, weighted by rows; "
    "multi-label: over all known labels; 0 to 1, lower is better",
    "f1_class": f"F1 of one class, 0 where nothing is right; {_NONE}; 0 to 1, higher is better",
    "precision_class": f"precision of one class, 0 where it is never predicted; {_NONE}; 0 to 1, higher is better",
    "recall_class": f"recall of one class; {_NONE}; 0 to 1, higher is better",
    "roc_auc_class": "area under the ROC curve of one class against the rest; NaN without rows on both sides; "
    "0 to 1, 0.5 is chance, higher is better",
    "average_precision_class": f"average precision of one class; {_NONE}; 0 to 1, higher is better",
}
METRICS = tuple(DEFINITIONS)


class Score(NamedTuple):
    """A score: a key of DEFINITIONS, the class (an index; None: over all classes), and its value."""

    metric: str
    label: int | None
    value: float


class Counted(NamedTuple):
    """Of each class, [C]: rows right, rows predicted, rows there are; and all rows in which it is known."""

    right: FloatArray
    predicted: FloatArray
    present: FloatArray
    known: FloatArray


def compute_scores(labels: Labels, probabilities: npt.NDArray[Any]) -> list[Score]:
    """Score probabilities [m, C] against labels by every metric of DEFINITIONS; metrics of one class end in `_class`.

    Single-label: labels int64 [m], each in 0..C-1; the predicted class is the most probable one, the lowest index on a
    tie. Multi-label: labels int8 [m, C] of 1, 0 and -1 (not known: left out); predicted is what is above 0.5. Scores of
    one class are given for up to 100 classes. ValueError if there are no rows (or none with a known label), the
    shapes do not fit, a label is out of range or a probability is not finite.
    """
    labels, probabilities = _check(labels, probabilities)
    predicted = predict(labels.ndim, probabilities)
    counted = _count(labels, predicted, probabilities.shape[1])
    right, called, present, known = counted
    there = present > 0
    precision, recall, f1 = right / np.maximum(called, 1), right / np.maximum(present, 1), _f1(*counted[:3])
    auc, average_precision = _rank(labels, probabilities)
    if labels.ndim == 1:
        is_right, confidence = predicted == labels, probabilities[np.arange(len(labels)), predicted]
        accuracy, balanced = is_right.mean(), recall[there].mean()
    else:
        seen = labels >= 0
        is_right = (predicted == labels)[seen]
        confidence = np.maximum(probabilities, 1 - probabilities)[seen]
        rows = seen.any(axis=1)
        accuracy = ((predicted == labels) | ~seen)[rows].all(axis=1).mean()
        absent = known - present
        specificity = (absent - (called - right)) / np.maximum(absent, 1)
        balanced = _mean(((recall + specificity) / 2)[there & (absent > 0)])
    overall = {
        "f1_macro": _mean(f1[there]),
        "f1_micro": _f1(right.sum(), called.sum(), present.sum()),
        "f1_weighted": _mean(f1[there], present[there]),
        "accuracy": accuracy,
        "balanced_accuracy": balanced,
        "precision_macro": _mean(precision[there]),
        "recall_macro": _mean(recall[there]),
        "roc_auc": _mean(auc[~np.isnan(auc)]),
        "average_precision": _mean(average_precision[there]),
        "calibration_error": _calibration_error(is_right, confidence),
    }
    scores = [Score(metric, None, float(value)) for metric, value in overall.items()]
    if len(there) > MAX_CLASSES:
        return scores
    by_class = {"f1": f1, "precision": precision, "recall": recall}
    by_class = {name: np.where(there, values, np.nan) for name, values in by_class.items()}
    by_class |= {"roc_auc": auc, "average_precision": average_precision}
    for name, values in by_class.items():
        scores += [Score(f"{name}_class", label, value) for label, value in enumerate(values.tolist())]
    return scores


def list_scores(labels: Labels, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """`compute_scores` as rows of `scores`: metric, class (its name) and value (None where it is not defined)."""
    return [
        {
            "metric": metric,
            "class": None if label is None else classes[label],
            "value": None if np.isnan(value) else value,
        }
        for metric, label, value in compute_scores(labels, probabilities)
    ]


def list_confusions(labels: Labels, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `confusions`: class, predicted (names) and count, of all pairs that occur.

    Multi-label: for each label the rows that have it and are predicted to (both named), that have it and are not
    (predicted is null), and that do not have it but are predicted to (class is null).
    """
    labels, probabilities = _check(labels, probabilities)
    predicted = predict(labels.ndim, probabilities)
    found: Iterator[tuple[str | None, str | None, int]]
    if labels.ndim == 1:
        counts = np.bincount(labels * len(classes) + predicted)
        pairs = np.flatnonzero(counts).tolist()
        found = ((classes[p // len(classes)], classes[p % len(classes)], int(counts[p])) for p in pairs)
    else:
        right, called, present, _ = _count(labels, predicted, len(classes))
        kinds = zip(classes, right.tolist(), (present - right).tolist(), (called - right).tolist(), strict=True)
        found = (
            (name if is_there else None, name if is_called else None, int(count))
            for name, *cells in kinds
            for (is_there, is_called), count in zip(((True, True), (True, False), (False, True)), cells, strict=True)
        )
    return [{"class": true, "predicted": said, "count": count} for true, said, count in found if count]


def predict(ndim: int, probabilities: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The classes predicted from probabilities [m, C]: [m] (ndim 1), or [m, C] of 0 and 1 (multi-label, ndim 2)."""
    return probabilities.argmax(axis=1) if ndim == 1 else (probabilities > 0.5).astype(np.int64)


def compute_f1_macro(labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64]) -> float:
    """Mean F1 over the classes present in `labels`. Both int64 [m], m > 0."""
    counted = _count(labels, predictions, int(max(np.max(labels), np.max(predictions))) + 1)
    return _mean(_f1(*counted[:3])[counted.present > 0])


def _check(labels: Labels, probabilities: npt.NDArray[Any]) -> tuple[Labels, FloatArray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    fits = probabilities.ndim == 2 and probabilities.size and labels.shape[:1] == probabilities.shape[:1]
    if not fits or labels.ndim not in (1, 2) or labels.shape != probabilities.shape[: labels.ndim]:
        raise ValueError(
            f"labels {labels.shape} and probabilities {probabilities.shape} must be [m] (or [m, C]) and [m, C], m > 0"
        )
    lowest, highest = (0, probabilities.shape[1] - 1) if labels.ndim == 1 else (-1, 1)
    if labels.min() < lowest or labels.max() > highest:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}: they must lie in {lowest}..{highest}")
    if labels.max() < 0:
        raise ValueError(f"none of {len(labels)} rows has a known label")
    if num_bad := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise ValueError(f"{num_bad} of {len(labels)} rows have a probability that is not finite")
    return labels, probabilities


def _count(labels: Labels, predicted: npt.NDArray[np.int64], num_classes: int) -> Counted:
    if labels.ndim == 1:
        sides = (labels[labels == predicted], predicted, labels)
        right, called, present = (np.bincount(side, minlength=num_classes).astype(np.float64) for side in sides)
        return Counted(right, called, present, np.full(num_classes, float(len(labels))))
    known, there, called_here = labels >= 0, labels == 1, predicted == 1
    cells = (there & called_here, known & called_here, there, known)
    return Counted(*(cell.sum(axis=0, dtype=np.float64) for cell in cells))


def _f1(right: Any, called: Any, present: Any) -> Any:
    return 2 * right / np.maximum(called + present, 1)


def _mean(values: FloatArray, weights: FloatArray | None = None) -> float:
    return float(np.average(values, weights=weights)) if len(values) else float("nan")


def _rank(labels: Labels, probabilities: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ROC AUC and average precision of each class, [C]; NaN where they are not defined."""
    num_classes = probabilities.shape[1]
    step = max(1, BLOCK_CELLS // len(labels))
    parts = []
    for start in range(0, num_classes, step):
        here = slice(start, min(start + step, num_classes))
        there = labels[:, None] == np.arange(num_classes)[here] if labels.ndim == 1 else labels[:, here] == 1
        parts.append(_rank_block(there, labels[:, here] >= 0 if labels.ndim == 2 else None, probabilities[:, here]))
    auc, average_precision = (np.concatenate(values) for values in zip(*parts, strict=True))
    return auc, average_precision


def _rank_block(there: BoolArray, known: BoolArray | None, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """As `_rank`; `there` [m, C] says where a class is, `known` where that is known (None: everywhere)."""
    if known is not None:
        scores = np.where(known, scores, -np.inf)  # last, and of neither side
    order = np.argsort(-scores, axis=0)
    there, scores = np.take_along_axis(there, order, axis=0), np.take_along_axis(scores, order, axis=0)
    right = np.cumsum(there, axis=0, dtype=np.float64)
    seen = np.arange(1.0, len(there) + 1)[:, None]
    if known is not None:
        seen = np.minimum(seen, known.sum(axis=0))
    wrong = seen - right
    # A threshold lies only between two different scores: before it, what stands at the threshold above.
    ends = np.concatenate([scores[1:] != scores[:-1], np.ones_like(there[:1])])
    right_before, wrong_before = (
        np.concatenate([np.zeros_like(x[:1]), np.maximum.accumulate(np.where(ends, x, 0.0), axis=0)[:-1]])
        for x in (right, wrong)
    )
    positives, negatives = right[-1], wrong[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (ends * (wrong - wrong_before) * (right + right_before) / 2).sum(axis=0) / (positives * negatives)
        gained = (ends * (right - right_before) * right / np.maximum(seen, 1)).sum(axis=0) / positives
    return area, gained


def _calibration_error(is_right: BoolArray, confidence: FloatArray) -> float:
    # Bins are open below and closed above; the first one holds 0 too.
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
