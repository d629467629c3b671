"""Summaries: what `status` reads from a file's footer is what the file's row says."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylab.results.queries import summarise_jobs
from raylab.results.summary import COLUMNS, KEY, TIMES, encode_summary, read_summary
from raylab.results.tables import SCHEMAS, read_trial, table_path, write_rows

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
ROW: dict[str, Any] = {
    "job": "study", "trial_id": "a-0", "arm": "a", "seed": 0, "phase": "fixed", "status": "failed", "rung": 1,
    "num_rungs": 2, "wall_seconds": 1.5, "error": "it broke", "started_at": START,
    "updated_at": START + timedelta(seconds=9),
}  # fmt: skip


def write(results: Path, row: dict[str, Any]) -> Path:
    write_rows(results, "study", "trials", "a-0", [row])
    return table_path(results, "study", "trials", "a-0")


# Lengths around 128 and 16,384 need another byte each; the key itself may stand in a cell.
ERRORS = st.one_of(
    st.none(), st.text(max_size=300), st.integers(0, 20_000).map("x".__mul__), st.just(f'{KEY} {{"arm": 1}} PAR1')
)


@given(
    error=ERRORS,
    seconds=st.one_of(st.none(), st.floats(0, 1e9)),
    at=st.datetimes(datetime(1980, 1, 1), datetime(2200, 1, 1)),
)
@settings(max_examples=60, deadline=None)
def test_the_summary_is_what_the_row_says(
    tmp_path_factory: pytest.TempPathFactory, error: str | None, seconds: float | None, at: datetime
) -> None:
    results = tmp_path_factory.mktemp("results")
    row = ROW | {"error": error, "wall_seconds": seconds, "updated_at": at.replace(tzinfo=UTC)}
    path = write(results, row)
    found, kept = read_summary(path), read_trial(results, "study", "a-0")
    assert found is not None
    assert kept is not None
    times = {n: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=found[n]) for n in TIMES}
    assert found | times == {name: kept[name] for name in COLUMNS}
    # Arrow finds it in the footer too.
    assert json.loads(pq.read_metadata(path).metadata[KEY.encode()]) == json.loads(encode_summary(row))


def test_files_without_a_summary_are_read_by_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path, ROW)
    (tmp_path / "study" / "job.yaml").write_text("name: study")
    with_summary = summarise_jobs(tmp_path)
    pq.write_table(pa.Table.from_pylist([ROW], schema=SCHEMAS["trials"]), path)
    assert read_summary(path) is None
    assert summarise_jobs(tmp_path) == with_summary
    assert with_summary[0]["failed"] == 1
    assert with_summary[0]["last_error"] == "it broke"


def test_a_file_cut_anywhere_has_no_summary(tmp_path: Path) -> None:
    path = write(tmp_path, ROW)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert read_summary(path) is None
