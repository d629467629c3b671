"""The corpus: texts read once, split by group, labels and categories coded from the training rows, and digests."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylab.base.identity import digest
from raylab.base.mistakes import JobError
from raylab.base.noise import derive_seed
from raylab.data.labels import check_classes, code_labels, code_values, is_labelled, join_labels, pack_labels, to_array
from raylab.data.sources import read_labels, read_source
from raylab.job.blocks import PARTS, Corpus, Task
from raylab.job.specs import Job
from raylab.store.stages import Stage, build_stage

TRAIN, VALIDATION, TEST = range(3)
DOCUMENTS = "documents"
# Shared texts, and such with the label, from which on a metadata field may be found to give a label away.
SHARED_TEXTS, SHARED_POSITIVES = 20, 10


class ReadCorpus(NamedTuple):
    """All rows as read: table -> Arrow table (id, text, group, categories), and counts per table."""

    tables: dict[str, pa.Table]
    counts: dict[str, dict[str, int]]


class SplitCorpus(NamedTuple):
    """A corpus under one split.

    `open` holds the training and validation rows, `sealed` the test rows; columns: text, group (int64 code), part
    (int8: 0 train, 1 validation, 2 test), label (tasks: int64, or, of a multi-label task, int8 of the fixed size L: 1,
    0, or -1 where it is not known; see `to_array`) and one int64 column for each metadata field (-1: none).
    """

    open: dict[str, pa.Table]
    sealed: dict[str, pa.Table]
    classes: dict[str, list[str]]
    categories: dict[str, list[str]]
    counts: dict[str, dict[str, int]]
    digests: dict[str, str]
    stored_digest: str
    supervised_by: dict[str, str]
    # Which rows of the tables as read these are.
    open_places: dict[str, NDArray[np.int64]]
    sealed_places: dict[str, NDArray[np.int64]]


def metadata_fields(job: Job) -> list[str]:
    """The columns of the documents that some arm of the job may be asked to predict."""
    entry = job.search.space.get("pretrain.metadata.field")
    searched = getattr(entry, "choices", ())
    objectives = {job.pretrain.objective, *getattr(job.search.space.get("pretrain.objective"), "choices", ())}
    if "metadata" not in objectives:
        return []
    return sorted({field for field in (job.pretrain.metadata.field, *searched) if field is not None})


def read_corpus(corpus: Corpus, fields: Collection[str]) -> ReadCorpus:
    """Reads documents and tasks. Raises JobError with every problem of every table; no text is in it."""
    problems: list[str] = []
    tables: dict[str, pa.Table] = {}
    counts: dict[str, dict[str, int]] = {}
    column = corpus.split.column
    wanted = {DOCUMENTS: (corpus.documents, [*fields])} | {
        name: (task, [] if task.labels is not None else [*task.label_columns()]) for name, task in corpus.tasks.items()
    }
    for name, (source, categories) in wanted.items():
        where = "corpus.documents" if name == DOCUMENTS else f"corpus.tasks.{name}"
        needed = [*categories, *([column] if column else [])]
        table, counts[name] = read_source(source, where, categories=list(dict.fromkeys(needed)), problems=problems)
        gold = None
        if isinstance(source, Task) and source.labels is not None:
            gold = read_labels(source, f"{where}.labels", problems=problems)
        if table is not None and gold is not None:
            table = join_labels(table, gold, f"{where}.labels", counts[name], problems)
        if table is not None:
            tables[name] = table
    grouped = [name for name, (source, _) in wanted.items() if source.group is not None]
    if grouped and len(grouped) < len(wanted):
        missing = ", ".join(name for name in wanted if name not in grouped)
        problems.append(f"corpus: {missing} names no 'group' while other tables do; name one everywhere or nowhere")
    problems += [
        f"pretrain.metadata.field: a field can't be named '{field}', as the coded rows have a column of that name; "
        "rename it with sql"
        for field in sorted({"group", "part"}.intersection(fields))
    ]
    if problems:
        raise JobError(problems)
    return ReadCorpus(tables, counts)


def _hash_unique(column: pa.ChunkedArray, *key: int | str) -> NDArray[np.int64]:
    """A 63-bit hash of each row's string, computed once a distinct value."""
    encoded = column.combine_chunks().dictionary_encode()
    codes = np.array([derive_seed(*key, value) for value in encoded.dictionary.to_pylist()], dtype=np.int64)
    return codes[encoded.indices.to_numpy(zero_copy_only=False)]


def _groups(table: pa.Table) -> pa.ChunkedArray:
    """Without groups, rows of one text are one group: no text on two sides."""
    return table["group"] if "group" in table.column_names else table["text"]


def _assign_parts(table: pa.Table, corpus: Corpus, seed: int, where: str, problems: list[str]) -> NDArray[np.int8]:
    split = corpus.split
    if split.column is None:
        share = _hash_unique(_groups(table), "split", seed) / 2.0**63
        edges = np.array([split.train, split.train + split.validation])
        return np.searchsorted(edges, share, side="right").astype(np.int8)
    part_of = {part: code for code, part in enumerate(PARTS)}
    if split.values is not None:
        part_of = {value: PARTS.index(part) for part, values in split.values.items() for value in values}
    column = table[split.column].combine_chunks().dictionary_encode()
    unknown = [value for value in column.dictionary.to_pylist() if value not in part_of]
    if unknown or column.null_count:
        problems.append(
            f"{where}: split column '{split.column}' has {len(unknown)} values that name no part and "
            f"{column.null_count} nulls; list the values in corpus.split.values"
        )
        return np.zeros(0, dtype=np.int8)
    codes = np.array([part_of[value] for value in column.dictionary.to_pylist()], dtype=np.int8)
    return codes[column.indices.to_numpy(zero_copy_only=False)]


def split_corpus(read: ReadCorpus, corpus: Corpus, fields: Collection[str], seed: int) -> SplitCorpus:
    """Splits by group, one assignment for all tables, and codes labels and categories from the training rows.

    A group's part depends on its name and the split's seed alone, so that new groups move no old one.
    `seed` is the trial's and counts only where split.vary is true. Raises JobError.
    """
    problems: list[str] = []
    split_seed = derive_seed(corpus.split.seed, seed) if corpus.split.vary else corpus.split.seed
    coded: dict[str, pa.Table] = {}
    counts = {name: dict(table_counts) for name, table_counts in read.counts.items()}
    kept: dict[str, NDArray[np.int64]] = {}
    classes: dict[str, list[str]] = {}
    categories: dict[str, list[str]] = {}
    places = {name: "corpus.documents" if name == DOCUMENTS else f"corpus.tasks.{name}" for name in read.tables}
    parts = {
        name: _assign_parts(table, corpus, split_seed, places[name], problems) for name, table in read.tables.items()
    }
    if problems:
        raise JobError(problems)
    for name, table in read.tables.items():
        where, part = places[name], parts[name]
        columns: dict[str, Any] = {"text": table["text"], "group": _hash_unique(_groups(table), "group"), "part": part}
        keep = np.ones(len(table), dtype=bool)
        if name == DOCUMENTS:
            for field in fields:
                columns[field], categories[field] = code_values(table[field], part == TRAIN, 1)
                counts[name][f"without_{field}"] = int((columns[field] < 0).sum())
                if len(categories[field]) < 2:
                    problems.append(f"pretrain.metadata.field: '{field}' has under two values in the training rows")
        else:
            task = corpus.tasks[name]
            coded_labels = code_labels(table, task, part == TRAIN)
            classes[name] = coded_labels.classes
            if problem := check_classes(task, coded_labels):
                problems.append(f"{where}{'.labels' if task.labels else ''}.label: {problem}")
            codes = coded_labels.codes
            if problem and (codes.ndim == 2 or len(classes[name]) > 2):
                continue  # nothing to count rows by
            keep = is_labelled(codes)
            columns["label"] = codes if codes.ndim == 1 else pack_labels(codes)
            unlabelled = coded_labels.unlabelled
            counts[name] |= {"unlabelled": unlabelled, "rare_or_unseen_class": int((~keep).sum()) - unlabelled}
            if codes.ndim == 2:
                counts[name]["labels_left_out"] = coded_labels.left_out
        coded[name] = pa.table(columns).filter(pa.array(keep))
        kept[name] = np.flatnonzero(keep)
        for code, part_name in enumerate(PARTS):
            counts[name][part_name] = int((part[keep] == code).sum())
            if counts[name][part_name] == 0 and code != TEST:
                problems.append(f"{where}: no {part_name} rows under this split; change corpus.split or add rows")
    if corpus.split.column is not None and (crossing := _count_crossing(coded)):
        problems.append(
            f"corpus.split.column: {crossing} groups stand on two sides of '{corpus.split.column}'; "
            "give each group one part, or split by fractions"
        )
    if problems:
        raise JobError(problems)
    opened = {name: table.filter(pc.less(table["part"], TEST)) for name, table in coded.items()}
    sealed = {name: table.filter(pc.equal(table["part"], TEST)) for name, table in coded.items()}
    open_places = {name: kept[name][table["part"].to_numpy() < TEST] for name, table in coded.items()}
    sealed_places = {name: kept[name][table["part"].to_numpy() == TEST] for name, table in coded.items()}
    names = {**classes, **{f"metadata:{field}": values for field, values in categories.items()}}
    stored = _digest_tables(opened, fields, names)
    digests = stored
    if corpus.split.vary:
        # Every row trains in some trial: what was read and the rules of the split, not one split, name the arms.
        rules: dict[str, Any] = {
            name: [task.min_class_size, task.is_multi_label()] if task.is_multi_label() else task.min_class_size
            for name, task in corpus.tasks.items()
        }
        rules[DOCUMENTS] = corpus.split.model_dump(mode="json")
        digests = _digest_tables(read.tables, fields, rules)
    supervised_by = _find_supervision(opened, corpus, fields)
    return SplitCorpus(
        opened, sealed, classes, categories, counts, digests, digest(stored), supervised_by, open_places, sealed_places
    )


def _count_crossing(coded: dict[str, pa.Table]) -> int:
    pairs = pa.concat_tables([table.select(["group", "part"]) for table in coded.values()])
    sides = pairs.group_by("group").aggregate([("part", "count_distinct")])
    return int(pc.sum(pc.greater(sides["part_count_distinct"], 1)).as_py() or 0)


def digest_column(column: pa.ChunkedArray) -> str:
    """Digest of the values and their order, whatever their chunks."""
    if column.null_count:
        column = pc.fill_null(column, "\0")
    if pa.types.is_fixed_size_list(column.type):
        column = pa.chunked_array([to_array(column).ravel()])
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_large_string(array.type):
        array = array.take(pa.array(np.arange(len(array))))  # compact: offsets from 0, no slice
        lengths = pc.binary_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
        hashed = hashlib.blake2b(lengths.tobytes(), digest_size=16)
        if len(array):
            hashed.update(memoryview(array.buffers()[2])[: int(lengths.sum())])
        return hashed.hexdigest()
    return hashlib.blake2b(array.to_numpy(zero_copy_only=False).tobytes(), digest_size=16).hexdigest()


def _digest_tables(tables: dict[str, pa.Table], fields: Collection[str], names: Mapping[str, Any]) -> dict[str, str]:
    """What was read, as far as it can change a result: `documents`, `metadata:FIELD`, and each task.

    `names` holds what else counts under a key, such as the class names behind the codes.
    """
    parts: dict[str, str] = {}
    for name, table in tables.items():
        columns = [column for column in table.column_names if column not in fields or name != DOCUMENTS]
        parts[name] = digest([[digest_column(table[column]) for column in columns], names.get(name)])
    for field in fields:
        key = f"metadata:{field}"
        parts[key] = digest([digest_column(tables[DOCUMENTS][field]), names.get(key)])
    return parts


def _find_supervision(opened: dict[str, pa.Table], corpus: Corpus, fields: Collection[str]) -> dict[str, str]:
    """Metadata fields that give a task's label away: the same column name, or one to one on shared texts.

    Of a multi-label task it is enough that one of its labels is one value of the field.
    """
    found: dict[str, str] = {}
    for field in fields:
        for name, task in corpus.tasks.items():
            if field in task.label_columns():
                found[field] = name
                continue
            # Distinct rows: texts that are often repeated would meet each other in the join.
            fielded = opened[DOCUMENTS].select(["text", field]).rename_columns(["text", "field"])
            fielded = fielded.filter(pc.greater_equal(fielded["field"], 0)).group_by(["text", "field"]).aggregate([])
            if task.is_multi_label():
                if _gives_label_away(fielded, opened[name]):
                    found[field] = name
                continue
            labelled = opened[name].group_by(["text", "label"]).aggregate([])
            both = fielded.join(labelled, "text", join_type="inner")
            pairs = both.group_by(["field", "label"]).aggregate([])
            num_fields, num_labels = (pc.count_distinct(pairs[column]).as_py() for column in ("field", "label"))
            if len(both) >= SHARED_TEXTS and num_labels > 1 and len(pairs) == num_fields == num_labels:
                found[field] = name
    return found


def _gives_label_away(fielded: pa.Table, labelled: pa.Table) -> bool:
    """Whether some label stands on all shared texts of one value of the field, and on no others."""
    rows = pa.table({"text": labelled["text"], "row": np.arange(len(labelled))})
    both = fielded.join(rows, "text", join_type="inner")
    values, labels = both["field"].to_numpy(), to_array(labelled["label"])[both["row"].to_numpy()]
    for column in labels.T:
        with_label, without = np.unique(values[column == 1]), np.unique(values[column == 0])
        enough = (column >= 0).sum() >= SHARED_TEXTS and (column == 1).sum() >= SHARED_POSITIVES
        if enough and len(with_label) == 1 and len(without) and with_label[0] not in without:
            return True
    return False


def store_corpus(results: Path, split: SplitCorpus) -> Stage:
    """Keeps the coded training and validation rows, without text: one Arrow file a table."""

    def build(folder: Path) -> dict[str, Any]:
        for name, table in split.open.items():
            with pa.ipc.new_file(folder / f"{name}.arrow", table.drop_columns("text").schema) as writer:
                writer.write_table(table.drop_columns("text").combine_chunks())
        documents = split.open[DOCUMENTS]
        digests = {"part": digest_column(documents["part"])}
        digests |= {f"metadata:{field}": digest_column(documents[field]) for field in split.categories}
        for name in split.classes:
            columns = [split.open[name][column] for column in ("part", "group", "label")]
            # Scores name the classes.
            digests[f"task:{name}"] = digest([*map(digest_column, columns), split.classes[name]])
        return {
            "digests": digests,
            "classes": split.classes,
            "categories": split.categories,
            "supervised_by": split.supervised_by,
        }

    # Which column names a label was read from is not in the digest of its rows, but decides supervised_by.
    key = {"rows": split.stored_digest, "supervised_by": split.supervised_by}
    return build_stage(results, "corpus", key, build)


def open_rows(folder: Path, table: str) -> dict[str, NDArray[Any]]:
    """The coded columns of a stored table: group, part, and label ([n], or multi-label [n, L]) or metadata fields."""
    with pa.memory_map(str(folder / f"{table}.arrow")) as file:
        rows = pa.ipc.open_file(file).read_all()
    return {name: to_array(rows[name]) for name in rows.column_names}
