"""Tables of texts from files, saved Hugging Face datasets or a DuckDB query, in one Arrow form.

Rows hold what patients told their doctors. Messages of pyarrow, datasets and DuckDB may quote rows, so none of them is
passed on: a problem line is made of the job's own words, names of files and columns, types and counts.
"""

import difflib
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.compute as pc

from raylab.data.files import Part, SourceError, open_path, open_sql
from raylab.job.blocks import Source, Table, Task

MAX_NAMES = 40  # column names listed in a problem line
SIDES = {"0": "0", "1": "1", "false": "0", "true": "1"}  # of a label with a column of its own


def read_source(
    table: Table, where: str, *, categories: Sequence[str] = (), problems: list[str]
) -> tuple[pa.Table | None, dict[str, int]]:
    """Read a table's text, id and group and its `categories`, all as large_string, and count the rows.

    Columns of the result: `id` (the number of the row read, from 0, where table.id is None), `text`, `group` (absent
    where table.group is None), and each of `categories` (labels, metadata, a split column) under its own name. Order:
    files by path, then rows as they lie; a query's rows by `id` where it is given, since DuckDB orders none by itself.

    Integers, booleans, dates, whole floats ("3", not "3.0"), dictionaries and ClassLabels become strings. A csv file
    has no types: its values are taken as written ("0389" keeps its zero), but for columns written as whole floats. In
    all columns but the text an empty string, NaN and an unset ClassLabel (-1) are nulls. A column of labels of a
    multi-label task holds "0" and "1" where each label has its own, else JSON lists of its labels, sorted.

    Rows with null or blank text are left out. Counts: rows_read, empty_text, rows; empty where the table is None.

    Each mistake adds a line to `problems`, starting with `where` (such as "corpus.documents"), and the table is None:
    nothing to read or unreadable, columns missing or of an unfit type, text that is not UTF-8, ids null or not unique,
    groups null.
    """
    num_before = len(problems)
    keys = _name_columns(table, categories, where, problems)
    if len(problems) > num_before:
        return None, {}
    task = table if isinstance(table, Task) and table.labels is None else None
    read = _read_columns(table, keys, where, text=table.text, task=task, problems=problems)
    if read is None:
        return None, {}

    rows_read = len(read[table.text])
    ids = read[table.id] if table.id is not None else _number_rows(rows_read)
    columns = {"id": ids, "text": read[table.text]}
    if table.group is not None:
        columns["group"] = read[table.group]
    result = pa.table(columns | {name: read[name] for name in categories})
    blank = _find_blank(result["text"])
    empty_text = pc.sum(blank).as_py()
    if empty_text:
        result = result.filter(pc.invert(blank))
    _check_rows(table, result, where, problems)
    if len(problems) > num_before:
        return None, {}
    if table.sql is not None:
        # DuckDB gives rows in any order: by id, or by all that is read, they come in the same one each time.
        order = ["id"] if table.id is not None else [name for name in result.column_names if name != "id"]
        result = result.sort_by([(name, "ascending") for name in order])
    return result, {"rows_read": rows_read, "empty_text": empty_text, "rows": result.num_rows}


def read_labels(task: Task, where: str, *, problems: list[str]) -> pa.Table | None:
    """Read a task's separate table of labels: `id`, and its label columns, in the form that `read_source` gives them.

    Problems are those of `read_source`; an id that is null or stands twice is one.
    """
    labels = task.labels
    assert labels is not None
    num_before = len(problems)
    if labels.id in task.label_columns():
        problems.append(f"{where}.label: '{labels.id}' is the id column: name another one")
        return None
    keys = {labels.id: f"{where}.id", **dict.fromkeys(task.label_columns(), f"{where}.label")}
    read = _read_columns(labels, keys, where, text=None, task=task, problems=problems)
    if read is None:
        return None
    found = pa.table({"id": read[labels.id]} | {name: read[name] for name in task.label_columns()})
    _check_ids(found["id"], labels.id, where, "keep one row of labels a text", problems)
    return found if len(problems) == num_before else None


def _read_columns(
    source: Source, keys: dict[str, str], where: str, *, text: str | None, task: Task | None, problems: list[str]
) -> dict[str, pa.ChunkedArray] | None:
    """The columns that `keys` names; None where there was a problem. `task` says how those of labels are read."""
    num_before = len(problems)
    try:
        with ExitStack() as stack:
            parts = open_path(source) if source.sql is None else open_sql(source, stack)
            for column, key in keys.items():
                _check_column(column, key, parts, ignore_case=source.sql is not None, problems=problems)
            if len(problems) > num_before:
                return None
            raw = [part.read(list(keys)) for part in parts]
    except SourceError as refusal:
        problems.append(f"{where}.{refusal}")
        return None

    if not sum(part.num_rows for part in raw):
        problems.append(f"{where}: {parts[0].place} has no rows: correct the {'query' if source.sql else 'path'}")
        return None
    labels = () if task is None else task.label_columns()
    read = {}
    for column, key in keys.items():
        try:
            if task is not None and column in labels and task.is_multi_label() and not task.has_sides():
                read[column] = _join_lists(column, task.separator, parts, raw)
            else:
                read[column] = _join_column(column, text, parts, raw)
            if task is not None and column in labels and task.has_sides():
                read[column] = _read_sides(column, read[column])
        except SourceError as refusal:
            problems.append(f"{key}: {refusal}")
    return read if len(problems) == num_before else None


def _name_columns(table: Table, categories: Sequence[str], where: str, problems: list[str]) -> dict[str, str]:
    """Source column -> key of the job file that names it. Names that would clash in the result are problems."""
    keys = {table.text: f"{where}.text"}
    own = {"text": table.text, "id": table.id, "group": table.group}
    labels = table.label_columns() if isinstance(table, Task) and table.labels is None else ()
    wanted = [("id", table.id), ("group", table.group), *(("label" if c in labels else "", c) for c in categories)]
    for key, column in wanted:
        path = f"{where}.{key}" if key else where
        if column is None:
            continue
        if column == table.text:  # ids, groups and classes may be shown to people, text may not
            problems.append(f"{path}: '{column}' is the text column: name another one")
        elif column in categories and column in own and own[column] != column:
            problems.append(f"{path}: a label, metadata or split column cannot be named '{column}': rename it with sql")
        keys.setdefault(column, path)
    return keys


def _check_column(column: str, key: str, parts: list[Part], ignore_case: bool, problems: list[str]) -> None:
    """A problem for the first part that does not hold `column` exactly once."""
    for part in parts:
        if column not in part.names:
            problems.append(f"{key}: {part.place} has no column '{column}'{_list_names(column, part.names)}")
            return
        same = [name for name in part.names if name == column or (ignore_case and name.lower() == column.lower())]
        if len(same) > 1:
            problems.append(f"{key}: {part.place} has {len(same)} columns '{column}': rename or leave out all but one")
            return


def _list_names(column: str, names: list[str]) -> str:
    """The nearest name and all names, unless they seem to be a first row of data in a file without a header."""
    if not all(re.fullmatch(r"([^\W\d][\w .:/()#%-]{0,63})?", name) for name in names):
        return ": its column names are not shown, since not all look like names; is the header row missing?"
    names = [name for name in names if name]  # pandas leaves the name of its index empty
    lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(column.lower(), lower, n=1, cutoff=0.5)
    hint = f", nearest is '{lower[near[0]]}'" if near else ""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{hint}; columns: {', '.join(names[:MAX_NAMES])}{more}"


def _join_column(column: str, text: str | None, parts: list[Part], raw: list[pa.Table]) -> pa.ChunkedArray:
    """A column of all parts as large_string; each part is converted by itself, since types differ between files."""
    chunks = []
    for part, table in zip(parts, raw, strict=True):
        values = table[column]
        kind = part.guesses.get(column, values.type) if column == text else values.type
        try:
            if column == text and not _is_text(kind):
                raise SourceError(f"is of type {_show_type(kind)}, and text must be strings: name another column")
            strings = _to_strings(values)
        except SourceError as refusal:
            raise SourceError(f"column '{column}' of {part.place} {refusal}") from None
        if column != text:
            strings = pc.if_else(pc.equal(strings, ""), None, strings)
        chunks += strings.chunks
    return pa.chunked_array(chunks, pa.large_string())


def _join_lists(column: str, separator: str | None, parts: list[Part], raw: list[pa.Table]) -> pa.ChunkedArray:
    """A column of lists of labels, or of strings to cut, of all parts as large_string: see `_pack_lists`."""
    chunks = []
    for part, table in zip(parts, raw, strict=True):
        try:
            chunks.append(_pack_lists(table[column], separator))
        except SourceError as refusal:
            raise SourceError(f"column '{column}' of {part.place} {refusal}") from None
    return pa.chunked_array(chunks, pa.large_string())


def _pack_lists(column: pa.ChunkedArray, separator: str | None) -> pa.Array:
    """Each row's labels as the JSON text of a sorted list; null where they are not known.

    A list may be empty: none of the labels. So is a string of separators alone; an empty string is not known.
    """
    rows: list[set[str] | None]
    if separator is not None:
        if _is_list(column.type):
            raise SourceError("holds lists: leave out 'separator'")
        texts = _to_strings(column).to_pylist()
        rows = [{piece.strip() for piece in text.split(separator)} if text else None for text in texts]
    elif _is_list(column.type) or pa.types.is_null(column.type):
        lists = column.combine_chunks()
        rows = [set() if known else None for known in lists.is_valid().to_pylist()]
        if _is_list(column.type):
            names = _to_strings(pa.chunked_array([pc.list_flatten(lists)])).to_pylist()
            for row, name in zip(pc.list_parent_indices(lists).to_pylist(), names, strict=True):
                rows[row].add(name)  # a null list has no items
    else:
        raise SourceError(f"is of type {_show_type(column.type)} and holds no lists: give 'separator' to cut strings")
    return pa.array([None if row is None else json.dumps(sorted(row - {"", None})) for row in rows], pa.large_string())


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _read_sides(column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values of 0 and 1, true and false, in any case, as "0" and "1"."""
    encoded = values.combine_chunks().dictionary_encode()
    sides = pa.array([SIDES.get(value.lower()) for value in encoded.dictionary.to_pylist()], pa.large_string())
    found = sides.take(encoded.indices)
    if wrong := found.null_count - values.null_count:
        raise SourceError(
            f"column '{column}' has {wrong:,} values that are not 0, 1, true, false or empty: name another column, or "
            "one column alone if it holds classes"
        )
    return pa.chunked_array([found])


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Null: a part in which every text is missing. Binary is a csv file's guess for strings that are not UTF-8; in
    # other formats it is a type, which _to_strings refuses.
    return _is_string(kind) or pa.types.is_null(kind) or pa.types.is_binary(kind)


def _show_type(kind: pa.DataType) -> str:
    """A type without what stands in <>: the keys of a JSON object may be data."""
    return str(kind).split("<")[0]


def _to_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as large_string; strings share their bytes with it."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if _is_string(kind):
        column = column.cast(pa.large_binary())  # a cast from string to string would not check the bytes
        try:
            return column.cast(pa.large_string())
        except pa.ArrowInvalid:
            raise SourceError(
                f"has {_count_not_utf8(column):,} rows that are not UTF-8: write the file as UTF-8"
            ) from None
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), None, column)
        try:
            column = column.cast(pa.int64())
        except pa.ArrowException:
            raise SourceError(
                f"is of type {_show_type(kind)} with values that are not whole numbers: name another column or make it "
                "strings (cut into ranges, say) with sql"
            ) from None
    elif not any(check(kind) for check in PLAIN_TYPES):
        several = ", or set 'multi_label: true' where it is a task's label" if _is_list(kind) else ""
        raise SourceError(f"is of type {_show_type(kind)}: name another column or make it a string with sql{several}")
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException:  # a time zone without its data, say
        raise SourceError(f"of type {_show_type(kind)} cannot be made a string: do it with sql") from None


PLAIN_TYPES = (
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_timestamp,
    pa.types.is_null,
)


def _count_not_utf8(column: pa.ChunkedArray) -> int:
    """Rows of a large_binary column that do not decode; one at a time, as only a wrong file gets here."""

    def is_wrong(value: bytes | None) -> bool:
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return True
        return False

    return sum(is_wrong(value.as_py()) for chunk in column.chunks for value in chunk)


def _number_rows(num_rows: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(range(num_rows), pa.int64()).cast(pa.large_string())])


def _find_blank(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """True where text is null, empty or white space only."""
    return pc.fill_null(pc.or_(pc.utf8_is_space(text), pc.equal(pc.binary_length(text), 0)), True)


def _check_rows(table: Table, result: pa.Table, where: str, problems: list[str]) -> None:
    """Problems of the kept rows: none left, ids null or not unique, groups null. Counts only, no values."""
    if not result.num_rows:
        problems.append(f"{where}.text: column '{table.text}' is empty in every row: name another column")
    _check_ids(result["id"], table.id, where, "name another column, or leave out 'id'", problems)
    null_groups = result["group"].null_count if table.group is not None else 0
    if null_groups:
        problems.append(
            f"{where}.group: column '{table.group}' is null in {null_groups:,} rows: fill them, filter them with sql, "
            "or leave out 'group'"
        )


def _check_ids(ids: pa.ChunkedArray, column: str | None, where: str, fix: str, problems: list[str]) -> None:
    if ids.null_count:
        problems.append(f"{where}.id: column '{column}' is null in {ids.null_count:,} rows: fill them; or {fix}")
    repeated = len(ids) - ids.null_count - pc.count_distinct(ids, mode="only_valid").as_py()
    if repeated:
        problems.append(
            f"{where}.id: {repeated:,} rows repeat an id of column '{column}': ids must be unique; leave out the "
            f"repeats with sql, or {fix}"
        )
