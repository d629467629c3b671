"""Tables of scores from elsewhere."""

import json

import pyarrow as pa
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
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(",".join(map(str, cells)) for cells in (rows[0], *(row.values() for row in rows))))
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
        ({"value": "name"}, ROWS, "--value name: 8 of 8 rows hold no finite number, rows 1, 2, 3, 4, 5, ... (the"),
        ({}, change(True, f1=None), "--value f1: 1 of 8 rows hold no finite number, row 1 (the first of the data is 1"),
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


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_text_among_the_values_is_named_by_its_rows_without_it(ending, tmp_path):
    """Also behind the first megabyte, by which Arrow takes a column for numbers."""
    rows = [{"model": m, "run": run, "fold": 0, "f1": 0.001 * run} for m in "ab" for run in range(40_000)]
    path = write(tmp_path, ending, rows)
    assert read_observations(path, **COLUMNS)["a"][7] == {0: pytest.approx(0.007)}
    for row, text in ((3, "n/a"), (70_000, "-"), (70_001, "secret"), (70_003, "True"), (79_999, "1_0")):
        rows[row - 1]["f1"] = text
    rows[70_001]["f1"] = "" if ending == "csv" else None
    write(tmp_path, ending, rows)
    with pytest.raises(JobError) as refused:
        read_observations(path, **COLUMNS)
    assert refused.value.problems == [
        "--value f1: 6 of 80000 rows hold no finite number, rows 3, 70000, 70001, 70002, 70003, ... (the first of the "
        "data is 1); write a number there, or remove those rows"
    ]


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
