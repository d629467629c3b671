"""Baselines: the majority class and TF-IDF, on the draws of the arms."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from raylab.data.corpus import TRAIN, VALIDATION
from raylab.evaluation.baselines import BASELINES, TFIDF_C, TFIDF_FEATURES, score_baselines
from raylab.evaluation.draws import draw_shots
from raylab.measures.scores import list_scores
from raylab.results.tables import list_trials, read_rows
from raylab.runs.preparation import prepare

SHOTS = {"evaluate.shots": [2, 4, "full"], "evaluate.tasks": ["severity", "condition"]}


@pytest.fixture
def scored(make_job, tmp_path):
    """A job, its split under seed 3, and its baselines' rows by name."""
    job = make_job("mlm", SHOTS)
    split = prepare(job, tmp_path).split(3)
    score_baselines(tmp_path, job, split, 3)
    return job, split, {name: read_rows(tmp_path, job.name, "scores", f"baseline:{name}-3") for name in BASELINES}


def predict(name, train_texts, train_y, drawn, eval_texts, num_classes):
    if name == "majority":
        shares = np.bincount(train_y[drawn], minlength=num_classes) / len(drawn)
        return np.tile(shares, (len(eval_texts), 1))
    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=TFIDF_FEATURES).fit(train_texts)
    texts = [train_texts[row] for row in drawn]
    model = LogisticRegression(C=TFIDF_C, max_iter=200).fit(vectors.transform(texts), train_y[drawn])
    probabilities = np.zeros((len(eval_texts), num_classes))
    probabilities[:, model.classes_] = model.predict_proba(vectors.transform(eval_texts))
    return probabilities


@pytest.mark.parametrize("name", BASELINES)
def test_equal_to_scikit_learn_on_the_same_draws(scored, name):
    _, split, rows = scored
    expected = {}
    for task in ("severity", "condition"):
        table, num_classes = split.open[task].to_pydict(), len(split.classes[task])
        parts, labels, groups = (np.array(table[column]) for column in ("part", "label", "group"))
        train, held_out = parts == TRAIN, parts == VALIDATION
        train_texts, eval_texts = (
            [text for text, here in zip(table["text"], mask, strict=True) if here] for mask in (train, held_out)
        )
        for shots, num_draws in ((2, 2), (4, 2), (None, 1)):
            for draw in range(num_draws):
                drawn = draw_shots(labels[train], groups[train], shots, seed=3, task=task, draw=draw)
                found = predict(name, train_texts, labels[train], drawn, eval_texts, num_classes)
                for row in list_scores(labels[held_out], found, split.classes[task]):
                    cell = (task, shots, draw, row["metric"], row["class"])
                    expected[cell] = (row["value"], len(drawn), len(eval_texts))
    values = {
        (row["task"], row["shots"], row["draw"], row["metric"], row["class"]): (
            row["value"], row["num_train"], row["num_eval"],
        )
        for row in rows[name]
    }  # fmt: skip
    assert values.keys() == expected.keys()
    assert len(rows[name]) == len(expected)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, abs=1e-9), key
    assert {(row["split"], row["rung"], row["probe"]) for row in rows[name]} == {("validation", 1, None)}


def test_tfidf_learns_something(scored):
    _, _, rows = scored
    f1 = {
        name: np.mean([r["value"] for r in found if r["shots"] is None and r["metric"] == "f1_macro"])
        for name, found in rows.items()
    }
    assert f1["tfidf"] > f1["majority"] + 0.1


def test_rows_of_trials(scored, tmp_path):
    job, _, _ = scored
    rows = {row["trial_id"]: row for row in list_trials(tmp_path, job.name)}
    assert rows.keys() == {"baseline:majority-3", "baseline:tfidf-3"}
    for name in BASELINES:
        row = rows[f"baseline:{name}-3"]
        assert (row["arm"], row["seed"], row["phase"], row["status"]) == (f"baseline:{name}", 3, "fixed", "complete")
        assert row["rung"] == row["num_rungs"] == 1
        assert row["pretrain.objective"] is None


def test_stages_serve_again_and_only_for_the_same_draws(make_job, tmp_path):
    job = make_job("mlm")
    split = prepare(job, tmp_path).split(0)
    first = score_baselines(tmp_path, job, split, 0)
    assert not any(stage.reused for stage in first)
    before = read_rows(tmp_path, job.name, "scores", "baseline:tfidf-0")
    assert all(stage.reused for stage in score_baselines(tmp_path, job, split, 0))
    assert read_rows(tmp_path, job.name, "scores", "baseline:tfidf-0") == before
    assert not any(stage.reused for stage in score_baselines(tmp_path, job, split, 1))
    more = make_job("mlm", {"evaluate.draws": 3})
    assert not any(stage.reused for stage in score_baselines(tmp_path, more, split, 0))


def test_another_name_for_a_task_has_other_draws(make_job, tmp_path):
    """A draw depends on the task's name, so that a stage may not serve an equal task of another name."""
    job = make_job("mlm")
    tasks = {"grade": job.corpus.tasks["severity"].model_dump(mode="json"), "severity": None}
    renamed = make_job("mlm", {"name": "renamed", "corpus.tasks": tasks, "evaluate.tasks": ["grade"]})
    score_baselines(tmp_path, job, prepare(job, tmp_path).split(0), 0)
    assert not any(s.reused for s in score_baselines(tmp_path, renamed, prepare(renamed, tmp_path).split(0), 0))


def test_every_split_has_its_own_stage(make_job, tmp_path):
    """Other training rows and the same test rows, where each seed makes its own split."""
    splits = [{"train": 0.6, "validation": 0.2, "test": 0.2}, {"train": 0.5, "validation": 0.3, "test": 0.2}]
    for index, fractions in enumerate(splits):
        job = make_job("mlm", {"name": f"job{index}", "corpus.split": {**fractions, "vary": True}})
        stages = score_baselines(tmp_path, job, prepare(job, tmp_path).split(0), 0, sealed=True)
        assert not any(stage.reused for stage in stages)


def test_the_test_split_has_no_influence_on_validation(make_job, notes, scored, tmp_path):
    """With other test texts and labels every validation row is the same, and the kept stage serves."""
    _, split, rows = scored
    table = pq.read_table(notes / "notes.parquet")
    sealed = set(split.sealed["severity"]["text"].to_pylist())
    changed = {
        column: pa.array([
            other if text in sealed else value
            for text, value in zip(table["text"].to_pylist(), table[column].to_pylist(), strict=True)
        ])
        for column, other in (("text", "a wholly different word salad"), ("severity", "unheard"), ("condition", "of"))
    }  # fmt: skip
    for column, values in changed.items():
        table = table.set_column(table.column_names.index(column), column, values)
    path = tmp_path / "changed.parquet"
    pq.write_table(table, path)
    paths = {f"corpus.tasks.{task}.path": str(path) for task in ("severity", "condition")}
    job = make_job("mlm", {**SHOTS, **paths, "corpus.documents.path": str(path), "name": "changed"})
    other = prepare(job, tmp_path).split(3)
    assert other.sealed["severity"].num_rows < len(sealed) or "unheard" not in other.classes["severity"]
    assert all(stage.reused for stage in score_baselines(tmp_path, job, other, 3))
    elsewhere = tmp_path / "elsewhere"
    score_baselines(elsewhere, job, other, 3)
    for name in BASELINES:
        again = read_rows(elsewhere, "changed", "scores", f"baseline:{name}-3")
        assert [row | {"job": "tiny"} for row in again] == rows[name]


def test_sealed_rows_go_to_a_file_of_their_own(scored, tmp_path):
    job, split, rows = scored
    score_baselines(tmp_path, job, split, 3, sealed=True)
    for name in BASELINES:
        assert read_rows(tmp_path, job.name, "scores", f"baseline:{name}-3") == rows[name]
        test = read_rows(tmp_path, job.name, "scores", f"baseline:{name}-3", ".test")
        assert {row["split"] for row in test} == {"test"}
        assert {row["num_eval"] for row in test if row["task"] == "severity"} == {split.sealed["severity"].num_rows}


def test_what_is_written_is_left_alone_and_other_draws_are_written(scored, make_job, tmp_path):
    job, split, _ = scored
    files = sorted(tmp_path.glob(f"{job.name}/*/baseline*.parquet"))
    before = [path.stat().st_ino for path in files]
    assert len(files) == 3 * len(BASELINES)
    score_baselines(tmp_path, job, split, 3)
    assert [path.stat().st_ino for path in files] == before
    score_baselines(tmp_path, make_job("mlm", SHOTS | {"evaluate.draws": 3}), split, 3)
    assert {row["draw"] for row in read_rows(tmp_path, job.name, "scores", "baseline:tfidf-3")} == {0, 1, 2}
    # A driver that was killed between the two files: the second is written.
    (trials,) = tmp_path.glob(f"{job.name}/trials/baseline_tfidf*.parquet")
    trials.unlink()
    score_baselines(tmp_path, make_job("mlm", SHOTS | {"evaluate.draws": 3}), split, 3)
    assert trials.is_file()


def test_each_label_has_a_classifier_of_its_own():
    """Against scikit-learn's one-vs-rest; a label that is not known in some rows is fitted on the others."""
    rng = np.random.default_rng(0)
    features = sparse.csr_matrix(rng.random((60, 8)))
    labels = (rng.random((40, 3)) < 0.4).astype(np.int8)
    train, evaluated = features[:40], features[40:]
    expected = OneVsRestClassifier(LogisticRegression(C=TFIDF_C, max_iter=200)).fit(train, labels)
    found = BASELINES["tfidf"](train, labels, evaluated, 3)
    np.testing.assert_allclose(found, expected.predict_proba(evaluated), atol=1e-9)
    np.testing.assert_allclose(BASELINES["majority"](train, labels, evaluated, 3), [labels.mean(axis=0)] * 20)

    partly = labels.copy()
    partly[:10, 0], partly[:, 2] = -1, -1
    again = BASELINES["tfidf"](train, partly, evaluated, 3)
    np.testing.assert_allclose(again[:, 0], BASELINES["tfidf"](train[10:], labels[10:], evaluated, 3)[:, 0], atol=1e-9)
    np.testing.assert_allclose(again[:, 1], found[:, 1], atol=1e-9)
    assert (again[:, 2] == 0).all()
    assert (BASELINES["tfidf"](train, np.ones((40, 1), dtype=np.int8), evaluated, 1) == 1).all()
    assert BASELINES["majority"](train, partly, evaluated, 3)[0, 0] == pytest.approx(labels[10:, 0].mean())
