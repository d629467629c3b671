"""Labels of tasks: columns of any form, and tables of their own, as codes that the training rows decide."""

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylab.job.blocks import Task

Bools = NDArray[np.bool_]
# Class names stand in tables: more of them, or longer ones, are texts that were taken for labels.
MAX_CLASSES, MAX_NAME = 1000, 200
FEW_CLASSES = 20  # more must have two labelled training rows each, on average


def join_labels(table: pa.Table, gold: pa.Table, where: str, counts: dict[str, int], problems: list[str]) -> pa.Table:
    """The texts with the labels of their ids as columns `labels.NAME`, null where there are none; counts both sides."""
    rows = pc.index_in(table["id"], gold["id"].combine_chunks())
    found = len(rows) - rows.null_count
    counts |= {"without_gold": rows.null_count, "gold_without_text": len(gold) - found}
    if not found:
        problems.append(
            f"{where}.id: none of its {len(gold):,} ids is one of the {len(table):,} texts'; name the columns of the "
            "same ids (they are compared as they are written)"
        )
    for name in gold.column_names[1:]:
        table = table.append_column(f"labels.{name}", gold[name].take(rows))
    return table


def _label_names(task: Task) -> list[str]:
    """The columns of a read table that hold the task's labels."""
    return [name if task.labels is None else f"labels.{name}" for name in task.label_columns()]


def code_values(column: pa.ChunkedArray, train: Bools, smallest: int) -> tuple[NDArray[np.int64], list[str]]:
    """Codes by the sorted values that have `smallest` training rows or more; -1 for null and all others."""
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    indices = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
    sizes = np.bincount(indices[train], minlength=len(values) + 1)[: len(values)]
    kept = sorted(value for value, size in zip(values, sizes, strict=True) if size >= max(smallest, 1))
    lookup = {value: code for code, value in enumerate(kept)}
    return np.array([*(lookup.get(value, -1) for value in values), -1], dtype=np.int64)[indices], kept


class Coded(NamedTuple):
    """A task's labels: codes int64 [n], or int8 [n, L]; classes; rows that had none; labels left out (multi-label);
    training rows with a label."""

    codes: NDArray[Any]
    classes: list[str]
    unlabelled: int
    left_out: int
    train_rows: int


def code_labels(table: pa.Table, task: Task, train: Bools) -> Coded:
    """Codes by the training rows: of a multi-label task, labels with `min_class_size` of them and one without it."""
    columns = [table[name] for name in _label_names(task)]
    if not task.is_multi_label():
        codes, names = code_values(columns[0], train, task.min_class_size)
        return Coded(codes, names, columns[0].null_count, 0, int(is_labelled(codes[train]).sum()))
    if task.has_sides():
        names, seen = list(task.label_columns()), len(columns)
        values = np.stack([pc.fill_null(column, "-1").cast(pa.int8()).to_numpy() for column in columns], axis=1)
    else:
        names, values, seen = _code_lists(columns[0], train, task.min_class_size)
        if len(names) > MAX_CLASSES:
            return Coded(values, names, 0, 0, 0)
    kept = ((values[train] == 1).sum(axis=0) >= task.min_class_size) & (values[train] == 0).any(axis=0)
    classes = [name for name, keep in zip(names, kept, strict=True) if keep]
    unlabelled = int((values < 0).all(axis=1).sum()) if task.has_sides() else columns[0].null_count
    codes = values[:, kept]
    return Coded(codes, classes, unlabelled, seen - len(classes), int(is_labelled(codes[train]).sum()))


def _code_lists(column: pa.ChunkedArray, train: Bools, smallest: int) -> tuple[list[str], NDArray[np.int8], int]:
    """Labels of JSON lists that `smallest` training rows have, sorted; 1, 0, -1 (null) [n, L]; how many there are."""
    encoded = column.combine_chunks().dictionary_encode()
    lists = [json.loads(text) for text in encoded.dictionary.to_pylist()]
    indices = encoded.indices.fill_null(len(lists)).to_numpy(zero_copy_only=False)
    sizes = np.bincount(indices[train], minlength=len(lists) + 1)
    totals: Counter[str] = Counter()
    for labels, size in zip(lists, sizes[:-1].tolist(), strict=True):
        totals.update(dict.fromkeys(labels, size))
    names = sorted(name for name, total in totals.items() if total >= smallest)
    if len(names) > MAX_CLASSES:  # it will be refused: no room is taken for it
        return names, np.zeros((0, len(names)), dtype=np.int8), len(totals)
    place = {name: code for code, name in enumerate(names)}
    values = np.zeros((len(lists) + 1, len(names)), dtype=np.int8)
    values[-1] = -1
    for row, labels in enumerate(lists):
        values[row, [place[label] for label in labels if label in place]] = 1
    return names, values[indices], len(totals)


def check_classes(task: Task, coded: Coded) -> str | None:
    """What is wrong with a task's classes. Their names are not told: they may be texts."""
    named = "', '".join(task.label_columns())
    least, found = task.min_class_size, len(coded.classes)
    fix = "check the column, lower min_class_size or drop the task"
    if task.is_multi_label() and not found:
        return f"'{named}' has no label with {least} or more training rows and one without it; {fix}"
    if not task.is_multi_label() and found < 2:
        return f"'{named}' has {found} class(es) with {least} or more training rows; a task needs two: {fix}"
    if found > MAX_CLASSES or max(map(len, coded.classes)) > MAX_NAME:
        longest = max(map(len, coded.classes))
        return (
            f"'{named}' has {found:,} classes with names of up to {longest:,} characters; a task has at most "
            f"{MAX_CLASSES:,}, of {MAX_NAME} characters: name a column of classes, or raise min_class_size"
        )
    if found > max(FEW_CLASSES, coded.train_rows / 2):
        return (
            f"'{named}' has {found:,} classes in {coded.train_rows:,} labelled training rows, under two rows a class: "
            "name a column of classes, or raise min_class_size"
        )
    return None


def is_labelled(codes: NDArray[Any]) -> Bools:
    """Which rows have a label, or, of codes [n, L], one that is known: bool [n]."""
    return np.asarray(codes >= 0 if codes.ndim == 1 else (codes >= 0).any(axis=1))


def pack_labels(codes: NDArray[np.int8]) -> pa.FixedSizeListArray:
    """Labels [n, L] as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), codes.shape[1])


def to_array(column: pa.ChunkedArray) -> NDArray[Any]:
    """A coded column: [n], or the labels of a multi-label task, int8 [n, L]."""
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    flat = column.combine_chunks().flatten().to_numpy()
    return np.asarray(flat.reshape(len(column), column.type.list_size))
