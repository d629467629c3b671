"""What is looked at often of a trial, kept in the footer of its file of `trials`, where it is read without Arrow."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# For `status`, the judgement of early stopping, and queries over arms and seeds.
COLUMNS = (
    "job", "trial_id", "arm", "phase", "seed", "status", "rung", "num_rungs", "rung_values", "measures",
    "data_digest", "wall_seconds", "error", "started_at", "updated_at",
)  # fmt: skip
TIMES = ("started_at", "updated_at")
# Not ASCII, as all values are: no value can hold it.
KEY = "raylab\u00b7summary"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def encode_summary(row: Mapping[str, Any]) -> str:
    """The columns of a row of `trials` as ASCII JSON; times in microseconds since 1970."""
    values: dict[str, Any] = {name: row.get(name) for name in COLUMNS}
    for name in TIMES:
        if values[name] is not None:
            values[name] = (values[name] - _EPOCH) // timedelta(microseconds=1)
    return json.dumps(values)


def read_whole(path: Path) -> bytes:
    """A file's bytes, with half of the calls that `Path.read_bytes` makes: with thousands of files that is noticed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        left = os.fstat(descriptor).st_size
        data = os.read(descriptor, left)
        while len(data) < left and (more := os.read(descriptor, left - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary in a file of `trials`; None where an older raylab wrote none, or the file is cut short."""
    data = read_whole(path)
    values = find_note(data, KEY) if data.endswith(b"PAR1") else None
    return values if isinstance(values, dict) and values.keys() == set(COLUMNS) else None


def find_note(data: bytes, key: str) -> Any:
    """The JSON value that a Parquet footer holds under a key; None where there is none, or it is cut short.

    To parse the whole footer, a hundred columns, takes ten times as long: with thousands of trials that is noticed.
    The footer is Thrift's compact form: behind the key stand a type byte, the value's length in groups of seven bits,
    lowest first, and the value. Nothing behind the key can hold it again, hence the last one in the file is it.
    """
    encoded = key.encode()
    start = data.rfind(encoded)
    if start < 0:
        return None
    place, length, shift = start + len(encoded) + 1, 0, 0
    try:
        while True:
            length |= (data[place] & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if data[place - 1] < 0x80:
                break
        return json.loads(data[place : place + length])
    except (IndexError, ValueError):
        return None
