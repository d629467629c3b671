"""Files, saved Hugging Face datasets and DuckDB queries, opened: column names at once, rows when they are read.

Messages of pyarrow, datasets and DuckDB may quote rows, so none of them is passed on.
"""

import glob
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json

from raylab.job.blocks import Source

ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BLOCK_BYTES = 16 * 2**20  # a row must fit into a block, and pyarrow's own 1 MiB is too little for some records


class Part(NamedTuple):
    """A file, split or query: column names are known, rows are not read yet."""

    place: str  # how a problem line calls it
    names: list[str]
    read: Callable[[list[str]], pa.Table]  # columns -> table
    guesses: dict[str, pa.DataType]  # csv only: what its untyped columns look like


class SourceError(Exception):
    """One problem line. Not a ValueError, since pyarrow's own errors, which quote rows, are ValueErrors."""


def open_path(table: Source) -> list[Part]:
    """The parts of a file, of a folder of files of one format, or of a saved dataset."""
    path, kind = Path(table.path or ""), cast("str | None", table.format)
    if not path.exists():
        raise SourceError(f"path: {path} does not exist: correct the path or pass --data DIR")
    saved = path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if kind == "hf" or (kind is None and saved):
        return _open_saved(path)
    if path.is_dir():
        kind, files = _list_files(path, kind)
    else:
        kind, files = kind or _ending_format(path), [path]
        if kind is None:
            raise SourceError(f"path: {path.name} has none of the endings {', '.join(ENDINGS)}: give 'format'")
    return [_open_file(file, kind) for file in files]


def _ending_format(path: Path) -> str | None:
    return ENDINGS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _list_files(folder: Path, kind: str | None) -> tuple[str, list[Path]]:
    """The format and the sorted files of a folder and the folders in it, without those hidden or beginning with _."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)
    )
    if kind is None:
        kinds = {_ending_format(file) for file in files}
        if len(kinds) != 1 or None in kinds:
            endings = ", ".join(sorted({file.suffix or "no ending" for file in files})) or "no files"
            raise SourceError(f"path: {folder} must hold files of one format, not {endings}: give 'format' or a file")
        kind = kinds.pop()
    files = [file for file in files if _ending_format(file) == kind]
    if kind is None or not files:
        raise SourceError(f"path: {folder} holds no {kind} files: correct the path or 'format'")
    return kind, files


def _open_file(path: Path, kind: str) -> Part:
    if path.stat().st_size == 0:
        raise SourceError(f"path: {path} is empty (0 bytes): write it again or remove it")
    part: Part = _guard(path, kind, lambda: OPENERS[kind](path))
    return part._replace(read=lambda columns: _guard(path, kind, lambda: part.read(columns)))


def _guard(path: Path, kind: str, act: Callable[[], Any]) -> Any:
    """What `act` returns; any error of the reading library as a line without its message."""
    try:
        return act()
    except Exception as error:
        row = re.search(r"Row #(\d+)", str(error))
        at = f"{type(error).__name__} at row {row[1]}" if row else type(error).__name__
        raise SourceError(f"path: {path} cannot be read as {kind} ({at}): {UNREADABLE[kind]}") from None


UNREADABLE = {
    "csv": "check that no column name is there twice, that every row has as many fields as the header, and that quotes "
    "are closed and are doubled inside text",
    "jsonl": "check that every line is one JSON object and that a key's values are all of one type",
    "parquet": "check that it was written to the end, or correct 'format'",
    "hf": "it must be a folder written by save_to_disk; correct the path or 'format'",
}


def _open_csv(path: Path) -> Part:
    def dataset(**convert: Any) -> pa.dataset.Dataset:
        layout = pa.dataset.CsvFileFormat(
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
            convert_options=pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, **convert),
        )
        return pa.dataset.dataset([str(path)], format=layout)

    def read(columns: list[str]) -> pa.Table:
        # Bytes, since a guessed type fails on the first later value that is different, and loses leading zeros.
        # Bytes rather than strings, so that rows which are not UTF-8 can be counted.
        binary = dataset(column_types=dict.fromkeys(columns, pa.large_binary()))
        table = binary.to_table(columns={column: pa.dataset.field(column) for column in columns})
        return pa.table({column: _view_strings(_strip_zeros(table[column])) for column in columns})

    guesses = dataset().schema
    return Part(str(path), guesses.names, read, dict(zip(guesses.names, guesses.types, strict=True)))


def _strip_zeros(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers without the ".0" that pandas adds to a column with nulls; other columns as they are."""
    # Chunk by chunk and only while all match: a column of texts is left after its first chunk.
    for chunk in column.chunks:
        if pc.any(pc.invert(pc.match_substring_regex(chunk, r"^-?\d{1,18}\.0$"))).as_py():
            return column
    return pc.replace_substring(column, ".0", "") if len(column) > column.null_count else column


def _view_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.view(pa.large_string()) for chunk in column.chunks], pa.large_string())


def _open_jsonl(path: Path) -> Part:
    options = pa.json.ReadOptions(block_size=BLOCK_BYTES)
    # Not pyarrow.dataset: it fixes the types by the first block, and a column may start with nulls.
    table = pa.json.read_json(str(path), read_options=options)
    dates = [field.with_type(pa.string()) for field in table.schema if pa.types.is_timestamp(field.type)]
    if dates:  # guessed from strings, which are wanted as they were written
        parse = pa.json.ParseOptions(explicit_schema=pa.schema(dates))
        table = pa.json.read_json(str(path), read_options=options, parse_options=parse)
    return Part(str(path), table.schema.names, table.select, {})


def _open_parquet(path: Path) -> Part:
    dataset = pa.dataset.dataset([str(path)], format="parquet")

    def read(columns: list[str]) -> pa.Table:
        return dataset.to_table(columns={column: pa.dataset.field(column) for column in columns})

    return Part(str(path), dataset.schema.names, read, {})


OPENERS: dict[str, Callable[[Path], Part]] = {"csv": _open_csv, "jsonl": _open_jsonl, "parquet": _open_parquet}


def _open_saved(path: Path) -> list[Part]:
    """The splits of a dataset written by save_to_disk, by name."""
    import datasets  # takes a second to import

    def name_classes(codes: Any, feature: datasets.ClassLabel) -> Any:
        return pc.take(pa.array(feature.names, pa.string()), pc.if_else(pc.less(codes, 0), None, codes))

    def part(place: str, dataset: datasets.Dataset) -> Part:
        def read(columns: list[str]) -> pa.Table:
            # Through the arrow format, which knows which rows a select or filter kept.
            table = dataset.select_columns(columns).with_format("arrow")[:]
            for column in columns:
                feature = dataset.features[column]
                if isinstance(feature, datasets.ClassLabel):
                    names = name_classes(table[column], feature)
                elif isinstance(getattr(feature, "feature", None), datasets.ClassLabel):  # lists of them
                    lists = table[column].combine_chunks()
                    names = name_classes(lists.values, feature.feature)
                    names = pa.ListArray.from_arrays(lists.offsets, names, mask=lists.is_null())
                else:
                    continue
                table = table.set_column(table.schema.get_field_index(column), column, names)
            return table

        return Part(place, dataset.column_names, lambda columns: _guard(path, "hf", lambda: read(columns)), {})

    loaded = _guard(path, "hf", lambda: datasets.load_from_disk(str(path)))
    if isinstance(loaded, datasets.Dataset):
        return [part(str(path), loaded)]
    return [part(f"{path} ({name})", loaded[name]) for name in sorted(loaded)]


def open_sql(table: Source, stack: ExitStack) -> list[Part]:
    """The one part of a DuckDB query; it is bound here and run when read. `stack` closes the connection."""
    import duckdb

    root, sql = Path(table.root or ".").resolve(), table.sql or ""
    if not root.is_dir():
        raise SourceError(f"root: {root} is not a folder: correct 'root' or pass --data DIR")
    if "," in str(root):
        raise SourceError(f"root: {root} has a comma, where DuckDB would cut it: rename the folder")
    shadow = _find_shadow(sql, root)
    if shadow is not None:
        raise SourceError(
            f"sql: '{shadow}' would be read from the current folder, not from {root}: "
            "start raylab in another folder or write its whole path"
        )
    # A folder of our own for what does not fit into memory: the default is .tmp in the current folder.
    spill = stack.enter_context(tempfile.TemporaryDirectory(prefix="raylab-sql-"))
    settings: dict[str, Any] = {
        "file_search_path": str(root),
        "temp_directory": spill,
        "arrow_large_buffer_size": "true",
    }
    settings["autoinstall_known_extensions"] = "false"  # no downloads
    connection = stack.enter_context(duckdb.connect(":memory:", config=settings))
    # Without this a query could read our own variables as tables.
    connection.execute("set python_enable_replacements = false; set enable_progress_bar = false")

    def attempt(act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            raise SourceError(f"sql: {_explain_query_error(error, sql, root)}") from None

    statements = attempt(lambda: connection.extract_statements(sql))
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise SourceError("sql: must be one select statement")
    relation = attempt(lambda: connection.sql(sql))

    def read(columns: list[str]) -> pa.Table:
        names = ", ".join('"' + column.replace('"', '""') + '"' for column in columns)
        return attempt(lambda: relation.project(names).to_arrow_table())

    return [Part("the query", relation.columns, read, {})]


def _find_shadow(sql: str, root: Path) -> str | None:
    """A file named in the query that DuckDB would find in the current folder before it looks into `root`."""
    if root == Path.cwd():
        return None
    for name in re.findall(r"'([^'\n]+)'", sql) + re.findall(r'"([^"\n]+)"', sql):
        if "." in name and not Path(name).is_absolute() and any(Path(found).is_file() for found in glob.glob(name)):
            return str(name)
    return None


def _explain_query_error(error: Exception, sql: str, root: Path) -> str:
    """What is wrong with a query. DuckDB's words are used only where all that they quote is in the query itself."""
    import duckdb

    kind, message = type(error).__name__, str(error).split("\n")[0].strip()
    quoted = re.findall(r'"([^"]*)"', message) + re.findall(r"'([^']*)'", message)
    safe = len(message) < 300 and all(word.lower() in sql.lower() for word in quoted)
    if safe and isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
        return f"{message}: correct the query"
    if safe and "No files found that match the pattern" in message:
        return f"no file matches '{quoted[0]}' in {root}: correct the name or 'root', or pass --data DIR"
    if isinstance(error, duckdb.ConversionException):
        return (
            f"a value does not fit the type that the query asks for or that DuckDB guessed ({kind}): "
            "use try_cast, or read_csv('FILE', all_varchar = true)"
        )
    return f"the query fails ({kind}): run it in DuckDB to see why (its message may quote rows)"
