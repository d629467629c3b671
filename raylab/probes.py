"""Probes: the classifiers that are trained on frozen features."""

import warnings
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from raylab.scores import compute_f1_macro

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
FeatureArray = npt.NDArray[np.float32]
Selection = Literal["fixed", "cross_validation"]
Split = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]

LOGISTIC_C = 1.0
LOGISTIC_C_CANDIDATES = (0.01, 0.1, 1.0, 10.0)
LOGISTIC_MAX_ITER = 1000
MLP_ALPHA = 1e-4
MLP_ALPHA_CANDIDATES = (1e-4, 1e-2, 1.0)
MLP_HIDDEN_SIZE = 128
MLP_EPOCHS = 100
MLP_MAX_BATCH_ROWS = 200
MAX_FOLDS = 5


class Probe(Protocol):
    """Train on the shots and return float64 class probabilities [m, num_classes] of the evaluation rows.

    train_x: float32 [n, d], n > 0. train_y: int64 [n], each in 0..num_classes-1. eval_x: float32 [m, d], m > 0.
    groups: int64 [n], of the training rows. seed: 0..2**32-1.
    selection: "fixed" uses the probe's default; "cross_validation" picks from its candidates by mean macro-F1 over
    grouped, stratified folds inside the training rows. There are as many folds as the class with the fewest groups
    has groups, 5 at most; with under 2 the default is used. The default wins a tie, then the first listed candidate.
    A class absent from train_y has probability 0; if only one is present, it has probability 1.
    Features are standardised with the mean and scale of the rows that are trained on.
    ValueError if the shapes do not fit, a label is out of range, or a feature is not finite.
    """

    def __call__(
        self,
        train_x: FeatureArray,
        train_y: IntArray,
        eval_x: FeatureArray,
        *,
        num_classes: int,
        seed: int,
        selection: Selection,
        groups: IntArray,
    ) -> FloatArray: ...


def fit_logistic(
    train_x: FeatureArray,
    train_y: IntArray,
    eval_x: FeatureArray,
    *,
    num_classes: int,
    seed: int,
    selection: Selection,
    groups: IntArray,
) -> FloatArray:
    """Multinomial logistic regression with an L2 penalty (lbfgs, up to 1000 iterations); see `Probe`.

    C is 1, or chosen from 0.01, 0.1, 1 and 10. The seed matters only to the folds.
    """
    if np.ndim(train_y) == 2:  # each label against the rest, on the rows in which it is known
        probabilities = np.zeros((len(eval_x), num_classes))
        for label in range(num_classes):
            known = train_y[:, label] >= 0
            if known.any():
                y = train_y[known, label].astype(np.int64)
                probabilities[:, label] = fit_logistic(
                    train_x[known], y, eval_x, num_classes=2, seed=seed, selection=selection, groups=groups[known]
                )[:, 1]
        return probabilities
    model = LogisticRegression(C=LOGISTIC_C, solver="lbfgs", max_iter=LOGISTIC_MAX_ITER)
    return _fit(model, "C", LOGISTIC_C_CANDIDATES, train_x, train_y, eval_x, num_classes, seed, selection, groups)


def fit_mlp(
    train_x: FeatureArray,
    train_y: IntArray,
    eval_x: FeatureArray,
    *,
    num_classes: int,
    seed: int,
    selection: Selection,
    groups: IntArray,
) -> FloatArray:
    """One hidden layer of 128 ReLU units, 100 epochs of Adam at 1e-3; see `Probe`.

    A batch is a tenth of the rows, from 2 to 200. The L2 penalty alpha is 1e-4, or chosen from 1e-4, 1e-2 and 1.
    It never stops early, so that no row is held out.
    """
    model = MLPClassifier(
        hidden_layer_sizes=(MLP_HIDDEN_SIZE,),
        alpha=MLP_ALPHA,
        solver="adam",
        max_iter=MLP_EPOCHS,
        # Ten steps an epoch even from a few shots, which one batch an epoch would leave undertrained.
        batch_size=max(2, min(MLP_MAX_BATCH_ROWS, len(train_x) // 10)),
        # Otherwise a flat training loss would end the epochs early.
        n_iter_no_change=MLP_EPOCHS,
        early_stopping=False,
        random_state=seed,
    )
    return _fit(model, "alpha", MLP_ALPHA_CANDIDATES, train_x, train_y, eval_x, num_classes, seed, selection, groups)


PROBES: dict[str, Probe] = {"logistic": fit_logistic, "mlp": fit_mlp}


def split_shots(train_y: IntArray, groups: IntArray, *, seed: int) -> list[Split]:
    """Split the training rows into folds for choosing a hyper-parameter: (fitted rows, held-out rows) a fold.

    train_y, groups: int64 [n]. Groups stay whole. Empty if a class has under 2 groups: it could not be on both sides.
    """
    pairs = np.unique(np.stack([train_y, groups]), axis=1)
    num_folds = min(MAX_FOLDS, int(np.unique(pairs[0], return_counts=True)[1].min()))
    if num_folds < 2:
        return []
    folds = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    # Large groups can leave a fold empty, or one class alone on the other side: nothing can be fitted or scored there.
    return [
        (fitted, held_out)
        for fitted, held_out in folds.split(np.zeros((len(train_y), 1)), train_y, groups)
        if len(held_out) and len(np.unique(train_y[fitted])) > 1
    ]


def _fit(
    model: Any,
    setting: str,
    candidates: tuple[float, ...],
    train_x: FeatureArray,
    train_y: IntArray,
    eval_x: FeatureArray,
    num_classes: int,
    seed: int,
    selection: Selection,
    groups: IntArray,
) -> FloatArray:
    train_x, eval_x = np.asarray(train_x), np.asarray(eval_x)
    train_y, groups = np.asarray(train_y), np.asarray(groups)
    _check(train_x, train_y, eval_x, num_classes, selection, groups)
    probabilities = np.zeros((len(eval_x), num_classes))
    classes = np.unique(train_y)
    if len(classes) == 1:
        probabilities[:, classes[0]] = 1.0
        return probabilities

    fitted = Pipeline([("scale", StandardScaler()), ("model", model)])
    splits = split_shots(train_y, groups, seed=seed) if selection == "cross_validation" else []
    if splits:
        # The search keeps the first of equally good candidates; few shots tie often, and then the default should win.
        default = getattr(model, setting)
        ordered = sorted(candidates, key=lambda candidate: candidate != default)
        fitted = GridSearchCV(
            fitted,
            {f"model__{setting}": ordered},
            scoring=make_scorer(compute_f1_macro),
            cv=splits,
            error_score="raise",
        )
    # One thread: the matrices are small, so that more only wait for each other (five times slower on two busy cores),
    # and sums do not depend on how many cores a machine has.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # The MLP warns after every fixed number of epochs, and few shots warn often: nobody could act on it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A fold can be smaller than a batch when one group holds most rows; then the batch is the fold.
        warnings.filterwarnings("ignore", message="Got `batch_size`")
        fitted.fit(train_x, train_y)
        probabilities[:, classes] = fitted.predict_proba(eval_x)
    return probabilities


def _check(
    train_x: FeatureArray,
    train_y: IntArray,
    eval_x: FeatureArray,
    num_classes: int,
    selection: Selection,
    groups: IntArray,
) -> None:
    if train_x.ndim != 2 or eval_x.ndim != 2 or train_x.shape[1] != eval_x.shape[1]:
        raise ValueError(f"train_x {train_x.shape} and eval_x {eval_x.shape} must be [n, d] and [m, d]")
    if not len(train_x) or not len(eval_x):
        raise ValueError(f"{len(train_x)} training and {len(eval_x)} evaluation rows: both need at least 1")
    if train_y.shape != train_x.shape[:1] or groups.shape != train_x.shape[:1]:
        raise ValueError(f"train_y {train_y.shape} and groups {groups.shape} must be [{len(train_x)}]")
    if train_y.min() < 0 or train_y.max() >= num_classes:
        raise ValueError(f"train_y runs from {train_y.min()} to {train_y.max()}: it must lie in 0..{num_classes - 1}")
    if selection not in ("fixed", "cross_validation"):
        raise ValueError(f"selection is {selection!r}: give 'fixed' or 'cross_validation'")
    for name, features in (("train_x", train_x), ("eval_x", eval_x)):
        if num_bad := int((~np.isfinite(features)).any(axis=1).sum()):
            raise ValueError(f"{num_bad} of {len(features)} rows of {name} have a feature that is not finite")
