import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from raylab.probes import LOGISTIC_C_CANDIDATES, PROBES, split_shots

FIXED = {"seed": 0, "selection": "fixed"}


def build_blobs(rng: np.random.Generator, *, num_rows: int = 60, num_classes: int = 3, distance: float = 4.0):
    """Rows around one centre a class, on scales that differ a thousandfold between features."""
    labels = np.arange(num_rows) % num_classes
    scales = np.logspace(-1.5, 1.5, 10)
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
        probabilities = PROBES[name](train_x, train_y, eval_x, **options)
    assert probabilities.dtype == np.float64
    assert probabilities.shape == (90, 3)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == eval_y).mean() > 0.95


def test_logistic_equals_a_plain_pipeline(blobs):
    train_x, train_y, eval_x, _, groups = blobs
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)).fit(train_x, train_y)
    probabilities = PROBES["logistic"](train_x, train_y, eval_x, num_classes=3, groups=groups, **FIXED)
    assert np.allclose(probabilities, plain.predict_proba(eval_x), atol=1e-7)


@pytest.mark.parametrize("selection", ["fixed", "cross_validation"])
@pytest.mark.parametrize("name", PROBES)
def test_absent_classes_have_probability_zero(name, selection, blobs):
    train_x, train_y, eval_x, _, groups = blobs
    keep = train_y != 1
    options = {"num_classes": 5, "seed": 0, "selection": selection}
    probabilities = PROBES[name](train_x[keep], train_y[keep], eval_x, groups=groups[keep], **options)
    assert (probabilities[:, [1, 3, 4]] == 0).all()
    assert (probabilities[:, [0, 2]] > 0).any(axis=0).all()
    only = train_y == 1
    probabilities = PROBES[name](train_x[only], train_y[only], eval_x, groups=groups[only], **options)
    assert (probabilities == np.eye(5)[1]).all()


@pytest.mark.parametrize("selection", ["fixed", "cross_validation"])
@pytest.mark.parametrize("name", PROBES)
def test_same_seed_same_numbers_whatever_else_is_evaluated(name, selection, blobs):
    # Neither global random state nor the evaluation rows may change a prediction.
    train_x, train_y, eval_x, _, groups = blobs
    options = {"num_classes": 3, "seed": 7, "selection": selection, "groups": groups}
    np.random.seed(1)
    first = PROBES[name](train_x, train_y, eval_x, **options)
    np.random.seed(2)
    again = PROBES[name](train_x, train_y, np.concatenate([eval_x[:5], 1000 * eval_x[5:]]), **options)
    assert np.allclose(first[:5], again[:5], atol=1e-7)


def test_mlp_depends_on_the_seed(blobs):
    train_x, train_y, eval_x, _, groups = blobs
    fits = [
        PROBES["mlp"](train_x, train_y, eval_x, num_classes=3, seed=seed, selection="fixed", groups=groups)
        for seed in (0, 1)
    ]
    assert not np.allclose(*fits)


def test_mlp_trains_all_its_epochs(blobs, monkeypatch):
    train_x, train_y, eval_x, _, groups = blobs
    fits = {}
    for epochs in (50, 150):
        monkeypatch.setattr("raylab.probes.MLP_EPOCHS", epochs)
        fits[epochs] = PROBES["mlp"](train_x, train_y, eval_x, num_classes=3, groups=groups, **FIXED)
    assert fits[150].max(axis=1).mean() > fits[50].max(axis=1).mean()


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
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=best, max_iter=1000)).fit(train_x, train_y)
    probabilities = PROBES["logistic"](
        train_x, train_y, train_x, num_classes=2, seed=0, selection="cross_validation", groups=groups
    )
    assert np.allclose(probabilities, expected.predict_proba(train_x), atol=1e-6)


@pytest.mark.parametrize("name", PROBES)
def test_ties_and_unsplittable_shots_use_the_default(name):
    rng = np.random.default_rng(0)
    train_x, train_y = build_blobs(rng, num_rows=30, distance=30.0)
    options = {"num_classes": 3, "seed": 0}
    each_own_group, one_group_a_class = np.arange(30), train_y
    for groups in (each_own_group, one_group_a_class):
        fits = [
            PROBES[name](train_x, train_y, train_x, selection=selection, groups=groups, **options)
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


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.full(60, 3)}, r"0\.\.2"),
        ({"train_y": np.full(60, -1)}, r"0\.\.2"),
        ({"groups": np.arange(59)}, "groups"),
        ({"eval_x": np.zeros((4, 9), dtype=np.float32)}, r"\[m, d\]"),
        ({"eval_x": np.full((4, 10), np.nan, dtype=np.float32)}, "4 of 4 rows of eval_x"),
        ({"train_x": np.zeros((0, 10)), "train_y": np.zeros(0), "groups": np.zeros(0)}, "at least 1"),
        ({"selection": "best"}, "cross_validation"),
    ],
)
def test_wrong_input_is_refused(name, change, message, blobs):
    train_x, train_y, eval_x, _, groups = blobs
    arguments = {"train_x": train_x, "train_y": train_y, "eval_x": eval_x, "num_classes": 3, "groups": groups, **FIXED}
    with pytest.raises(ValueError, match=message):
        PROBES[name](**{**arguments, **change})
