"""Sources: every format gives the same table, and no problem line shows what a row says."""

import csv
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylab.data.sources import read_source
from raylab.job.blocks import Table, Task

MARKER = "SECRETPATIENT"
ROWS = [
    {"note": 1, "text": 'first\nline, "quoted"', "patient": 10, "kind": "nursing", "part": "train"},
    {"note": 2, "text": f"{MARKER} é", "patient": 10, "kind": None, "part": "train"},
    {"note": 3, "text": " \u00a0\n", "patient": 11, "kind": "nursing", "part": "test"},
    {"note": 4, "text": None, "patient": 11, "kind": "radiology", "part": "test"},
    {"note": 5, "text": "NA", "patient": 12, "kind": "radiology", "part": "test"},
]
EXPECTED = {
    "id": ["1", "2", "5"],
    "text": [ROWS[0]["text"], ROWS[1]["text"], "NA"],
    "group": ["10", "10", "12"],
    "kind": ["nursing", None, "radiology"],
    "part": ["train", "train", "test"],
}
COUNTS = {"rows_read": 5, "empty_text": 2, "rows": 3}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def write_parts(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir()
    write_parquet(path / "part-1.parquet", rows[2:])
    # pandas makes a float column where a part has nulls: the group must come out the same.
    write_parquet(path / "part-0.parquet", [row | {"patient": float(row["patient"])} for row in rows[:2]])
    (path / "_SUCCESS").write_text("")
    (path / ".part-9.parquet.crc").write_text("x")
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "notes.csv": write_csv,
    "notes.csv.gz": write_csv,
    "notes.jsonl": write_jsonl,
    "notes.ndjson": write_jsonl,
    "notes.parquet": write_parquet,
    "saved": write_saved,
    "parts": write_parts,
}


def read(table: Table, *categories: str) -> tuple[pa.Table, dict[str, int]]:
    problems: list[str] = []
    result, counts = read_source(table, "corpus.documents", categories=categories, problems=problems)
    assert problems == []
    assert result is not None
    assert set(result.schema.types) == {pa.large_string()}
    return result, counts


def refuse(table: Table, *categories: str) -> list[str]:
    problems = ["an earlier one"]
    result, counts = read_source(table, "corpus.tasks.kind", categories=categories, problems=problems)
    assert result is None
    assert counts == {}
    assert problems.pop(0) == "an earlier one"
    assert problems
    for line in problems:
        assert line.startswith("corpus.tasks.kind")
        assert MARKER not in line
        assert "\n" not in line
    return problems


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_table(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, ROWS)
    result, counts = read(Table(path=str(path), text="text", id="note", group="patient"), "kind", "part")
    assert result.to_pydict() == EXPECTED
    assert counts == COUNTS


@pytest.mark.parametrize("name", ["notes.csv", "notes.jsonl", "notes.parquet"])
def test_sql_over_every_format_gives_the_same_table(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    # Wrong order on purpose: rows of a query come by id.
    sql = f"with n as (from '{name}') select * from n order by note desc;"
    result, counts = read(Table(sql=sql, root=str(tmp_path), text="text", id="note", group="patient"), "kind", "part")
    assert result.to_pydict() == EXPECTED
    assert counts == COUNTS


def test_rows_are_numbered_without_an_id(tmp_path: Path) -> None:
    path = write_parts(tmp_path / "parts", ROWS)
    result, _ = read(Table(path=str(path), text="text"))
    assert result.column_names == ["id", "text"]
    assert result["id"].to_pylist() == ["0", "1", "4"]


def test_label_may_also_be_the_group(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a", "group": 1}])
    result, _ = read(Task(path=str(path), text="text", group="group", label="group"), "group")
    assert result.to_pydict() == {"id": ["0"], "text": ["a"], "group": ["1"]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, 2, None], pa.uint8()), ["1", "2", None]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([1.0, -2.0, math.nan]), ["1", "-2", None]),
        (pa.array([1, 2, None]).cast(pa.decimal128(30, 2)), ["1", "2", None]),
        (pa.array([0, 1, None], pa.int32()).cast(pa.date32()), ["1970-01-01", "1970-01-02", None]),
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", None]),
        (pa.array(["a", "", None], pa.string_view()), ["a", None, None]),
        (pa.nulls(3), [None, None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_categories_become_strings(tmp_path: Path, values: pa.Array, expected: list[str | None]) -> None:
    text = pa.array(["x", "y", "z"]).dictionary_encode()
    pq.write_table(pa.table({"text": text, "kind": values}), tmp_path / "a.parquet")
    result, _ = read(Table(path=str(tmp_path / "a.parquet"), text="text"), "kind")
    assert result.to_pydict() == {"id": ["0", "1", "2"], "text": ["x", "y", "z"], "kind": expected}


def test_csv_values_are_taken_as_written(tmp_path: Path) -> None:
    # A guess from the first rows would make 0389 a number and fail at V290; HADM_ID is how pandas writes nulls.
    rows = [{"TEXT": f"note {row}", "HADM_ID": f"{row}.0", "ICD9_CODE": "0389"} for row in range(1000)]
    rows += [{"TEXT": "last", "HADM_ID": "", "ICD9_CODE": "V290"}]
    path = write_csv(tmp_path / "a.csv", rows)
    result, _ = read(Table(path=str(path), text="TEXT"), "HADM_ID", "ICD9_CODE")
    assert result["ICD9_CODE"].to_pylist() == ["0389"] * 1000 + ["V290"]
    assert result["HADM_ID"].to_pylist() == [str(row) for row in range(1000)] + [None]


def test_long_records_and_late_types_of_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "long " * 500_000, "kind": None}, {"text": "b", "kind": "2101-01-02"}]
    result, _ = read(Table(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), text="text"), "kind")
    assert result["kind"].to_pylist() == [None, "2101-01-02"]
    assert len(result["text"][0].as_py()) == 2_500_000


def test_saved_dataset_with_class_label(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "kind": [1, 0, -1, 1]}, features=features)
    data.select([3, 2, 1]).save_to_disk(tmp_path / "saved")
    result, _ = read(Table(path=str(tmp_path / "saved"), text="text", format="hf"), "kind")
    assert result.to_pydict() == {"id": ["0", "1", "2"], "text": ["d", "c", "b"], "kind": ["yes", None, "no"]}


def test_saved_splits_are_joined_by_name(tmp_path: Path) -> None:
    splits = {"train": ROWS[2:], "test": ROWS[:2]}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    data.save_to_disk(tmp_path / "saved")
    result, counts = read(Table(path=str(tmp_path / "saved"), text="text", id="note", group="patient"), "kind", "part")
    assert result.to_pydict() == EXPECTED
    assert counts == COUNTS


def write_mimic(root: Path) -> None:
    """Files shaped like MIMIC-III's; the values are made up."""
    notes = [
        (
            174,
            22532,
            167853,
            "2151-08-04",
            "Discharge summary",
            "Report",
            "",
            f'Admission Date: [**x**]\n\n"{MARKER}", 71',
        ),
        (175, 13702, 107527, "2118-06-14", "Discharge summary", "Report", "", "Short of breath.\nHome, stable"),
        (176, 13702, 107527, "2118-06-14", "Nursing", "Report", "", "not a summary"),
        (177, 13702, 196489, "2124-08-18", "Discharge summary", "Report", "1", "entered in error"),
        (178, 26880, 135453, "2162-03-25", "Discharge summary", "Addendum", "", "no code of this stay"),
    ]
    codes = [
        (1, 22532, 167853, 1, "0389"),
        (2, 22532, 167853, 2, "4019"),
        (3, 13702, 107527, 2, "4019"),
        (4, 13702, 107527, 1, "V290"),
        (5, 13702, 196489, 1, "4019"),
    ]
    note_names = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CATEGORY", "DESCRIPTION", "ISERROR", "TEXT")
    code_names = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "SEQ_NUM", "ICD9_CODE")
    write_csv(root / "NOTEEVENTS.csv", [dict(zip(note_names, note, strict=True)) for note in notes])
    write_csv(root / "DIAGNOSES_ICD.csv", [dict(zip(code_names, code, strict=True)) for code in codes])


MIMIC = """
select n.ROW_ID, n.SUBJECT_ID, TEXT, ICD9_CODE
from 'NOTEEVENTS.csv' n join 'DIAGNOSES_ICD.csv' d using (HADM_ID)
where SEQ_NUM = 1 and CATEGORY = 'Discharge summary' and ISERROR is null
"""


def test_mimic_notes_joined_to_primary_diagnoses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mimic(tmp_path)
    expected = {
        "id": ["174", "175"],
        "text": [f'Admission Date: [**x**]\n\n"{MARKER}", 71', "Short of breath.\nHome, stable"],
        "group": ["22532", "13702"],
        "ICD9_CODE": ["0389", "V290"],
    }
    columns: dict[str, Any] = {"text": "TEXT", "id": "ROW_ID", "group": "SUBJECT_ID", "label": "ICD9_CODE"}
    result, counts = read(Task(sql=MIMIC, root=str(tmp_path), **columns), "ICD9_CODE")
    assert result.to_pydict() == expected
    assert counts == {"rows_read": 2, "empty_text": 0, "rows": 2}
    monkeypatch.chdir(tmp_path)
    assert read(Task(sql=MIMIC, **columns), "ICD9_CODE")[0].to_pydict() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DIAGNOSES_ICD.csv", "NOTEEVENTS.csv"]


def test_files_of_the_current_folder_do_not_stand_in_for_those_of_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    write_mimic(tmp_path)
    write_csv(tmp_path / "here" / "NOTEEVENTS.csv", [{"a": 1}])
    monkeypatch.chdir(tmp_path / "here")
    (line,) = refuse(Table(sql="select TEXT from 'NOTEEVENTS.csv'", root=str(tmp_path), text="TEXT"))
    assert "would be read from the current folder" in line


# Query, start of the problem, what it says.
QUERIES = {
    "syntax": ("selec TEXT", ".sql: Parser Error: syntax error", "correct the query"),
    "column": ("select NOPE from 'NOTEEVENTS.csv'", '.sql: Binder Error: Referenced column "NOPE"', "correct"),
    "table": ("select TEXT from nope", ".sql: Catalog Error: Table with name nope does not exist", "correct"),
    "no file": ("select TEXT from 'nope.csv'", ".sql: no file matches 'nope.csv'", "--data DIR"),
    "conversion": ("select cast(TEXT as int) as TEXT from 'NOTEEVENTS.csv'", ".sql: a value does not fit", "try_cast"),
    "own error": ("select error(TEXT) as TEXT from 'NOTEEVENTS.csv'", ".sql: the query fails", "run it in DuckDB"),
    "no header": ("select a.x as TEXT from 'bare.csv' a", ".sql: ", "query"),
    "two": ("select 1; select 2", ".sql: must be one select statement", ""),
    "none": ("-- nothing", ".sql: must be one select statement", ""),
    "writes": ("copy (select 1) to 'out.csv'", ".sql: must be one select statement", ""),
    "install": ("install httpfs", ".sql: must be one select statement", ""),
    "download": ("select TEXT from 'https://localhost:9/a.csv'", ".sql: ", "query"),
    "missing": ("select TEXT as note from 'NOTEEVENTS.csv'", ".text: the query has no column 'TEXT'", "columns: note"),
    "twice": ("select TEXT, DESCRIPTION as text from 'NOTEEVENTS.csv'", ".text: the query has 2 columns", "rename"),
    "no rows": ("select TEXT from 'NOTEEVENTS.csv' where ROW_ID = 0", ": the query has no rows", "correct the query"),
    "not UTF-8": ("select column0 as TEXT from read_csv('latin.csv', header = false)", ".sql: ", "DuckDB"),
}


@pytest.mark.parametrize("case", QUERIES)
def test_wrong_queries_are_refused(tmp_path: Path, case: str) -> None:
    write_mimic(tmp_path)
    (tmp_path / "bare.csv").write_text(f"1,{MARKER} x\n2,{MARKER} y\n")
    (tmp_path / "latin.csv").write_bytes(f"{MARKER} \xe9\n".encode("latin1") * 3)
    sql, start, says = QUERIES[case]
    (line,) = refuse(Table(sql=sql, root=str(tmp_path), text="TEXT"))
    assert line.startswith("corpus.tasks.kind" + start)
    assert says in line
    assert not (tmp_path / "out.csv").exists()


def test_wrong_roots_are_refused(tmp_path: Path) -> None:
    (line,) = refuse(Table(sql="select 1", root=str(tmp_path / "nope"), text="TEXT"))
    assert ".root: " in line
    assert "--data DIR" in line
    (tmp_path / "a,b").mkdir()
    (line,) = refuse(Table(sql="select 1", root=str(tmp_path / "a,b"), text="TEXT"))
    assert "comma" in line


def text(value: str) -> bytes:
    return value.encode()


GOOD = f"note,text,patient,kind\n1,{MARKER} a,10,x\n2,{MARKER} b,11,y\n"
# File name, its bytes (or rows for parquet), settings of the table, start of the problem, what it says.
FILES: dict[str, tuple[str, Any, dict[str, Any], str, list[str]]] = {
    "missing path": ("", None, {"path": "nope.csv"}, ".path: ", ["does not exist", "--data DIR"]),
    "ending": ("a.txt", text(GOOD), {}, ".path: a.txt", [".ndjson", "give 'format'"]),
    "zero bytes": ("a.csv", b"", {}, ".path: ", ["empty (0 bytes)"]),
    "header only": ("a.csv", b"note,text\n", {"id": None}, ": ", ["has no rows"]),
    "column": ("a.csv", text(GOOD), {"text": "TXT"}, ".text: ", ["'text'", "columns: note, text, patient, kind"]),
    "case": ("a.csv", text(GOOD), {"text": "TEXT"}, ".text: ", ["no column 'TEXT', nearest is 'text'"]),
    "no header": ("a.csv", text(f"7,{MARKER},x\n8,b,y\n"), {}, ".text: ", ["is the header row missing?"]),
    "text header": ("a.csv", text(f'id,"{MARKER}\nx",y\n8,b,y\n'), {}, ".text: ", ["is the header row missing?"]),
    "column twice": (
        "a.csv",
        text(f"note,text,text\n1,{MARKER},b\n"),
        {},
        ".path: ",
        ["no column name is there twice"],
    ),
    "fields": ("a.csv", text(GOOD + f"3,{MARKER},1,2,3\n"), {}, ".path: ", ["row 4", "as many fields"]),
    "open quote": ("a.csv", text(GOOD + f'3,"{MARKER},1,2\n'), {}, ".path: ", ["quotes are closed"]),
    "not UTF-8": ("a.csv", text(GOOD) + b"3,\xff,1,x\n4,\xff,2,x\n", {}, ".text: ", ["2 rows that are not UTF-8"]),
    "group not UTF-8": ("a.csv", text(GOOD) + b"3,a,\xff,x\n", {"group": "patient"}, ".group: ", ["1 rows that are"]),
    "numeric text": ("a.csv", text(GOOD), {"text": "patient"}, ".text: ", ["of type int64"]),
    "repeated ids": ("a.csv", text(GOOD + "2,c,1,x\n2,d,1,x\n"), {}, ".id: ", ["2 rows repeat", "'note'"]),
    "null ids": ("a.csv", text(GOOD + ",c,1,x\n"), {}, ".id: ", ["null in 1 rows"]),
    "null groups": (
        "a.csv",
        text(GOOD + "3,c,,x\n4,d,,x\n"),
        {"group": "patient"},
        ".group: ",
        ["2 rows", "leave out"],
    ),
    "blank": ("a.csv", b'note,text\n1,\n2," "\n', {}, ".text: ", ["empty in every row"]),
    "jsonl": ("a.jsonl", text(f'{{"text": "{MARKER}"}}\n{{"text": "{MARKER}\n'), {}, ".path: ", ["one JSON object"]),
    "mixed jsonl": ("a.jsonl", text(f'{{"text": 1}}\n{{"text": "{MARKER}"}}\n'), {}, ".path: ", ["all of one type"]),
    "jsonl not UTF-8": ("a.jsonl", b'{"text": "a\xff"}\n', {"id": None}, ".text: ", ["1 rows that are not UTF-8"]),
    "corrupt parquet": ("a.parquet", text(GOOD), {}, ".path: ", ["cannot be read as parquet"]),
    "not saved": ("a.csv", text(GOOD), {"format": "hf"}, ".path: ", ["cannot be read as hf", "save_to_disk"]),
    "bytes": ("a.parquet", [{"text": MARKER.encode()}], {"id": None}, ".text: ", ["of type binary"]),
    "list text": ("a.parquet", [{"text": [MARKER]}], {"id": None}, ".text: ", ["of type list"]),
    "float kind": ("a.parquet", [{"text": MARKER, "kind": 0.5}], {"id": None, "label": "kind"}, ".label: ", ["double"]),
    "list kind": (
        "a.parquet",
        [{"text": MARKER, "kind": [MARKER]}],
        {"id": None, "label": "kind"},
        ".label: ",
        ["list"],
    ),
    "keys": ("a.jsonl", text(f'{{"text": "a", "k": {{"{MARKER}": 1}}}}\n'), {"id": None, "group": "k"}, ".group: ", []),
    "text as id": ("a.csv", text(GOOD), {"id": "text"}, ".id: ", ["is the text column"]),
    "clash": ("a.parquet", [{"text": "a", "group": "b"}], {"id": None, "label": "group"}, ".label: ", ["rename it"]),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, settings, start, says = FILES[case]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content:
        write_parquet(Path(name), content)
    settings = {"path": name, "text": "text", "id": "note"} | settings
    table = Task(**settings) if "label" in settings else Table(**settings)
    lines = refuse(table, *([settings["label"]] if "label" in settings else []))
    line = next(line for line in lines if line.startswith("corpus.tasks.kind" + start))
    for word in says:
        assert word in line


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS)
    lines = refuse(Task(path=str(path), text="TEXT", id="nte", group="patients", label="Kind"), "Kind", "prt")
    near = {"text": "text", "id": "note", "group": "patient", "label": "kind"}
    assert [line.split(": ")[0].rsplit(".")[-1] for line in lines] == ["text", "id", "group", "label", "kind"]
    for line, name in zip(lines, [*near.values(), "part"], strict=True):
        assert f"nearest is '{name}'" in line
    rows = [*ROWS, ROWS[0] | {"patient": None}]
    lines = refuse(Table(path=str(write_csv(tmp_path / "b.csv", rows)), text="text", id="note", group="patient"))
    assert [line.split(": ")[0] for line in lines] == ["corpus.tasks.kind.id", "corpus.tasks.kind.group"]


def test_folders_hold_one_format(tmp_path: Path) -> None:
    table = Table(path=str(tmp_path), text="text", id="note")
    assert "no files" in refuse(table)[0]
    write_csv(tmp_path / "a.csv", ROWS)
    (tmp_path / "README.md").write_text(MARKER)
    assert "not .csv, .md: give 'format'" in refuse(table)[0]
    assert "holds no parquet files" in refuse(table.model_copy(update={"format": "parquet"}))[0]
    assert read(table.model_copy(update={"format": "csv"}))[1] == COUNTS
    # A column that one part lacks would otherwise be read as nulls.
    write_csv(tmp_path / "b.csv", [{"note": 9, "TEXT": MARKER}])
    assert "b.csv has no column 'text'" in refuse(table.model_copy(update={"format": "csv"}))[0]


def test_a_saved_dataset_that_is_corrupt_is_refused(tmp_path: Path) -> None:
    write_saved(tmp_path / "saved", ROWS)
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_text(MARKER)
    assert "cannot be read as hf" in refuse(Table(path=str(tmp_path / "saved"), text="text"))[0]
