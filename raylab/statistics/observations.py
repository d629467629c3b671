"""Any table of scores: a row for each arm, seed and, where there are some, draw."""

import difflib
import math
from collections.abc import Callable
from json import loads
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylab.base.mistakes import JobError

# A column of more names than that is not one of arms: their texts are not shown either.
MOST_ARMS = 1000
# Rows that are named where their values are no numbers.
MOST_ROWS = 5


def _read_csv(path: Path, value: str) -> pa.Table:
    from pyarrow import csv

    # As text: of a column that is not all numbers, Arrow says no more than that.
    return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types={value: pa.string()}))


def _read_jsonl(path: Path, value: str) -> pa.Table:
    from pyarrow import json

    try:
        return json.read_json(path)
    except pa.ArrowInvalid:
        # A column of numbers and text, which Arrow refuses: lines as Python reads them, in which text stays text.
        rows = [loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        if value in columns:
            columns[value] = [cell if cell is None else str(cell) for cell in columns[value]]
        return pa.Table.from_pydict(columns)


# A file's ending -> how it is read, with the column of values. Not by pyarrow's datasets, which load pandas.
READERS: dict[str, Callable[[Path, str], pa.Table]] = {
    ".csv": _read_csv,
    ".parquet": lambda path, value: pq.ParquetFile(path).read(),
    ".jsonl": _read_jsonl,
}


def read_observations(
    path: Path, *, arm: str, seed: str, value: str, draw: str | None = None
) -> dict[str, dict[Any, dict[Any, float]]]:
    """Arm -> seed -> draw -> value, of a CSV, Parquet or JSON Lines file with such columns; else one draw.

    Raises JobError, in one line, for files and columns that are not there, values that are no finite numbers, empty
    keys and rows that repeat others. It quotes no cell.
    """
    if path.suffix not in READERS:
        raise JobError([f"{path}: not a table that can be read; use one of {', '.join(READERS)}"])
    try:
        table = READERS[path.suffix](path, value)
    except FileNotFoundError:
        raise JobError([f"{path}: is not there; correct the path"]) from None
    except (pa.ArrowException, OSError, ValueError, AttributeError):
        raise JobError([f"{path}: can't be read as {path.suffix.lstrip('.')}; check that it is such a file"]) from None
    columns = {"--arm": arm, "--seed": seed, "--value": value} | ({"--draw": draw} if draw else {})
    if problems := [_miss(table, option, name) for option, name in columns.items() if name not in table.column_names]:
        raise JobError(problems)
    if len(set(columns.values())) < len(columns):
        raise JobError(["--arm, --seed, --value and --draw must be columns of their own; name each once"])
    if not len(table):
        raise JobError([f"{path}: holds no rows; there is nothing to compare"])
    cells = {option: table[name].to_pylist() for option, name in columns.items()}
    for option in ("--arm", "--seed", *(["--draw"] if draw else [])):
        if empty := sum(cell is None or cell == "" for cell in cells[option]):
            raise JobError([f"{option} {columns[option]}: {empty} of {len(table)} rows have none; fill or remove them"])
    numbers = [_as_number(cell) for cell in cells["--value"]]
    if wrong := [row for row, number in enumerate(numbers, 1) if not math.isfinite(number)]:
        listed = ", ".join(map(str, wrong[:MOST_ROWS])) + (", ..." if len(wrong) > MOST_ROWS else "")
        raise JobError(
            [f"--value {value}: {len(wrong)} of {len(table)} rows hold no finite number, row{'s' * (len(wrong) > 1)} "
             f"{listed} (the first of the data is 1); write a number there, or remove those rows"]
        )  # fmt: skip
    arms = [str(cell) for cell in cells["--arm"]]
    if len(set(arms)) > MOST_ARMS:
        raise JobError([f"--arm {arm}: names {len(set(arms)):,} arms; name a column of at most {MOST_ARMS:,}"])
    found: dict[str, dict[Any, dict[Any, float]]] = {}
    repeated = 0
    for name, of_seed, of_draw, number in zip(
        arms, cells["--seed"], cells.get("--draw", [0] * len(table)), numbers, strict=True
    ):
        draws = found.setdefault(name, {}).setdefault(of_seed, {})
        repeated += of_draw in draws
        draws[of_draw] = number
    if repeated:
        fix = "keep one of each" if draw else "name what sets them apart with --draw, or keep one of each"
        keys = "arm, seed and draw" if draw else "arm and seed"
        raise JobError([f"{path}: {repeated} rows repeat the {keys} of another; {fix}"])
    return found


def _miss(table: pa.Table, option: str, name: str) -> str:
    near = difflib.get_close_matches(name, table.column_names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"columns: {', '.join(table.column_names[:20])}"
    return f"{option} {name}: no such column; {hint}"


def _as_number(cell: Any) -> float:
    """A cell as a number, also one that is written as text; NaN for what is none, and for truth values."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | str) or (isinstance(cell, str) and "_" in cell):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return math.nan
