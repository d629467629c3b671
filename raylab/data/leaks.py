"""Labels that can be read off a text without reading it: from its opening words, or from one word's presence.

Learned on training rows and scored on validation rows; test rows are never seen. No word is returned, only its rank.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylab.base.noise import derive_seed
from raylab.data.overlaps import Words

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

OPENING_WORDS = 8
MIN_WORD_ROWS = 5
# What is learned on and scored on at most, drawn once: bounds the time, and changes a score by little.
MAX_TRAIN, MAX_VALIDATION = 20_000, 10_000
SMALLEST_GAIN = 0.1


class Leak(NamedTuple):
    """A label that is read off: the class (None: all), how well (0 to 1), the rows on which it is right, evidence."""

    class_code: int | None
    value: float
    rows: Ints
    num_checked: int
    evidence: dict[str, Any]


def draw_rows(train: Mask) -> Ints:
    """The rows that the checks look at, sorted: all, or MAX_TRAIN and MAX_VALIDATION of them."""
    rng = np.random.default_rng(derive_seed("hygiene"))
    kept = [
        rng.permutation(rows)[:most]
        for rows, most in ((np.flatnonzero(train), MAX_TRAIN), (np.flatnonzero(~train), MAX_VALIDATION))
    ]
    return np.sort(np.concatenate(kept))


def list_questions(labels: NDArray[Any]) -> Iterator[tuple[int | None, Ints, Ints]]:
    """What is asked of a task: (class, rows with an answer, classes of these rows, from 0).

    One question of single labels, int64 [n]; of several labels, int8 [n, L], one yes or no each.
    """
    if labels.ndim == 1:
        known = np.flatnonzero(labels >= 0)
        yield None, known, labels[known].astype(np.int64)
        return
    for code in range(labels.shape[1]):
        known = np.flatnonzero(labels[:, code] >= 0)
        yield code, known, labels[known, code].astype(np.int64)


def _count(words: Words) -> Any:
    """How often each row has each word: sparse [rows, num_distinct]."""
    from scipy import sparse

    ones = np.ones(len(words.codes), np.float32)
    shape = (len(words.offsets) - 1, words.num_distinct)
    # Copies: adding up what is there twice is done in place.
    counts = sparse.csr_matrix((ones, words.codes, words.offsets), shape, copy=True)
    counts.sum_duplicates()
    return counts


def _predict(counts: Any, labels: Ints, train: Mask) -> Ints:
    """The classes that TF-IDF with logistic regression (C = 10) gives the rows that don't train."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    used = np.flatnonzero(counts[train].getnnz(axis=0) >= 2)
    if not len(used):
        return np.full((~train).sum(), np.bincount(labels[train]).argmax())
    weights = TfidfTransformer(sublinear_tf=True).fit(counts[train][:, used])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=10.0, max_iter=100, tol=1e-3)
        model.fit(weights.transform(counts[train][:, used]), labels[train])
    found: Ints = model.predict(weights.transform(counts[~train][:, used]))
    return found


def _score(labels: Ints, predicted: Ints) -> float:
    from raylab.measures.scores import (
        compute_f1_macro,  # scikit-learn takes long to import, and `plan` may find all in stages
    )

    return compute_f1_macro(labels, predicted)


def read_openings(words: Words, labels: NDArray[Any], train: Mask) -> Iterator[Leak]:
    """How much of what the whole text tells of the label its first OPENING_WORDS words tell, by macro-F1.

    value: (opening - majority) / (whole - majority), where the better of both counts as whole, and a difference under
    SMALLEST_GAIN as that. For a task, or for each of several labels.
    """
    lengths = words.lengths
    kept = np.minimum(lengths, OPENING_WORDS)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.repeat(words.offsets[:-1] - offsets[:-1], kept) + np.arange(offsets[-1])
    opening, whole = _count(Words(words.codes[places], offsets, words.num_distinct)), _count(words)
    for code, rows, classes in list_questions(labels):
        learn = train[rows]
        truth = classes[~learn]
        if len(np.unique(classes[learn])) < 2 or not len(truth):
            continue
        predicted = _predict(opening[rows], classes, learn)
        majority = _score(truth, np.full(len(truth), np.bincount(classes[learn]).argmax()))
        first = _score(truth, predicted)
        full = _score(truth, _predict(whole[rows], classes, learn))
        evidence = {
            "f1_macro_opening": first,
            "f1_macro_whole": full,
            "f1_macro_majority": majority,
            "share_of_words": float(kept[rows[~learn]].sum() / max(lengths[rows[~learn]].sum(), 1)),
            "num_train": int(learn.sum()),
        }
        value = max(first - majority, 0.0) / max(full - majority, first - majority, SMALLEST_GAIN)
        yield Leak(code, value, rows[~learn][predicted == truth], len(truth), evidence)


def read_single_words(words: Words, labels: NDArray[Any], train: Mask) -> Iterator[Leak]:
    """For each class, how well "it is this class if, and only if, a word is there" does; or "is not there".

    The word and which of both are chosen by F1 on training rows, among words of MIN_WORD_ROWS of them or more.
    value: (F1 - F1 of calling every row so) / (1 - that), on validation rows, 0 where it is below 0.
    """
    there = _count(words)
    there.data[:] = 1
    for code, rows, classes in list_questions(labels):
        learn = train[rows]
        has, truth = there[rows[learn]], classes[learn]
        used = np.flatnonzero(has.getnnz(axis=0) >= MIN_WORD_ROWS)
        sizes = np.asarray(has.sum(axis=0)).ravel()[used]
        # Of several labels: only whether this one is given.
        for one in range(int(classes.max(initial=-1)) + 1) if code is None else (1,):
            mine, checked = truth == one, classes[~learn] == one
            if not mine.any() or mine.all() or not checked.any() or not len(used):
                continue
            hits = np.asarray(has[mine].sum(axis=0)).ravel()[used]
            total, num = mine.sum(), len(mine)
            f1 = np.stack([2 * hits / (sizes + total), 2 * (total - hits) / (num - sizes + total)])
            absent, place = np.unravel_index(f1.argmax(), f1.shape)
            answer = (there[rows][:, [used[place]]].toarray().ravel() > 0) != bool(absent)
            always = 2 * checked.mean() / (1 + checked.mean())
            found = 2 * (answer[~learn] & checked).sum() / (answer[~learn].sum() + checked.sum())
            evidence = {
                "f1": float(found),
                "f1_of_all_rows": float(always),
                "accuracy": float((answer[~learn] == checked).mean()),
                "f1_train": float(f1[absent, place]),
                "rule": "absent" if absent else "present",
                # 1: the word of the most training rows.
                "word_rank": int((sizes > sizes[place]).sum()) + 1,
                "rows_with_word": int(sizes[place]),
                "num_train": int(num),
            }
            value = 0.0 if always == 1 else max(float((found - always) / (1 - always)), 0.0)
            right = rows[answer & (classes == one)]
            yield Leak(one if code is None else code, value, right, int((classes == one).sum()), evidence)
