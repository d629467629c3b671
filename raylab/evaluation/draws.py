"""Few-shot draws: which labelled training rows a probe may see."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raylab.data.corpus import TRAIN
from raylab.data.labels import is_labelled
from raylab.job.blocks import Evaluate

IntArray = npt.NDArray[np.int64]


class Draw(NamedTuple):
    """One choice of training rows: `shots` a class (None: all), the `draw`-th, as rows of the task's table."""

    shots: int | None
    draw: int
    rows: IntArray


def list_draws(rows: dict[str, npt.NDArray[Any]], task: str, evaluate: Evaluate, seed: int) -> Iterator[Draw]:
    """The draws of a task under a seed, the same for every arm. All training rows are one draw."""
    train = np.flatnonzero(rows["part"] == TRAIN)
    for shots in evaluate.shots:
        number = None if shots == "full" else shots
        for draw in range(evaluate.draws if number else 1):
            chosen = draw_shots(rows["label"][train], rows["group"][train], number, seed=seed, task=task, draw=draw)
            yield Draw(number, draw, train[chosen])


def draw_shots(
    labels: npt.NDArray[Any], groups: IntArray, shots: int | None, *, seed: int, task: str, draw: int
) -> IntArray:
    """Choose `shots` training rows a class, at most one row a group over the whole draw.

    labels: int64 [n], below 0 for an unlabelled row, which is never drawn; or, multi-label, int8 [n, L] of 1, 0 and -1
    (not known). groups: int64 [n].
    shots: rows a class, at least 1, or None for every labelled row (then a group may give many).
    Returns int64 row indices, sorted. ValueError if the lengths differ or `shots` is below 1.

    Multi-label: each label gets `shots` rows that have it, and `shots` rows that are known not to have it and have no
    other label either. A row counts for all labels that it serves, so a label may get more, and the draw has fewer
    than 2 x L x shots rows. A row where a label is not known never counts for that label.

    A class gives fewer than `shots` rows when the draw has already used each of its groups: it has too few groups,
    or other classes took them. A draw is a function of these arguments alone, so every arm gets the same rows, and
    the draw for fewer shots lies inside the draw for more.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    if labels.ndim not in (1, 2) or labels.shape[:1] != groups.shape:
        raise ValueError(f"labels {labels.shape} and groups {groups.shape} must be of one length")
    if shots is None:
        return np.flatnonzero(is_labelled(labels)).astype(np.int64)
    if shots < 1:
        raise ValueError(f"shots is {shots}: give 1 or more, or None for every labelled row")

    rng = build_draw_rng(seed, task, draw)
    order = rng.permutation(len(labels))
    if labels.ndim == 2:
        return _draw_labels(labels[order], np.unique(groups[order], return_inverse=True)[1], order, shots, rng)
    order = order[labels[order] >= 0]
    if not len(order):
        return np.empty(0, dtype=np.int64)
    # A group's later rows in a class can never be taken: once its first row comes up, the group is used. Dropping
    # them here keeps the loop below short even when one group holds most rows.
    class_codes = np.unique(labels[order], return_inverse=True)[1]
    group_codes = np.unique(groups[order], return_inverse=True)[1]
    first = np.sort(np.unique(class_codes * (group_codes.max() + 1) + group_codes, return_index=True)[1])
    by_class = first[np.argsort(class_codes[first], kind="stable")]
    queues = np.split(by_class, np.flatnonzero(np.diff(class_codes[by_class])) + 1)

    used: set[int] = set()
    chosen: list[int] = []
    # Classes compete for groups they share, so who goes first is random too, not the lowest label.
    waiting = [iter(queues[position]) for position in rng.permutation(len(queues))]
    for _ in range(shots):
        still_waiting = []
        for queue in waiting:
            position = next((p for p in queue if group_codes[p] not in used), None)
            if position is None:
                continue
            used.add(int(group_codes[position]))
            chosen.append(int(order[position]))
            still_waiting.append(queue)
        waiting = still_waiting
        if not waiting:
            break
    return np.sort(np.array(chosen, dtype=np.int64))


def _draw_labels(
    labels: npt.NDArray[Any], groups: IntArray, order: IntArray, shots: int, rng: np.random.Generator
) -> IntArray:
    """Rows of `order`, whose labels [n, L] and groups [n] are given, that serve each of 2 x L needs `shots` times.

    Needs take turns: after the s-th turn each has s rows or no unused group left, so that turns nest.
    """
    # serves [n, 2L]: having a label; being known not to have it, and having no other.
    serves = np.concatenate([labels == 1, (labels == 0) & ~(labels == 1).any(axis=1, keepdims=True)], axis=1)
    # As for single labels, of a group only its first row for a need can ever be taken.
    queues = []
    for need in rng.permutation(serves.shape[1]):
        rows = np.flatnonzero(serves[:, need])
        rows = rows[np.sort(np.unique(groups[rows], return_index=True)[1])]
        queues.append((need, iter(rows.tolist())))
    served = np.zeros(serves.shape[1], dtype=np.int64)
    used: set[int] = set()
    chosen: list[int] = []
    for turn in range(shots):
        for need, queue in queues:
            if served[need] > turn:
                continue
            row = next((row for row in queue if groups[row] not in used), None)
            if row is not None:
                used.add(int(groups[row]))
                chosen.append(row)
                served += serves[row]
    return np.sort(order[np.array(chosen, dtype=np.int64)])


def build_draw_rng(seed: int, task: str, draw: int) -> np.random.Generator:
    """Build the generator of one draw: the same on every machine and Python, unlike one seeded by `hash`."""
    digest = hashlib.blake2b(json.dumps([seed, task, draw]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
