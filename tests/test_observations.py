"""Tables of scores from elsewhere."""

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from raylab.base.mistakes import JobError
from raylab.statistics.observations import read_observations

ROWS = [
    {"model": model, "run": run, "fold": fold, "f1": 0.1 * run + 0.01 * fold, "name": f"{model}{run}"}
    for model in ("a", "b")
    for run in (0, 1)
    for fold in (0, 1)
]
COLUMNS = {"arm": "model", "seed": "run", "value": "f1", "draw": "fold"}


def write(folder, ending, rows=ROWS):
    path = folder / f"scores.{ending}"
    table = pa.Table.from_pylist(rows)
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif ending == "parquet":
        pq.write_table(table, path)
    else:
        pa.csv.write_csv(table, path)
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_a_table_is_read_by_its_ending(ending, tmp_path):
    found = read_observations(write(tmp_path, ending), **COLUMNS)
    assert found == {m: {r: {f: pytest.approx(0.1 * r + 0.01 * f) for f in (0, 1)} for r in (0, 1)} for m in ("a", "b")}


def test_without_draws_a_seed_has_one_value(tmp_path):
    found = read_observations(write(tmp_path, "csv", ROWS[::2]), arm="model", seed="run", value="f1")
    assert found["a"].keys() == {0, 1}
    assert list(found["a"][1].values()) == [pytest.approx(0.1)]


def change(row, **values):
    return [{**ROWS[0], **values}, *ROWS[1:]] if row else ROWS


@pytest.mark.parametrize(
    ("columns", "rows", "problem"),
    [
        ({"arm": "modle"}, ROWS, "--arm modle: no such column; did you mean 'model'?"),
        ({"value": "zzz"}, ROWS, "--value zzz: no such column; columns: model, run, fold, f1, name"),
        ({"seed": "model"}, ROWS, "must be columns of their own; name each once"),
        ({"value": "name"}, ROWS, "--value name: 8 of 8 rows hold no finite number"),
        ({}, change(True, f1=None), "--value f1: 1 of 8 rows hold no finite number"),
        ({}, change(True, f1=float("nan")), "--value f1: 1 of 8 rows hold no finite number"),
        ({}, change(True, f1=float("inf")), "--value f1: 1 of 8 rows hold no finite number"),
        ({}, change(True, run=None), "--seed run: 1 of 8 rows have none"),
        ({}, change(True, model=None), "--arm model: 1 of 8 rows have none"),
        ({"draw": None}, ROWS, "4 rows repeat the arm and seed of another; name what sets them apart with --draw"),
        ({}, [*ROWS, ROWS[0]], "1 rows repeat the arm, seed and draw of another; keep one of each"),
        ({"arm": "name", "draw": None}, [{**r, "name": f"secret {i}"} for i, r in enumerate(ROWS * 200)],
         "--arm name: names 1,600 arms"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_in_one_line_without_its_cells(columns, rows, problem, tmp_path):
    with pytest.raises(JobError) as refused:
        read_observations(write(tmp_path, "parquet", rows), **{**COLUMNS, **columns})
    [line] = refused.value.problems
    assert problem in line
    assert "secret" not in line


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "broken.parquet").write_text("secret")
    (tmp_path / "broken.jsonl").write_text("{secret")
    (tmp_path / "empty.csv").write_text("")
    for name, problem in {
        "missing.csv": "is not there",
        "scores.xlsx": "not a table that can be read; use one of .csv, .parquet, .jsonl",
        "broken.parquet": "can't be read as parquet",
        "broken.jsonl": "can't be read as jsonl",
        "empty.csv": "can't be read as csv",
    }.items():
        with pytest.raises(JobError) as refused:
            read_observations(tmp_path / name, **COLUMNS)
        [line] = refused.value.problems
        assert problem in line
        assert "secret" not in line
    (tmp_path / "head.csv").write_text("model,run,fold,f1\n")
    with pytest.raises(JobError, match="holds no rows"):
        read_observations(tmp_path / "head.csv", **COLUMNS)
