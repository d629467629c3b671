"""Corpus hygiene: what is wrong with a corpus before anything is trained, kept as stages, a table, and shown by `plan`.

The checks and their definitions are in `checks`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Grid

from raylab.base.identity import digest
from raylab.data.checks import DEFINITIONS, Row, check_labels, check_texts, check_tokens
from raylab.data.corpus import DOCUMENTS, SplitCorpus, digest_column, open_rows
from raylab.job.settings import SPECIAL_TOKENS
from raylab.job.specs import TrialSpec
from raylab.results.tables import plain_value, read_rows, write_rows
from raylab.runs.preparation import Preparation, text_digest
from raylab.store.stages import build_stage, open_stage

# The table's file of a job: the corpus is one for all trials.
CORPUS = "corpus"


def check_corpus(preparation: Preparation, base: TrialSpec) -> list[Row]:
    """The rows of `hygiene` for every table, in the split of the base trial's seed; kept as stages by content.

    Plain values: `evidence` is a mapping and `row_ids` a list of up to MAX_IDS of the table's own ids. Time and
    memory grow with the number of words; with classes only up to leaks.MAX_TRAIN rows.
    """
    split = preparation.split(base.seed)
    coded = _find(preparation, base.corpus)
    rows: list[Row] = []
    for index, name in enumerate(split.open):
        preparation.tell("checking the corpus", index, len(split.open))
        columns = open_rows(coded, name)
        for key, find in _list_parts(preparation, base, split, name, columns):

            def build(folder: Path, find: Callable[[], Iterator[Row]] = find) -> dict[str, Any]:
                return {"rows": list(find())}

            stage = build_stage(preparation.results, "hygiene", key, build)
            rows += [{"table_name": name} | row for row in stage.info["rows"]]
    preparation.tell("checking the corpus", len(split.open), len(split.open))
    return rows


def _list_parts(
    preparation: Preparation, base: TrialSpec, split: SplitCorpus, name: str, columns: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[dict[str, Any], Callable[[], Iterator[Row]]]]:
    """The checks of a table in parts that are kept by themselves: what decides the result, and what finds the rows."""
    opened, sealed, job = split.open[name], split.sealed[name], preparation.job
    texts = text_digest(preparation, split, name)
    every = preparation.read.tables[name]["id"]
    ids, sealed_ids = every.take(split.open_places[name]), every.take(split.sealed_places[name])
    own = {"texts": texts, "ids": digest_column(ids), "part": digest_column(opened["part"])}
    classes = list(_list_classes(split, name, columns))
    named = digest([[title, digest_column(pa.chunked_array([pa.array(here)]))] for title, here in classes])
    labels = columns.get("label")
    labelled = None if labels is None else digest_column(pa.chunked_array([pa.array(labels.ravel())]))
    both = {
        "group": digest_column(opened["group"]),
        "test": [digest_column(sealed["text"]), digest_column(sealed_ids)],
    }
    yield (
        {"checks": "texts", **own, **both},
        lambda: check_texts(opened, sealed, ids.to_pylist(), sealed_ids.to_pylist()),
    )
    yield (
        {"checks": "labels", **own, "group": both["group"], "classes": named, "labels": labelled},
        lambda: check_labels(opened, ids.to_pylist(), labels, split.classes.get(name, []), classes),
    )
    room = job.corpus.max_length - SPECIAL_TOKENS
    folders = (_find(preparation, base.tokens[name]), _find(preparation, base.tokenizer))
    windows = job.corpus.long_documents == "windows"
    yield (
        {"checks": "tokens", **own, "tokens": base.tokens[name], "room": room, "windows": windows, "classes": named},
        lambda: check_tokens(opened["text"], ids.to_pylist(), *folders, room, windows, classes),
    )


def _find(preparation: Preparation, stage_id: str) -> Path:
    folder = open_stage(preparation.results, stage_id)
    assert folder is not None  # the base trial's: made with its spec
    return folder


def _list_classes(
    split: SplitCorpus, name: str, columns: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The classes of a task, or the categories of the documents: `column=name`, and which open rows are of it."""
    sets = {"label": split.classes[name]} if name != DOCUMENTS else split.categories
    for column, names in sets.items():
        codes = columns[column]
        for code, title in enumerate(names):
            yield f"{column}={title}", codes == code if codes.ndim == 1 else codes[:, code] == 1


def keep_hygiene(results: Path, job: str, rows: list[Row]) -> None:
    """Writes a job's table `hygiene`, unless these rows stand there."""
    known = read_rows(results, job, "hygiene", CORPUS)
    plain = [{column: plain_value(value) for column, value in row.items()} for row in rows]
    if len(known) != len(plain) or any(not row.items() >= new.items() for row, new in zip(known, plain, strict=True)):
        write_rows(results, job, "hygiene", CORPUS, rows)


def print_hygiene(rows: list[Row], console: Console) -> None:
    """For people: what is not ok, the worst first, and what to do. Classes no worse than their table are left out."""
    worst = ("problem", "look", "ok")
    whole = {(row["table_name"], row["check_name"]): row["verdict"] for row in rows if row["class"] is None}
    poor = sorted((row for row in rows if row["verdict"] != "ok"), key=lambda row: worst.index(row["verdict"]))
    console.print(
        f"corpus hygiene: {len(rows)} checks, {sum(row['verdict'] == 'problem' for row in poor)} problems, "
        f"{sum(row['verdict'] == 'look' for row in poor)} to look at",
        highlight=False,
    )
    if not poor:
        return
    grid = Grid(title="corpus hygiene: what is not ok")
    for column in ("", "check", "table", "split", "class", "rows", "value", "evidence"):
        grid.add_column(column, overflow="fold")
    for row in poor:
        of_table = whole.get((row["table_name"], row["check_name"]), "ok")
        if row["class"] is not None and worst.index(of_table) <= worst.index(row["verdict"]):
            continue
        told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["evidence"].items())
        grid.add_row(
            row["verdict"], row["check_name"], row["table_name"], row["split"], row["class"] or "",
            f"{row['num_rows']} ({row['share']:.1%})", f"{row['value']:.3f}", told,
        )  # fmt: skip
    console.print(grid)
    for name in dict.fromkeys(row["check_name"] for row in poor):
        check = DEFINITIONS[name]
        console.print(
            f"{name}: {check.definition}. Look above {check.look_above:g}, problem above {check.problem_above:g}. "
            f"Why: {check.why}. To do: {check.what_to_do}.",
            highlight=False,
        )
