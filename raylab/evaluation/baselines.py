"""Baselines on the same draws as the arms: the majority class, and TF-IDF with logistic regression."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from raylab.data.corpus import TEST, TRAIN, VALIDATION, SplitCorpus, digest_column
from raylab.data.labels import to_array
from raylab.evaluation.draws import list_draws
from raylab.job.blocks import PARTS
from raylab.job.specs import Job
from raylab.measures.scores import list_confusions, list_scores
from raylab.results.tables import now, read_rows, read_trial, write_rows
from raylab.store.stages import Stage, build_stage

Labels = NDArray[Any]
TFIDF_C = 10.0
TFIDF_FEATURES = 50_000


def fit_majority(train_x: Any, train_y: Labels, eval_x: Any, num_classes: int) -> NDArray[np.float64]:
    """The shares of the classes among the drawn rows, for every text; ties go to the first class.

    Multi-label: each label's share of the drawn rows in which it is known; 0 where there are none.
    """
    if train_y.ndim == 2:
        known = np.maximum((train_y >= 0).sum(axis=0), 1)
        return np.tile((train_y == 1).sum(axis=0) / known, (eval_x.shape[0], 1))
    shares = np.bincount(train_y, minlength=num_classes) / len(train_y)
    return np.tile(shares, (eval_x.shape[0], 1))


def fit_tfidf(train_x: Any, train_y: Labels, eval_x: Any, num_classes: int) -> NDArray[np.float64]:
    """Logistic regression (C = 10) on TF-IDF features [n, F]; probabilities [m, num_classes].

    Multi-label: one for each label, on the rows in which it is known, against the rest.
    """
    if train_y.ndim == 2:
        probabilities = fit_majority(train_x, train_y, eval_x, num_classes)
        for label, column in enumerate(train_y.T):
            known = np.flatnonzero(column >= 0)
            if len(known):
                probabilities[:, label] = fit_tfidf(train_x[known], column[known].astype(np.int64), eval_x, 2)[:, 1]
        return probabilities
    # A word that no drawn text has gets a weight of exactly 0: leaving it out changes nothing but the time.
    used = np.flatnonzero(train_x.getnnz(axis=0))
    if len(np.unique(train_y)) < 2 or not len(used):
        return fit_majority(train_x, train_y, eval_x, num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=TFIDF_C, max_iter=200).fit(train_x[:, used], train_y)
    probabilities = np.zeros((eval_x.shape[0], num_classes))
    probabilities[:, model.classes_] = model.predict_proba(eval_x[:, used])
    return probabilities


def count_nothing(train_texts: pa.ChunkedArray, eval_texts: pa.ChunkedArray) -> tuple[Any, Any]:
    """One empty feature a text: [n, 1] and [m, 1]."""
    return np.zeros((len(train_texts), 1)), np.zeros((len(eval_texts), 1))


def count_words(train_texts: pa.ChunkedArray, eval_texts: pa.ChunkedArray) -> tuple[Any, Any]:
    """TF-IDF features, sparse [n, F] and [m, F], of the words that two or more training texts have."""
    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=TFIDF_FEATURES)
    try:
        return vectors.fit_transform(train_texts.to_pylist()), vectors.transform(eval_texts.to_pylist())
    except ValueError:  # no word that two texts share
        return sparse.csr_matrix((len(train_texts), 1)), sparse.csr_matrix((len(eval_texts), 1))


FEATURES: dict[str, Callable[[pa.ChunkedArray, pa.ChunkedArray], tuple[Any, Any]]] = {
    "majority": count_nothing,
    "tfidf": count_words,
}
BASELINES: dict[str, Callable[[Any, Labels, Any, int], NDArray[np.float64]]] = {
    "majority": fit_majority,
    "tfidf": fit_tfidf,
}


def score_baselines(
    results: Path,
    job: Job,
    split: SplitCorpus,
    seed: int,
    *,
    sealed: bool = False,
    memory: dict[Any, Any] | None = None,
) -> list[Stage]:
    """Scores every baseline on a seed's draws and writes its rows; scores of one seed are kept as a stage.

    On the validation rows, or, with `sealed`, on the test rows. The words that TF-IDF counts, and their weights, come
    from the task's training rows; `memory` keeps those features from one seed to the next.
    """
    memory = {} if memory is None else memory
    stages = []
    for name, fit in BASELINES.items():
        started = now()
        scores: list[dict[str, Any]] = []
        confusions: list[dict[str, Any]] = []
        used = []
        for task in job.evaluate.tasks or job.corpus.tasks:
            stage = _score_task(results, job, split, seed, name, fit, task, sealed, memory)
            used.append(stage)
            rows = json.loads((stage.path / "rows.json").read_text())
            scores += [row | {"rung": 1, "task": task} for row in rows["scores"]]
            confusions += [row | {"rung": 1, "task": task} for row in rows["confusions"]]
        stages += used
        trial_id = f"baseline:{name}-{seed}"
        if not sealed and _is_written(results, job.name, trial_id, scores, confusions):
            continue
        write_rows(results, job.name, "scores", trial_id, scores, ".test" if sealed else "")
        write_rows(results, job.name, "confusions", trial_id, confusions, ".test" if sealed else "")
        if not sealed:
            row = {
                "arm": f"baseline:{name}",
                "phase": "fixed",
                "seed": seed,
                "status": "complete",
                "rung": 1,
                "num_rungs": 1,
                "attempts": 1,
                "wall_seconds": sum(stage.wall_seconds for stage in used),
                "gpu_seconds": 0.0,
                "device": "cpu",
                "started_at": started,
                "updated_at": now(),
            }
            write_rows(results, job.name, "trials", trial_id, [row])
    return stages


def _is_written(
    results: Path, job: str, trial_id: str, scores: list[dict[str, Any]], confusions: list[dict[str, Any]]
) -> bool:
    """Whether the tables hold a baseline with just these rows: then it keeps the times of when it was made."""
    for table, rows in (("scores", scores), ("confusions", confusions)):
        known = read_rows(results, job, table, trial_id)
        if len(known) != len(rows) or not all(k.items() >= new.items() for k, new in zip(known, rows, strict=True)):
            return False
    return read_trial(results, job, trial_id) is not None


def _score_task(
    results: Path,
    job: Job,
    split: SplitCorpus,
    seed: int,
    name: str,
    fit: Any,
    task: str,
    sealed: bool,
    memory: dict[Any, Any],
) -> Stage:
    table, part = split.open[task], TEST if sealed else VALIDATION
    rows = {column: to_array(table[column]) for column in ("label", "group", "part")}
    held_out = split.sealed[task] if sealed else table.filter(table["part"].to_numpy() == VALIDATION)
    key = {
        "baseline": name,
        "task": task,  # its name seeds the draws
        "rows": split.stored_digest,  # of this very split, also where every seed has its own
        "eval": [digest_column(held_out["text"]), digest_column(held_out["label"])],
        "shots": list(job.evaluate.shots),
        "draws": job.evaluate.draws,
        "seed": seed,
    }

    def build(folder: Path) -> dict[str, Any]:
        classes, eval_y = split.classes[task], to_array(held_out["label"])
        train = np.flatnonzero(rows["part"] == TRAIN)
        if (name, task, split.stored_digest) not in memory:
            texts = (table["text"].take(train), held_out["text"])
            memory[name, task, split.stored_digest] = FEATURES[name](*texts)
        train_x, eval_x = memory[name, task, split.stored_digest]
        scores: list[dict[str, Any]] = []
        confusions: list[dict[str, Any]] = []
        for draw in list_draws(rows, task, job.evaluate, seed):
            chosen = np.searchsorted(train, draw.rows)
            probabilities = fit(train_x[chosen], rows["label"][draw.rows], eval_x, len(classes))
            cell = {"split": PARTS[part], "shots": draw.shots, "draw": draw.draw}
            sizes = {"num_train": len(draw.rows), "num_eval": len(eval_y)}
            scores += [cell | row | sizes for row in list_scores(eval_y, probabilities, classes)]
            confusions += [cell | row for row in list_confusions(eval_y, probabilities, classes)]
        (folder / "rows.json").write_text(json.dumps({"scores": scores, "confusions": confusions}, allow_nan=False))
        return {}

    return build_stage(results, "baseline", key, build)
