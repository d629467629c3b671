"""Probes on frozen embeddings, all draws at once: logistic regression; and the choice of a probe's C or steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from torch import Tensor

from raylab.evaluation.heads import Floats, Ints, Run, Trained, to_probabilities, weigh_rows

LOGISTIC_C = 1.0
LOGISTIC_C_CANDIDATES = (0.01, 0.1, 1.0, 10.0)
# Fine-tuning and mlp: the steps that are chosen from, as shares of `evaluate.fine_tune.steps`.
STEP_SHARES = (0.25, 0.5, 1.0, 2.0)
MAX_FOLDS = 5

# Of the solver: iterations, pairs that it remembers, and the norm of the gradient at which it ends. The penalty makes
# the objective 1-strongly convex, so no coefficient is further from its optimum than that.
MAX_ITERATIONS = 1000
MEMORY = 10
TOLERANCE = 1e-7
# Numbers of features that one batch of problems holds.
MAX_FEATURES = 32_000_000

Split = tuple[NDArray[np.intp], NDArray[np.intp]]
# Trains some runs; each gives its probabilities at the candidates up to `until`.
Train = Callable[[list[Run]], list[Trained]]


class Fit(NamedTuple):
    """A draw to fit: rows by place int64 [n], labels [n] or [n, C], groups int64 [n], and the seed of the cell."""

    rows: Ints
    labels: NDArray[Any]
    groups: Ints
    seed: int


class Rows(NamedTuple):
    """Rows by place int64 [m], and their labels [m] or [m, C]."""

    rows: Ints
    labels: NDArray[Any]


def list_steps(steps: int, selection: str) -> list[int]:
    """The numbers of steps that are tried, rising."""
    shares = (1.0,) if selection == "fixed" else STEP_SHARES
    return sorted({max(1, round(steps * share)) for share in shares})


def list_strengths(selection: str) -> list[float]:
    """The values of C that are tried."""
    return [LOGISTIC_C] if selection == "fixed" else list(LOGISTIC_C_CANDIDATES)


def fit_probe(
    train: Train, fits: Sequence[Fit], wanted: Ints, *, candidates: int, default: int, selection: str, judges: Rows
) -> list[Trained]:
    """Fits every draw and gives the probabilities of the `wanted` rows at one candidate: [0] of each result.

    fixed: the only candidate. cross_validation: the one with the best mean macro-F1 over grouped folds inside the draw
    (`split_shots`; without folds the default). validation: the best macro-F1 on `judges`, the validation rows. The
    default wins a tie, then the first. Seconds are those of all the runs that a draw needed.
    """
    spent = [0.0] * len(fits)
    chosen = [0 if selection == "fixed" else default] * len(fits)
    if selection == "cross_validation":
        runs, scored, owners = [], [], []
        for index, fit in enumerate(fits):
            for fitted, held_out in split_shots(fit.labels, fit.groups, seed=fit.seed % 2**32):
                rows = fit.rows[held_out]
                runs.append(Run(fit.rows[fitted], fit.labels[fitted], rows, fit.seed, candidates - 1))
                scored.append(fit.labels[held_out])
                owners.append(index)
        scores: list[list[list[float]]] = [[] for _ in fits]
        for owner, labels, trained in zip(owners, scored, train(runs) if runs else [], strict=True):
            spent[owner] += trained.seconds
            scores[owner].append([score_choice(labels, p) for p in trained.probabilities])
        chosen = [choose(np.mean(of, axis=0), default) if of else default for of in scores]
    if selection == "validation":
        runs = [
            Run(fit.rows, fit.labels, np.concatenate([judges.rows, wanted]), fit.seed, candidates - 1) for fit in fits
        ]
    else:
        runs = [Run(fit.rows, fit.labels, wanted, fit.seed, best) for fit, best in zip(fits, chosen, strict=True)]
    found = []
    for index, trained in enumerate(train(runs)):
        probabilities, best = trained.probabilities, chosen[index]
        if selection == "validation":
            cut = len(judges.rows)
            best = choose(np.array([score_choice(judges.labels, p[:cut]) for p in probabilities]), default)
            probabilities = [p[cut:] for p in probabilities]
        found.append(trained._replace(probabilities=[probabilities[best]], seconds=trained.seconds + spent[index]))
    return found


def choose(scores: NDArray[np.floating[Any]], default: int) -> int:
    """The best candidate; of equally good ones the default, then the first. Few shots tie often."""
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    return default if default in best else int(best[0])


def score_choice(labels: NDArray[Any], probabilities: Floats) -> float:
    """What candidates are judged by: macro-F1, over the classes that are there; several labels: mean F1 of each."""
    if labels.ndim == 1:
        known = labels >= 0
        predicted = probabilities[known].argmax(1)
        present = np.unique(labels[known])
        return float(f1_score(labels[known], predicted, labels=present, average="macro", zero_division=0))
    values = []
    for column in range(labels.shape[1]):
        known = labels[:, column] >= 0
        if (labels[known, column] == 1).any():
            values.append(f1_score(labels[known, column], probabilities[known, column] > 0.5, zero_division=0))
    return float(np.mean(values)) if values else 0.0


def split_shots(labels: NDArray[Any], groups: Ints, *, seed: int) -> list[Split]:
    """Split the training rows into folds for choosing a hyper-parameter: (fitted rows, held-out rows) a fold.

    labels int64 [n] or int8 [n, C], groups int64 [n]. Groups stay whole. As many folds as the class with the fewest
    groups has groups, 5 at most; empty with under 2. Several labels a row: not stratified.
    """
    everything = np.zeros((len(groups), 1))
    if labels.ndim == 2:
        num_folds = min(MAX_FOLDS, len(np.unique(groups)))
        if num_folds < 2:
            return []
        return list(GroupKFold(num_folds, shuffle=True, random_state=seed).split(everything, groups=groups))
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    num_folds = min(MAX_FOLDS, int(np.unique(pairs[0], return_counts=True)[1].min()))
    if num_folds < 2:
        return []
    folds = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    # Large groups can leave a fold empty, or one class alone on the other side: nothing can be fitted or scored there.
    return [
        (fitted, held_out)
        for fitted, held_out in folds.split(everything, labels, groups)
        if len(held_out) and len(np.unique(labels[fitted])) > 1
    ]


def train_logistic(
    x: Tensor, runs: Sequence[Run], strengths: Sequence[float], outputs: int, class_weights: str
) -> list[Trained]:
    """L2 logistic regression of every run on embeddings x [n, D], at each C of `strengths` up to the run's `until`.

    C x (sum of losses) + half the squared coefficients, intercepts free, features standardised with the mean and scale
    of the run's rows: scikit-learn's LogisticRegression. Multinomial; of two classes, or several labels a row, binary.
    A class that the run lacks has probability 0, the only one 1; a label without known rows 0.5.
    """
    found: list[list[Floats]] = [[] for _ in runs]
    seconds, sizes = [0.0] * len(runs), [0] * len(runs)
    # Of like size go together, so that few of the rows are padding.
    jobs = sorted(
        ((k, c) for k, run in enumerate(runs) for c in range(run.until + 1)),
        key=lambda job: (len(runs[job[0]].train), job),
    )
    kept: dict[tuple[int, int], Floats] = {}
    by_kind: dict[tuple[bool, int], list[tuple[int, int]]] = {}
    for k, c in jobs:
        classes = np.unique(runs[k].labels) if runs[k].labels.ndim == 1 else np.zeros(0)
        binary = runs[k].labels.ndim == 2 or len(classes) == 2
        if runs[k].labels.ndim == 1 and len(classes) == 1:
            kept[k, c] = np.tile(np.eye(outputs)[classes[0]], (len(runs[k].eval), 1))
            continue
        columns = 1 if len(classes) == 2 else outputs
        sizes[k] = (x.shape[1] + 1) * (columns if binary else len(classes))
        by_kind.setdefault((binary, columns), []).append((k, c))
    for (binary, columns), of_kind in by_kind.items():
        while of_kind:
            count = max(1, min(len(of_kind), MAX_FEATURES // (len(runs[of_kind[-1][0]].train) * x.shape[1])))
            batch, of_kind = of_kind[-count:], of_kind[:-count]
            started = time.perf_counter()
            solved = _solve(
                x, [runs[k] for k, _ in batch], [strengths[c] for _, c in batch], columns, binary, class_weights
            )
            for (k, c), probabilities in zip(batch, solved, strict=True):
                if binary and runs[k].labels.ndim == 1:
                    low, high = np.unique(runs[k].labels)
                    both = np.zeros((len(probabilities), outputs))
                    both[:, low], both[:, high] = 1 - probabilities[:, 0], probabilities[:, 0]
                    probabilities = both
                kept[k, c] = probabilities
                seconds[k] += (time.perf_counter() - started) / count
    for k, run in enumerate(runs):
        found[k] = [kept[k, c] for c in range(run.until + 1)]
    return [Trained(p, n, s) for p, n, s in zip(found, sizes, seconds, strict=True)]


def _solve(
    x: Tensor, runs: list[Run], strengths: list[float], columns: int, binary: bool, class_weights: str
) -> list[Floats]:
    """The problems of one kind and like size, together; `columns` coefficients' vectors each."""
    device, longest = x.device, max(len(run.train) for run in runs)
    features = torch.zeros(len(runs), longest, x.shape[1], dtype=torch.float64, device=device)
    targets = torch.zeros(len(runs), longest, columns, dtype=torch.float64, device=device)
    weights = torch.zeros(len(runs), longest, columns if binary else 1, dtype=torch.float64, device=device)
    allowed = torch.zeros(len(runs), 1, columns, dtype=torch.float64, device=device)
    scaled: list[tuple[Tensor, Tensor]] = []
    for k, run in enumerate(runs):
        mine, n = x[torch.from_numpy(run.train).to(device)].double(), len(run.train)
        mean, scale = mine.mean(0), mine.std(0, correction=0)
        # A constant feature keeps its scale, as StandardScaler has it.
        scale = torch.where(scale <= 1e-7 * mean.abs() + 1e-12, torch.ones_like(scale), scale)
        scaled.append((mean, scale))
        features[k, :n] = (mine - mean) / scale
        labels = run.labels if run.labels.ndim == 2 else run.labels[:, None]
        counts = weigh_rows(labels, class_weights).astype(np.float64) * strengths[k]
        counts[:, [len(np.unique(of[of >= 0])) < 2 for of in labels.T]] = 0  # nothing to tell apart
        weights[k, :n] = torch.from_numpy(counts).to(device)
        if binary:
            highest = 1 if run.labels.ndim == 2 else labels.max()
            targets[k, :n] = torch.from_numpy((labels == highest).astype(np.float64)).to(device)
        else:
            targets[k, torch.arange(n), torch.from_numpy(run.labels).to(device)] = 1.0
            allowed[k, 0, torch.from_numpy(np.setdiff1d(np.arange(columns), run.labels)).to(device)] = -torch.inf
    coefficients, intercepts = minimise(features, targets, weights, allowed, binary=binary)
    found = []
    for k, run in enumerate(runs):
        mean, scale = scaled[k]
        wanted = (x[torch.from_numpy(run.eval).to(device)].double() - mean) / scale
        probabilities = to_probabilities(wanted @ coefficients[k] + intercepts[k] + allowed[k], multi=binary)
        if run.labels.ndim == 2:
            for column in range(columns):
                known = run.labels[:, column][run.labels[:, column] >= 0]
                if len(np.unique(known)) < 2:
                    probabilities[:, column] = known[0] if len(known) else 0.5
        found.append(probabilities)
    return found


def minimise(
    features: Tensor, targets: Tensor, weights: Tensor, allowed: Tensor, *, binary: bool
) -> tuple[Tensor, Tensor]:
    """The optimum of K convex problems by L-BFGS: coefficients [K, D, P] and intercepts [K, 1, P], float64.

    features [K, n, D]; targets [K, n, P] of 0 and 1; weights of the losses [K, n, 1], or [K, n, P] where binary;
    allowed [K, 1, P] is added to the logits. Every problem has its own steps and its own end.
    """
    num, _, width = features.shape
    columns = targets.shape[2]
    transposed = features.transpose(1, 2).contiguous()

    def evaluate(theta: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        whole = len(of) == num
        f, t, y, w, a = (v if whole else v[of] for v in (features, transposed, targets, weights, allowed))
        theta = theta.view(len(of), width + 1, columns)
        logits = torch.baddbmm(theta[:, width:], f, theta[:, :width]) + a
        if binary:
            losses = torch.nn.functional.softplus(logits) - y * logits
            residual = (logits.sigmoid() - y) * w
        else:
            scores = logits.log_softmax(2)
            losses = -torch.where(y > 0, scores, 0.0)
            residual = (scores.exp() - y) * w
        value = (losses * w).sum((1, 2)) + 0.5 * theta[:, :width].square().sum((1, 2))
        gradient = torch.cat([torch.bmm(t, residual) + theta[:, :width], residual.sum(1, keepdim=True)], 1)
        return value, gradient.flatten(1)

    theta = torch.zeros(num, (width + 1) * columns, dtype=torch.float64, device=features.device)
    alive = torch.arange(num, device=features.device)
    value, gradient = evaluate(theta, alive)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_ITERATIONS):
        # What is solved leaves the batch, with its share of the memory.
        open_ones = gradient.norm(dim=1) > TOLERANCE
        if not open_ones.all():
            alive, value, gradient = alive[open_ones], value[open_ones], gradient[open_ones]
            pairs = [(s[open_ones], y[open_ones], r[open_ones]) for s, y, r in pairs]
        if not len(alive):
            break
        direction, weighed = -gradient, []
        for s, y, r in reversed(pairs):
            alpha = r * (s * direction).sum(1)
            direction = direction - alpha[:, None] * y
            weighed.append(alpha)
        if pairs:
            s, y, r = pairs[-1]
            direction = direction / (r * y.square().sum(1))[:, None]
        else:
            direction = direction / gradient.norm(dim=1, keepdim=True)
        for (s, y, r), alpha in zip(pairs, reversed(weighed), strict=True):
            direction = direction + (alpha - r * (y * direction).sum(1))[:, None] * s
        slope = (direction * gradient).sum(1)
        length = torch.ones_like(slope)
        now = theta[alive]
        for _ in range(30):  # halved until the value falls enough; a convex function needs few
            trial = now + length[:, None] * direction
            new_value, new_gradient = evaluate(trial, alive)
            # Near the optimum the value has no digits left: then the slope decides.
            good = (new_value <= value + 1e-4 * length * slope) | (
                (new_value <= value + 1e-12 * value.abs()) & ((new_gradient * direction).sum(1).abs() <= slope.abs())
            )
            if good.all():
                break
            length = torch.where(good, length, length / 2)
        step, change = trial - now, new_gradient - gradient
        theta[alive] = trial
        curvature = (step * change).sum(1).clamp(min=1e-30)
        pairs = [*pairs[-MEMORY + 1 :], (step, change, 1 / curvature)]
        value, gradient = new_value, new_gradient
    theta = theta.view(num, width + 1, columns)
    return theta[:, :width], theta[:, width:]
