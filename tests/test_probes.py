import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from raylab.evaluation.heads import Run, train_heads
from raylab.evaluation.probes import (
    LOGISTIC_C_CANDIDATES,
    Fit,
    Rows,
    fit_probe,
    list_steps,
    list_strengths,
    minimise,
    score_choice,
    split_shots,
    train_logistic,
)
from raylab.job.blocks import FineTune
from raylab.measures.scores import compute_scores

PROBES = ("logistic", "mlp")
FIXED = {"seed": 0, "selection": "fixed"}
HEAD = FineTune(steps=60, head_learning_rate=1e-2, hidden_size=16)


def probe_with(name, x, outputs, selection, settings=HEAD):
    """What trains the runs of a probe on x, and the candidates that it has."""
    x = torch.from_numpy(np.asarray(x, dtype=np.float32))
    if name == "logistic":
        tried = list_strengths(selection)
        return (
            lambda runs: train_logistic(x, runs, tried, outputs, settings.class_weights),
            tried.index(1.0),
            len(tried),
        )
    steps = list_steps(settings.steps, selection)
    return lambda runs: train_heads(x, runs, steps, outputs, settings), steps.index(settings.steps), len(steps)


def fit(name, train_x, train_y, eval_x, *, num_classes, seed, selection, groups, judges=None):
    """Probabilities of one probe on one draw; `judges` are validation features and labels."""
    judge_x, judge_y = judges if judges is not None else (eval_x[:0], train_y[:0])
    x = np.concatenate([train_x, judge_x, eval_x])
    train, default, candidates = probe_with(name, x, num_classes, selection)
    n, m = len(train_x), len(judge_x)
    [trained] = fit_probe(
        train, [Fit(np.arange(n), train_y, groups, seed)], np.arange(n + m, len(x)), candidates=candidates,
        default=default, selection=selection, judges=Rows(np.arange(n, n + m), judge_y),
    )  # fmt: skip
    [probabilities] = trained.probabilities
    return probabilities


def build_blobs(rng: np.random.Generator, *, num_rows: int = 60, num_classes: int = 3, distance: float = 4.0):
    """Rows around one centre a class, on scales that differ threefold between features."""
    labels = np.arange(num_rows) % num_classes
    scales = np.logspace(-0.25, 0.25, 10)
    x = (rng.normal(size=(num_rows, 10)) + distance * np.eye(10)[labels]) * scales
    return x.astype(np.float32), labels


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    train_x, train_y = build_blobs(rng)
    eval_x, eval_y = build_blobs(rng, num_rows=90)
    return train_x, train_y, eval_x, eval_y, np.arange(len(train_y))


@pytest.mark.parametrize("selection", ["fixed", "cross_validation"])
@pytest.mark.parametrize("name", PROBES)
def test_learns_a_separable_set(name, selection, blobs):
    train_x, train_y, eval_x, eval_y, groups = blobs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"num_classes": 3, "seed": 0, "selection": selection, "groups": groups}
        probabilities = fit(name, train_x, train_y, eval_x, **options)
    assert probabilities.dtype == np.float64
    assert probabilities.shape == (90, 3)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == eval_y).mean() > 0.95


def test_logistic_equals_a_plain_pipeline(blobs):
    train_x, train_y, eval_x, _, groups = blobs
    plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=5000))
    plain.fit(train_x.astype(np.float64), train_y)
    probabilities = fit("logistic", train_x, train_y, eval_x, num_classes=3, groups=groups, **FIXED)
    assert np.allclose(probabilities, plain.predict_proba(eval_x.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize("selection", ["fixed", "cross_validation"])
@pytest.mark.parametrize("name", ["logistic"])
def test_absent_classes_have_probability_zero(name, selection, blobs):
    train_x, train_y, eval_x, _, groups = blobs
    keep = train_y != 1
    options = {"num_classes": 5, "seed": 0, "selection": selection}
    probabilities = fit(name, train_x[keep], train_y[keep], eval_x, groups=groups[keep], **options)
    assert (probabilities[:, [1, 3, 4]] == 0).all()
    assert (probabilities[:, [0, 2]] > 0).any(axis=0).all()
    only = train_y == 1
    probabilities = fit(name, train_x[only], train_y[only], eval_x, groups=groups[only], **options)
    assert (probabilities == np.eye(5)[1]).all()


@pytest.mark.parametrize("selection", ["fixed", "cross_validation"])
@pytest.mark.parametrize("name", PROBES)
def test_same_seed_same_numbers_whatever_else_is_evaluated(name, selection, blobs):
    # Neither global random state nor the evaluation rows may change a prediction.
    train_x, train_y, eval_x, _, groups = blobs
    options = {"num_classes": 3, "seed": 7, "selection": selection, "groups": groups}
    np.random.seed(1)
    first = fit(name, train_x, train_y, eval_x, **options)
    np.random.seed(2)
    again = fit(name, train_x, train_y, np.concatenate([eval_x[:5], 1000 * eval_x[5:]]), **options)
    assert np.allclose(first[:5], again[:5], atol=1e-7)


def test_mlp_depends_on_the_seed(blobs):
    train_x, train_y, eval_x, _, groups = blobs
    fits = [
        fit("mlp", train_x, train_y, eval_x, num_classes=3, seed=seed, selection="fixed", groups=groups)
        for seed in (0, 1)
    ]
    assert not np.allclose(*fits)


def test_cross_validation_takes_the_best_candidate_on_its_folds():
    # Many useless features: a strong penalty does better than the default, so the choice is visible.
    rng = np.random.default_rng(5)
    train_y = np.arange(80) % 2
    train_x = rng.normal(size=(80, 60)).astype(np.float32)
    train_x[:, 0] += 1.5 * train_y
    groups = np.arange(80) // 2
    means = {}
    for c in LOGISTIC_C_CANDIDATES:
        scores = []
        for fitted, held_out in split_shots(train_y, groups, seed=0):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
            predictions = model.fit(train_x[fitted], train_y[fitted]).predict(train_x[held_out])
            scores.append(f1_score(train_y[held_out], predictions, average="macro"))
        means[c] = np.mean(scores)
    best = max(means, key=lambda c: means[c])
    assert means[best] > means[1.0]
    train_x = train_x.astype(np.float64)
    plain = LogisticRegression(C=best, tol=1e-10, max_iter=5000)
    expected = make_pipeline(StandardScaler(), plain).fit(train_x, train_y)
    probabilities = fit(
        "logistic", train_x, train_y, train_x, num_classes=2, seed=0, selection="cross_validation", groups=groups
    )
    assert np.allclose(probabilities, expected.predict_proba(train_x), atol=1e-6)


@pytest.mark.parametrize("multi", [False, True])
def test_candidates_are_judged_by_the_score_that_is_reported(multi):
    """Also where a label that no row of a fold knows has a probability of 0.5, which is no prediction of it."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        labels = rng.integers(-1, 2, (30, 4)) if multi else rng.integers(0, 3, 30)
        probabilities = rng.integers(0, 5, (30, 4)) / 4
        scores = {row.metric: row.value for row in compute_scores(labels, probabilities) if row.label is None}
        assert score_choice(labels, probabilities) == pytest.approx(scores["f1_macro"])


@pytest.mark.parametrize("name", PROBES)
def test_ties_and_unsplittable_shots_use_the_default(name):
    rng = np.random.default_rng(0)
    train_x, train_y = build_blobs(rng, num_rows=30, distance=30.0)
    options = {"num_classes": 3, "seed": 0}
    each_own_group, one_group_a_class = np.arange(30), train_y
    for groups in (each_own_group, one_group_a_class):
        fits = [
            fit(name, train_x, train_y, train_x, selection=selection, groups=groups, **options)
            for selection in ("fixed", "cross_validation")
        ]
        assert (fits[0] == fits[1]).all()


@pytest.mark.parametrize("seed", range(20))
def test_folds_keep_groups_whole_and_can_be_fitted(seed):
    rng = np.random.default_rng(seed)
    train_y, groups = rng.integers(0, 3, 30), rng.integers(0, 8, 30)
    for fitted, held_out in split_shots(train_y, groups, seed=seed):
        assert not set(groups[fitted]) & set(groups[held_out])
        assert sorted([*fitted, *held_out]) == list(range(30))
        assert len(np.unique(train_y[fitted])) > 1


def test_number_of_folds_follows_the_smallest_class():
    labels = np.repeat([0, 1], [20, 3])
    assert len(split_shots(labels, np.arange(23), seed=0)) == 3
    assert len(split_shots(np.arange(40) % 2, np.arange(40), seed=0)) == 5
    assert split_shots(np.repeat([0, 1], [20, 1]), np.arange(21), seed=0) == []
    # 20 rows, but of one group: they can't be on both sides.
    assert split_shots(np.repeat([0, 1], 20), np.append(np.arange(20), [99] * 20), seed=0) == []


def draw_cases(rng, num, *, width=12, classes=4):
    """Runs of unequal size on one table of features; some lack classes, one has a single class, one two."""
    x = rng.normal(size=(400, width)) * rng.uniform(0.1, 5, width) + rng.normal(size=width)
    labels = (x[:, :classes] + rng.normal(size=(400, classes))).argmax(1)
    x[:, -1] = 3.0  # a constant feature
    runs = []
    for index in range(num):
        allowed = [[0, 1, 2, 3], [0, 2, 3], [1, 3], [2]][index % 4]
        rows = rng.permutation(np.flatnonzero(np.isin(labels, allowed)))[: rng.integers(8, 120)]
        runs.append(Run(rows, labels[rows], rng.integers(0, 400, 30), index))
    return torch.from_numpy(x.astype(np.float32)), labels, runs


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("c", [0.01, 1.0, 10.0])
def test_logistic_is_scikit_learns(c, class_weights):
    x, labels, runs = draw_cases(np.random.default_rng(int(c * 100)), 16)
    for run, trained in zip(runs, train_logistic(x, runs, [c], 4, class_weights), strict=True):
        [found] = trained.probabilities
        classes = np.unique(run.labels)
        if len(classes) == 1:
            assert (found == np.eye(4)[classes[0]]).all()
            assert trained.num_parameters == 0
            continue
        plain = make_pipeline(
            StandardScaler(),
            LogisticRegression(
                C=c, tol=1e-10, max_iter=5000, class_weight=None if class_weights == "none" else class_weights
            ),
        )
        plain.fit(x[run.train].double().numpy(), labels[run.train])
        expected = np.zeros((30, 4))
        expected[:, classes] = plain.predict_proba(x[run.eval].double().numpy())
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert trained.num_parameters == plain[-1].coef_.size + plain[-1].intercept_.size


def test_coefficients_are_scikit_learns():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 60, 7))
    labels = rng.integers(0, 3, (5, 60))
    targets = torch.from_numpy(np.eye(3)[labels])
    tensors = (torch.from_numpy(x), targets, torch.ones(5, 60, 1).double(), torch.zeros(5, 1, 3).double())
    coefficients, intercepts = minimise(*tensors, binary=False)
    for k in range(5):
        plain = LogisticRegression(tol=1e-10, max_iter=5000).fit(x[k], labels[k])
        np.testing.assert_allclose(coefficients[k].T, plain.coef_, atol=1e-4)
        np.testing.assert_allclose(intercepts[k, 0], plain.intercept_, atol=1e-4)


def test_several_labels_are_separate_problems():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(90, 6))
    labels = (x[:, :4] + rng.normal(size=(90, 4)) > 0).astype(np.int8)
    labels[rng.random((90, 4)) < 0.2] = -1
    labels[labels[:, 2] == 0, 2] = 1  # label 2 is always there
    labels[:, 3] = -1
    run = Run(np.arange(60), labels[:60], np.arange(60, 90), 0)
    [trained] = train_logistic(torch.from_numpy(x.astype(np.float32)), [run], [1.0], 4, "none")
    [found] = trained.probabilities
    scaled = StandardScaler().fit(x[:60])
    for label in range(2):
        known = np.flatnonzero(labels[:60, label] >= 0)
        plain = LogisticRegression(tol=1e-10).fit(scaled.transform(x[known]), labels[known, label])
        np.testing.assert_allclose(found[:, label], plain.predict_proba(scaled.transform(x[60:]))[:, 1], atol=1e-4)
    assert (found[:, 2] == 1).all()
    assert (found[:, 3] == 0.5).all()


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("multi", [False, True])
def test_alone_is_as_together(name, multi):
    rng = np.random.default_rng(5)
    x, _, runs = draw_cases(rng, 12, width=32)
    if multi:
        many = (rng.random((400, 4)) < 0.5).astype(np.int8) - (rng.random((400, 4)) < 0.1).astype(np.int8)
        runs = [run._replace(labels=many[run.train]) for run in runs]
    settings = FineTune(steps=40, head_learning_rate=1e-2, class_weights="balanced")

    def train(of):
        if name == "logistic":
            return train_logistic(x, of, [1.0], 4, "balanced")
        return train_heads(x, of, [10, 40], 4, settings)

    runs = [run._replace(until=0 if name == "logistic" else 1) for run in runs]
    together = train(runs)
    for run, trained in zip(runs, together, strict=True):
        [alone] = train([run])
        for one, other in zip(alone.probabilities, trained.probabilities, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert alone.num_parameters == trained.num_parameters
    for one, other in itertools.pairwise(t.probabilities[-1] for t in together if multi or len(t.probabilities)):
        assert not np.allclose(one, other, atol=1e-3)
    again = train(runs)
    assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(together, again, strict=True))


@pytest.mark.parametrize("name", PROBES)
def test_validation_takes_what_its_rows_like_best(name):
    """The judges' labels are those of the training rows turned round: the worst fit looks best to them."""
    rng = np.random.default_rng(6)
    train_x, train_y = build_blobs(rng, num_rows=40, num_classes=2, distance=1.0)
    judge_x, judge_y = build_blobs(rng, num_rows=60, num_classes=2, distance=1.0)
    options = {"num_classes": 2, "seed": 1, "groups": np.arange(40)}
    x = np.concatenate([train_x, judge_x])
    train, _, candidates = probe_with(name, x, 2, "validation")
    [trained] = train([Run(np.arange(40), train_y, np.arange(40, 100), 1, candidates - 1)])
    for wanted in (judge_y, 1 - judge_y):
        scores = [f1_score(wanted, p.argmax(1), average="macro") for p in trained.probabilities]
        found = fit(name, train_x, train_y, judge_x, selection="validation", judges=(judge_x, wanted), **options)
        assert f1_score(wanted, found.argmax(1), average="macro") == max(scores)


def test_more_steps_train_more(blobs):
    train_x, train_y, eval_x, _, _ = blobs
    x = torch.from_numpy(np.concatenate([train_x, eval_x]))
    run = Run(np.arange(60), train_y, np.arange(60, 150), 0, 1)
    [trained] = train_heads(x, [run], [5, 80], 3, HEAD)
    sure = [p.max(1).mean() for p in trained.probabilities]
    assert sure[1] > sure[0] + 0.1
    [short] = train_heads(x, [run._replace(until=0)], [5, 80], 3, HEAD)
    assert np.array_equal(short.probabilities, trained.probabilities[:1])
