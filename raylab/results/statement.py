"""A person's SQL: settings without quotes, and which columns it needs, so that no others are read."""

import itertools
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import duckdb

_DOTTED = re.compile(rb"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def quote_settings(sql: str, settings: Collection[str]) -> str:
    """The SQL with dotted settings in quotes, which is how DuckDB takes a column with dots: `t."pretrain.rungs"`."""
    raw, known = sql.encode(), {name.lower(): name for name in settings}
    # In texts, comments and quotes nothing is changed. Places are in bytes.
    tokens = [(start, str(kind).rpartition(".")[2]) for start, kind in duckdb.tokenize(sql)]
    kept = [
        (start, end)
        for (start, kind), (end, _) in itertools.pairwise([*tokens, (len(raw), "")])
        if kind in ("string_const", "comment") or raw[start : start + 1] == b'"'
    ]

    def quote(match: re.Match[bytes]) -> bytes:
        if not any(start <= match.start() < end for start, end in kept):
            parts = match[0].decode(errors="replace").split(".")
            for start in range(len(parts) - 1):
                name = known.get(".".join(parts[start:]).lower())
                if name is not None:
                    return ".".join([*parts[:start], f'"{name}"']).encode()
        return match[0]

    return _DOTTED.sub(quote, raw).decode()


# What makes the columns of an answer depend on all that a table has.
_WHOLE = ("STAR", "PIVOT", "SHOW_REF", "TABLE_FUNCTION")


def list_columns(connection: duckdb.DuckDBPyConnection, sql: str) -> set[str] | None:
    """The names, in small letters, that may be columns which a query needs; None where it may need all.

    That is where it is no plain select, or has a star, a natural join, a pivot, renamed columns, a table as a value.
    """
    try:
        ((text,),) = connection.execute("select json_serialize_sql(?)", [sql]).fetchall()
    except duckdb.Error:
        return None
    tree = json.loads(text)
    if tree["error"]:
        return None
    words: set[str] = set()
    tables: set[str] = set()
    values: set[str] = set()
    for node in _walk(tree):
        if node.get("type") in _WHOLE or node.get("ref_type") in ("NATURAL", "POSITIONAL"):
            return None
        if node.get("column_name_alias"):
            return None
        names = [str(name).lower() for key in ("column_names", "using_columns") for name in node.get(key) or ()]
        words.update(names)
        if node.get("class") == "COLUMN_REF":
            values.add(names[-1])
        elif "class" not in node:  # a table, a subquery or a join
            tables |= {str(node[key]).lower() for key in ("alias", "table_name") if node.get(key)}
    return None if values & tables else words


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _walk(value)
