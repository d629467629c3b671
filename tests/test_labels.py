"""Tasks of every form: columns of 0 and 1, lists, separated strings, tables of their own; refusals; a whole job."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from raylab.base.mistakes import JobError
from raylab.data.corpus import (
    DOCUMENTS,
    TEST,
    TRAIN,
    VALIDATION,
    SplitCorpus,
    open_rows,
    read_corpus,
    split_corpus,
    store_corpus,
)
from raylab.data.labels import MAX_CLASSES, MAX_NAME, pack_labels, to_array
from raylab.data.synth import write_notes
from raylab.encoders.unseal import unseal_job
from raylab.evaluation.draws import draw_shots
from raylab.job.blocks import Corpus, Task
from raylab.job.jobs import check_job, dump_yaml, load_job
from raylab.job.settings import dump_job, list_settings, resolve_target
from raylab.measures.scores import MAX_CLASSES as MAX_SCORED
from raylab.results.queries import open_tables, read_cell
from raylab.results.repair import repair_job
from raylab.results.tables import list_trials, read_rows, table_path, write_rows
from raylab.runs.plan import plan_job
from raylab.runs.preparation import check_target_classes, name_point, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS = 120
SETS = [[], ["a"], ["a", "b"], ["b", "c"], ["c"]]  # of row i: SETS[i % 5]
TEXTS = [f"note {i}" for i in range(NUM_ROWS)]
BASE = {"text": TEXTS, "id": [f"n{i}" for i in range(NUM_ROWS)], "group": [str(i // 2) for i in range(NUM_ROWS)]}


def write(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        pq.write_table(table, path)
    return path


def make_corpus(path: Path, task: dict[str, Any], documents: Path | None = None, **split: Any) -> Corpus:
    table = {"path": str(path), "text": "text", "group": "group"}
    if task.get("sql"):
        del table["path"]
    return Corpus.model_validate_json(
        json.dumps(
            {
                "documents": {"path": str(documents or path), "text": "text", "group": "group"},
                "tasks": {"kind": table | task},
                "split": {"train": 0.6, "validation": 0.2, "test": 0.2} | split,
            }
        )
    )


def split(corpus: Corpus, fields: tuple[str, ...] = (), seed: int = 0) -> SplitCorpus:
    return split_corpus(read_corpus(corpus, fields), corpus, fields, seed)


def refuse(corpus: Corpus) -> list[str]:
    with pytest.raises(JobError) as caught:
        split(corpus)
    return caught.value.problems


def read_labels(found: SplitCorpus) -> dict[str, list[int]]:
    """Text -> its codes, of all parts."""
    tables = [found.open["kind"], found.sealed["kind"]]
    return {
        text: codes.tolist()
        for table in tables
        for text, codes in zip(table["text"].to_pylist(), to_array(table["label"]), strict=True)
    }


EXPECTED = {text: [int(name in SETS[i % 5]) for name in "abc"] for i, text in enumerate(TEXTS)}


# Forms


@pytest.mark.parametrize("form", ["int", "bool", "float", "True", "csv", "csv words", "csv floats"])
def test_columns_of_0_and_1_in_any_form(tmp_path, form):
    make = {
        "int": int, "bool": bool, "float": float, "True": lambda value: str(bool(value)),
        "csv": int, "csv words": bool, "csv floats": lambda value: f"{float(value):.1f}",
    }[form]  # fmt: skip
    path = tmp_path / ("notes.csv" if form.startswith("csv") else "notes.parquet")
    columns = {name: [make(EXPECTED[text][i]) for text in TEXTS] for i, name in enumerate("abc")}
    found = split(make_corpus(write(path, **BASE, **columns), {"label": ["a", "b", "c"]}))
    assert found.classes == {"kind": ["a", "b", "c"]}
    assert read_labels(found) == EXPECTED


@pytest.mark.parametrize("form", ["parquet", "jsonl", "sql", "separated", "separated csv", "numbers", "hf"])
def test_one_column_of_lists_or_separated_strings(tmp_path, form):
    sets = [SETS[i % 5] for i in range(NUM_ROWS)]
    task: dict[str, Any] = {"label": "kinds", "multi_label": True}
    names, path = ["a", "b", "c"], tmp_path / "notes.parquet"
    if form.startswith("separated"):
        path = tmp_path / ("notes.csv" if "csv" in form else "notes.parquet")
        write(path, **BASE, kinds=[";" if not labels else " ; ".join(reversed(labels)) for labels in sets])
        task["separator"] = ";"
    elif form == "numbers":
        names = ["1", "2", "3"]
        write(path, **BASE, kinds=[["abc".index(label) + 1 for label in labels] for labels in sets])
    elif form == "hf":
        import datasets

        classes = datasets.Sequence(datasets.ClassLabel(names=["c", "b", "a"]))
        features = datasets.Features({**dict.fromkeys(BASE, datasets.Value("string")), "kinds": classes})
        rows = BASE | {"kinds": [["cba".index(label) for label in labels] for labels in sets]}
        path = tmp_path / "saved"
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    else:
        path = write(tmp_path / ("notes.jsonl" if form == "jsonl" else "notes.parquet"), **BASE, kinds=sets)
    if form == "sql":
        task |= {"sql": "select * from 'notes.parquet'", "root": str(tmp_path), "id": "id"}
    found = split(make_corpus(path, task, documents=path))
    assert found.classes == {"kind": names}
    assert read_labels(found) == EXPECTED


def test_null_is_not_known_and_an_empty_list_is_none_of_them(tmp_path):
    lists = [None if i % 10 == 0 else SETS[i % 5] for i in range(NUM_ROWS)]
    found = split(
        make_corpus(write(tmp_path / "a.parquet", **BASE, kinds=lists), {"label": "kinds", "multi_label": True})
    )
    assert read_labels(found) == {text: EXPECTED[text] for i, text in enumerate(TEXTS) if i % 10}
    assert found.counts["kind"]["unlabelled"] == NUM_ROWS // 10
    strings = ["" if labels is None else ";" if not labels else ";".join(labels) for labels in lists]
    task = {"label": "kinds", "multi_label": True, "separator": ";"}
    assert read_labels(split(make_corpus(write(tmp_path / "a.csv", **BASE, kinds=strings), task))) == read_labels(found)

    columns = {
        "a": [None if i % 4 == 0 else EXPECTED[text][0] for i, text in enumerate(TEXTS)],
        "b": [None if i % 6 == 0 else EXPECTED[text][1] for i, text in enumerate(TEXTS)],
    }
    found = split(make_corpus(write(tmp_path / "b.parquet", **BASE, **columns), {"label": ["a", "b"]}))
    assert found.counts["kind"]["unlabelled"] == sum(i % 12 == 0 for i in range(NUM_ROWS))
    expected = {
        text: [-1 if columns[name][i] is None else columns[name][i] for name in "ab"]
        for i, text in enumerate(TEXTS)
        if i % 12
    }
    assert read_labels(found) == expected


@pytest.mark.parametrize("label", ["kind", ["a", "b", "c"], "kinds"])
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_of_labels_gives_what_columns_give(tmp_path, label, ending):
    """Joined by id, in another order, with rows too many and rows too few."""
    kinds = ["xyz"[i % 3] for i in range(NUM_ROWS)]
    sides = {name: [EXPECTED[text][i] for text in TEXTS] for i, name in enumerate("abc")}
    joined = [",".join(SETS[i % 5]) or "," for i in range(NUM_ROWS)]
    columns = {"kind": kinds, **sides, "kinds": joined}
    task: dict[str, Any] = {"multi_label": True, "separator": ","} if label == "kinds" else {}
    write(tmp_path / "notes.parquet", **BASE)
    shuffled = np.random.default_rng(0).permutation(NUM_ROWS)[:-20].tolist()
    ids = [f"n{i}" for i in shuffled] + ["nobody", "nothing"]
    gold = {name: [values[i] for i in shuffled] + values[:2] for name, values in columns.items()}
    write(tmp_path / f"gold.{ending}", name=ids, **gold)
    labels = {"path": str(tmp_path / f"gold.{ending}"), "id": "name", "label": label}
    found = split(make_corpus(tmp_path / "notes.parquet", task | {"id": "id", "labels": labels}))
    whole = split(make_corpus(write(tmp_path / "whole.parquet", **BASE, **columns), task | {"label": label}))
    coded = {f"note {i}" for i in shuffled}
    assert read_labels(found) == {text: codes for text, codes in read_labels(whole).items() if text in coded}
    assert found.classes == whole.classes
    counts = found.counts["kind"]
    assert (counts["without_gold"], counts["unlabelled"], counts["gold_without_text"]) == (20, 20, 2)


def test_a_table_of_labels_by_sql(tmp_path):
    write(tmp_path / "notes.parquet", **BASE)
    write(tmp_path / "codes.csv", note=[f"n{i}" for i in range(NUM_ROWS) for _ in SETS[i % 5]],
          code=[code for i in range(NUM_ROWS) for code in SETS[i % 5]])  # fmt: skip
    sql = "select note, list(code) as codes from 'codes.csv' group by note"
    labels = {"sql": sql, "root": str(tmp_path), "id": "note", "label": "codes"}
    found = split(make_corpus(tmp_path / "notes.parquet", {"id": "id", "multi_label": True, "labels": labels}))
    assert read_labels(found) == {text: codes for text, codes in EXPECTED.items() if any(codes)}


# Which labels are kept


def test_labels_come_from_training_rows_and_need_both_sides(tmp_path):
    """By a split column: `rare` has too few, `late` none in training, `always` no other side."""
    part = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    lists = [["always", "b"], ["always", "b", "rare"], *[["always"]] * 6, ["late"], ["b"], ["b", "late"], []]
    path = write(tmp_path / "a.parquet", text=TEXTS[:12], group=list("abcdefghijkl"), kinds=lists, part=part)
    corpus = Corpus.model_validate_json(
        json.dumps(
            {
                "documents": {"path": str(path), "text": "text", "group": "group"},
                "tasks": {
                    "kind": {
                        "path": str(path), "text": "text", "group": "group", "label": "kinds", "multi_label": True,
                        "min_class_size": 2,
                    }
                },
                "split": {"column": "part"},
            }
        )
    )  # fmt: skip
    found = split(corpus)
    assert found.classes == {"kind": ["b"]}
    assert found.counts["kind"]["labels_left_out"] == 3
    assert read_labels(found) == {text: [int("b" in labels)] for text, labels in zip(TEXTS, lists, strict=False)}


def test_rows_that_know_only_labels_left_out_are_left_out(tmp_path):
    columns = {"a": [i % 2 for i in range(NUM_ROWS)], "one": [1 if i % 3 == 0 else None for i in range(NUM_ROWS)]}
    columns["a"] = [None if i % 6 == 0 else value for i, value in enumerate(columns["a"])]
    found = split(make_corpus(write(tmp_path / "a.parquet", **BASE, **columns), {"label": ["a", "one"]}))
    assert found.classes == {"kind": ["a"]}
    counts = found.counts["kind"]
    assert (counts["labels_left_out"], counts["unlabelled"], counts["rare_or_unseen_class"]) == (1, 0, NUM_ROWS // 6)
    assert counts["train"] + counts["validation"] + counts["test"] == NUM_ROWS - NUM_ROWS // 6


def test_no_group_is_on_two_sides_and_test_labels_change_nothing(tmp_path):
    sets = [SETS[i % 5] for i in range(NUM_ROWS)]
    task = {"label": "kinds", "multi_label": True}
    base = split(make_corpus(write(tmp_path / "a.parquet", **BASE, kinds=sets), task))
    sides: dict[int, set[int]] = {}
    for table in (*base.open.values(), *base.sealed.values()):
        for group, part in zip(table["group"].to_pylist(), table["part"].to_pylist(), strict=True):
            sides.setdefault(group, set()).add(part)
    assert {len(parts) for parts in sides.values()} == {1}
    hidden = set(base.sealed["kind"]["text"].to_pylist())
    changed = [["new", "c"] if text in hidden else labels for text, labels in zip(TEXTS, sets, strict=True)]
    other = split(make_corpus(write(tmp_path / "b.parquet", **BASE, kinds=changed), task))
    assert to_array(base.sealed["kind"]["label"]).tolist() != to_array(other.sealed["kind"]["label"]).tolist()
    assert other.digests == base.digests
    assert other.stored_digest == base.stored_digest
    assert other.open["kind"].equals(base.open["kind"])


@pytest.mark.parametrize("vary", [False, True])
def test_digests_see_labels_and_their_names(tmp_path, vary):
    sets = [SETS[i % 5] for i in range(NUM_ROWS)]
    task = {"label": "kinds", "multi_label": True}

    def digests(kinds: list[Any], **change: Any) -> dict[str, str]:
        path = write(tmp_path / "a.parquet", **BASE, kinds=kinds)
        return split(make_corpus(path, task | change, vary=vary)).digests

    base = digests(sets)
    assert digests([labels[::-1] for labels in sets]) == base
    first = next(i for i, text in enumerate(TEXTS) if text in split_texts(tmp_path, task, TRAIN))
    for other in (
        [["b"] if i == first and sets[i] != ["b"] else labels for i, labels in enumerate(sets)],
        [None if i == first else labels for i, labels in enumerate(sets)],
        [["z" if label == "c" else label for label in labels] for labels in sets],
    ):
        found = digests(other)
        assert found["kind"] != base["kind"]
        assert found[DOCUMENTS] == base[DOCUMENTS]
    # Of a split that varies, the rule counts; else only what it leaves.
    assert (digests(sets, min_class_size=2)["kind"] != base["kind"]) == vary


def split_texts(folder: Path, task: dict[str, Any], part: int) -> set[str]:
    table = split(make_corpus(folder / "a.parquet", task)).open["kind"]
    return {t for t, p in zip(table["text"].to_pylist(), table["part"].to_pylist(), strict=True) if p == part}


def test_the_store_keeps_labels_and_the_names_decide_its_digests(tmp_path):
    sets = [SETS[i % 5] for i in range(NUM_ROWS)]
    task = {"label": "kinds", "multi_label": True}
    found = split(make_corpus(write(tmp_path / "a.parquet", **BASE, kinds=sets), task))
    stage = store_corpus(tmp_path / "results", found)
    rows = open_rows(stage.path, "kind")
    assert rows["label"].dtype == np.int8
    assert rows["label"].tolist() == [EXPECTED[text] for text in found.open["kind"]["text"].to_pylist()]
    assert (rows["part"] < TEST).all()
    assert len(draw_shots(rows["label"], rows["group"], 2, seed=0, task="kind", draw=0)) >= 4
    renamed = [["z" if label == "c" else label for label in labels] for labels in sets]
    other = split(make_corpus(write(tmp_path / "b.parquet", **BASE, kinds=renamed), task))
    again = store_corpus(tmp_path / "results", other)
    assert again.info["digests"]["task:kind"] != stage.info["digests"]["task:kind"]


def test_labels_survive_slices_and_filters():
    codes = np.array([[1, 0], [-1, 1], [0, 0], [1, 1]], dtype=np.int8)
    table = pa.table({"label": pack_labels(codes)})
    assert to_array(table["label"]).tolist() == codes.tolist()
    assert to_array(table.slice(1, 2)["label"]).tolist() == codes[1:3].tolist()
    keep = [True, False, True, True]
    assert to_array(table.filter(pa.array(keep))["label"]).tolist() == codes[keep].tolist()
    both = pa.concat_tables([table, table.slice(2)])
    assert to_array(both["label"]).tolist() == [*codes.tolist(), *codes[2:].tolist()]


@pytest.mark.parametrize(("kinds", "found"), [("same", True), ("noisy", False), ("none", False)])
def test_a_field_that_is_one_of_the_labels_gives_it_away(tmp_path, kinds, found):
    ward = ["north" if i % 3 == 0 else "east" if i % 3 == 1 else "west" for i in range(NUM_ROWS)]
    north = [i % 3 == 0 for i in range(NUM_ROWS)]
    if kinds == "noisy":
        north = [i % 3 == 0 and i % 9 != 0 for i in range(NUM_ROWS)]
    elif kinds == "none":
        north = [i % 7 == 0 for i in range(NUM_ROWS)]
    columns = {"a": [i % 2 for i in range(NUM_ROWS)], "b": [int(value) for value in north], "ward": ward}
    corpus = make_corpus(write(tmp_path / "a.parquet", **BASE, **columns), {"label": ["a", "b"]})
    assert split(corpus, ("ward",)).supervised_by == ({"ward": "kind"} if found else {})
    assert split(corpus, ("a",)).supervised_by == {"a": "kind"}


# Refusals


def test_every_mistake_of_a_corpus_is_one_line_and_quotes_no_cell(tmp_path):
    secret = [f"secret {i}" for i in range(NUM_ROWS)]
    columns = {"words": secret, "lists": [[s] for s in secret], "zero": [0] * NUM_ROWS}
    path = write(tmp_path / "a.parquet", **BASE, **columns, longer=[f"{'x' * 300}{i % 2}" for i in range(NUM_ROWS)])
    ids = [f"n{i}" for i in range(NUM_ROWS - 1)]
    gold = {
        "twice": write(tmp_path / "twice.parquet", id=[*ids, "n0"], kind=list("xy") * (NUM_ROWS // 2)),
        "nulls": write(tmp_path / "nulls.parquet", id=[*ids, None], kind=list("xy") * (NUM_ROWS // 2)),
        "other": write(tmp_path / "other.parquet", id=[f"m{i}" for i in ids], kind=["x"] * len(ids)),
        "short": write(tmp_path / "short.parquet", id=ids, kind=["x"] * len(ids)),
    }
    table = {"path": str(path), "text": "text", "group": "group", "id": "id"}
    tasks: dict[str, Any] = {
        name: table | {"labels": {"path": str(p), "id": "id", "label": "kind"}} for name, p in gold.items()
    }
    tasks["short"]["labels"]["label"] = "knd"
    tasks["asis"] = table | {"labels": {"path": str(gold["short"]), "id": "id", "label": "id"}}
    tasks["gone"] = table | {"labels": {"path": str(tmp_path / "no.csv"), "id": "id", "label": "kind"}}
    tasks["sides"] = table | {"label": ["words", "zero"]}
    tasks["strings"] = table | {"label": "words", "multi_label": True}
    tasks["cut"] = table | {"label": "lists", "multi_label": True, "separator": ";"}
    tasks["single"] = table | {"label": "lists"}
    tasks["text"] = table | {"label": ["text", "zero"]}
    corpus = Corpus.model_validate_json(json.dumps({"documents": table, "tasks": tasks}))
    with pytest.raises(JobError) as caught:
        read_corpus(corpus, ())
    problems = caught.value.problems
    expected = [
        ("corpus.tasks.twice.labels.id", "1 rows repeat an id"),
        ("corpus.tasks.nulls.labels.id", "is null in 1 rows"),
        ("corpus.tasks.other.labels.id", f"none of its {NUM_ROWS - 1} ids is one of the {NUM_ROWS} texts'"),
        ("corpus.tasks.short.labels.label", "nearest is 'kind'"),
        ("corpus.tasks.asis.labels.label", "'id' is the id column"),
        ("corpus.tasks.gone.labels.path", "does not exist"),
        ("corpus.tasks.sides.label", f"{NUM_ROWS} values that are not 0, 1, true, false or empty"),
        ("corpus.tasks.strings.label", "give 'separator'"),
        ("corpus.tasks.cut.label", "leave out 'separator'"),
        ("corpus.tasks.single.label", "multi_label: true"),
        ("corpus.tasks.text.label", "'text' is the text column"),
    ]
    assert len(problems) == len(expected)
    for line, (place, rule) in zip(problems, expected, strict=True):
        assert line.startswith(place), line
        assert rule in line, line
        assert "secret" not in line
        assert "\n" not in line
    for label, rule in (("longer", f"of {MAX_NAME} characters"), ("zero", "a task needs two")):
        [problem] = refuse(make_corpus(path, {"label": label}))
        assert problem.startswith("corpus.tasks.kind.label: ")
        assert rule in problem
        assert "xxx" not in problem
    [problem] = refuse(make_corpus(path, {"label": ["zero"]}))
    assert "has no label with 1 or more training rows and one without it" in problem


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    ("number", "rule"), [(3 * MAX_CLASSES, f"a task has at most {MAX_CLASSES:,}"), (60, "under two rows a class")]
)
def test_a_text_column_given_as_label_is_refused(tmp_path, multi_label, number, rule):
    names = [str(i) for i in range(number)]
    words = [[f"secret {i}"] if multi_label else f"secret {i}" for i in range(number)]
    path = write(tmp_path / "a.parquet", text=[f"note {i}" for i in range(number)], group=names, summary=words)
    [problem] = refuse(make_corpus(path, {"label": "summary", "multi_label": multi_label}))
    assert rule in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("task", "rule"),
    [
        ({}, "needs exactly one of 'label'"),
        ({"label": "a", "labels": {"path": "b", "id": "i", "label": "l"}}, "needs exactly one of 'label'"),
        ({"labels": {"path": "b", "id": "i", "label": "l"}}, "'labels' needs 'id'"),
        ({"label": ["a", "a"]}, "names a column twice"),
        ({"label": ["a", "b"], "separator": ";"}, "'separator' is for one column"),
        ({"label": "a", "separator": ";"}, "'separator' needs 'multi_label: true'"),
        ({"label": []}, "at least 1 item"),
        ({"label": 3}, "valid string"),
        ({"id": "i", "labels": {"path": "b", "sql": "c", "id": "i", "label": "l"}}, "exactly one of 'path' and 'sql'"),
    ],
)
def test_a_wrong_task_is_refused(task, rule):
    with pytest.raises(ValidationError, match=rule):
        Task.model_validate_json(json.dumps({"path": "a.csv", "text": "t"} | task))


def test_mistakes_of_labels_in_a_job_are_named_by_their_place(make_job):
    changes = {
        "corpus.tasks.severity": {"label": [1, "b"]},
        "corpus.tasks.condition": {"label": None, "id": "note_id", "labels": {"pth": "a.csv", "id": "i", "label": "l"}},
    }
    with pytest.raises(JobError) as caught:
        make_job("mlm", changes)
    assert len(caught.value.problems) == 2
    assert any(line.startswith("corpus.tasks.severity.label.0: ") for line in caught.value.problems)
    assert any("did you mean 'path'?" in line for line in caught.value.problems)


@pytest.mark.parametrize("data", [None, "data"])
def test_paths_of_labels_start_at_their_job_file(tmp_path, tiny_job, data):
    tasks = {
        "a": {"path": "x/n.csv", "text": "t", "id": "i", "labels": {"path": "x/g.csv", "id": "i", "label": "l"}},
        "b": {"path": "n.csv", "text": "t", "id": "i", "labels": {"sql": "from 'g.csv'", "id": "i", "label": "l"}},
    }
    raw = tiny_job | {"corpus": {"documents": {"path": "n.csv", "text": "t"}, "tasks": tasks}, "evaluate": {}}
    (tmp_path / "job.yaml").write_text(json.dumps(raw))
    folder = tmp_path / data if data else None
    found = load_job(tmp_path / "job.yaml", data=folder).corpus.tasks
    assert found["a"].labels.path == str(folder / "g.csv" if folder else tmp_path / "x" / "g.csv")
    assert found["b"].labels.root == str(folder or tmp_path)


# Targets of a class


def target_job(make_job, **target: Any):
    return make_job("mlm", {"search.targets": [{"task": "severity", "metric": "f1_class", "shots": 2, **target}]})


def test_a_target_may_be_of_one_class(make_job, tmp_path):
    job = target_job(make_job, **{"class": "severe"})
    target = job.search.targets[0]
    assert resolve_target(job, target)["class"] == "severe"
    assert check_job(dump_job(job)) == job
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    assert load_job(tmp_path / "job.yaml").search.targets == job.search.targets
    assert name_point(prepare(job, tmp_path), {})
    with pytest.raises(
        JobError, match=r"search\.targets\.0\.class: 'sever' is no class of severity; did you mean 'sev"
    ):
        name_point(prepare(target_job(make_job, **{"class": "sever"}), tmp_path), {})


def test_a_class_of_too_many_is_no_target(make_job):
    classes = {"severity": ["severe", *map(str, range(MAX_SCORED))]}
    [problem] = check_target_classes(target_job(make_job, **{"class": "severe"}), classes)
    assert f"only up to {MAX_SCORED} are scored one by one" in problem
    classes["severity"].pop()
    assert not check_target_classes(target_job(make_job, **{"class": "severe"}), classes)


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ({}, "'f1_class' is of one class: name it"),
        ({"metric": "f1_macro", "class": "mild"}, "'f1_macro' is of all classes: leave it out"),
        ({"metric": "f1_clas", "class": "mild"}, "did you mean 'f1_class'?"),
        ({"clas": "mild"}, "did you mean 'class'?"),
        ({"metric": "calibration_error"}, "search.targets.0.mode: lower is better"),
    ],
)
def test_a_wrong_target_of_a_class_is_refused(make_job, target, rule):
    with pytest.raises(JobError) as caught:
        target_job(make_job, **target)
    assert len(caught.value.problems) == 1
    assert rule in caught.value.problems[0]


# A whole job


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """jobs/problems.yaml, made tiny, run here and unsealed; one target is of the class of most validation rows."""
    results, notes = (tmp_path_factory.mktemp(name) for name in ("problems", "many"))
    write_notes(notes, num_notes=300, max_words=60)
    changes = {
        "pretrain.num_tokens": 6000, "pretrain.rungs": 2, "pretrain.batch_tokens": 1024, "search.seeds": [0],
        "evaluate.draws": 2, "encoder.tokenizer.vocab_size": 400, "evaluate.shots": [2, "full"],
        "evaluate.retrieval": {"span": 16, "candidates": 8}, "corpus.max_length": 64,
        "search.space.pretrain.objective": {"choices": ["mlm", "none"]}, "pretrain.metadata": None,
        "search.targets": [
            {"task": "problems", "shots": 2, "metric": "average_precision"},
        ],
        "analysis": None,
    }  # fmt: skip
    found = prepare(load_job(ROOT / "jobs" / "problems.yaml", data=notes, overrides=changes), results).split(0)
    held_out = to_array(found.open["problems"]["label"])[found.open["problems"]["part"].to_numpy() == VALIDATION]
    name = found.classes["problems"][int((held_out == 1).sum(axis=0).argmax())]
    changes["search.targets"].append({"task": "problems", "shots": 2, "metric": "f1_class", "class": name})
    job = load_job(ROOT / "jobs" / "problems.yaml", data=notes, overrides=changes)
    run_job(job, results, SweepProgress(Console(quiet=True)), here=True)
    unseal_job(job, results, [], by="me", reason="test", tell=lambda line: None)
    return job, results


def test_a_multi_label_job_runs_to_its_end(ran):
    job, results = ran
    rows = list(list_trials(results, job.name))
    assert {(row["status"], row["error"]) for row in rows} == {("complete", None)}
    assert len(rows) == 4
    values = [json.loads(row["target_values"]) for row in rows if not row["arm"].startswith("baseline:")]
    assert all(len(found) == 2 and found[0] > 0 for found in values)


def test_its_scores_are_of_all_labels_and_of_each(ran):
    job, results = ran
    ask = open_tables(results).execute
    classes = prepare(job, results).split(0).classes["problems"]
    assert 10 < len(classes) <= 18
    found = ask("select distinct class from scores where class is not null order by 1").fetchall()
    assert [name for (name,) in found] == classes
    cells = "trial_id, rung, split, shots, probe, draw"
    assert ask(f"select min(n), max(n) from (select count(*) n from scores group by {cells})").fetchone() == (
        (10 + 5 * len(classes),) * 2
    )
    splits = ask("select distinct split from scores order by 1").fetchall()
    assert [name for (name,) in splits] == ["test", "validation"]
    # What confusions count is what scores say.
    there: Counter[Any] = Counter()
    right: Counter[Any] = Counter()
    for *cell, name, predicted, count in ask(f"select {cells}, class, predicted, count from confusions").fetchall():
        there[*cell, name] += count
        right[*cell, name] += count * (name == predicted)
    recalls = ask(f"select {cells}, class, value from scores where metric = 'recall_class' and value > 0").fetchall()
    assert len(recalls) > 50
    for *cell, name, value in recalls:
        assert right[*cell, name] / there[*cell, name] == pytest.approx(value)


def test_a_class_is_part_of_a_cell(ran):
    job, results = ran
    overall, one = (resolve_target(job, target) for target in job.search.targets)
    assert overall["class"] is None
    assert one["class"].startswith("problem_")
    for cell, target in ((overall, 0), (one, 1)):
        values = {(row.arm, row.seed): row.value for row in read_cell(results, job.name, "scores", cell)}
        assert len(values) == 4
        for row in list_trials(results, job.name):
            if not row["arm"].startswith("baseline:"):
                assert values[row["arm"], 0] == pytest.approx(json.loads(row["target_values"])[target])


def test_geometry_is_measured_and_takes_sets_of_labels_as_classes(ran):
    _, results = ran
    found = dict(open_tables(results).execute("select metric, count(value) from geometry group by 1").fetchall())
    assert found["uniformity"] > 0
    assert found["silhouette"] > 0


def test_the_plan_counts_labels_and_rows_without_gold(ran):
    job, results = ran
    rows = plan_job(job, results)["corpus"]
    [whole] = [row for row in rows if row["table"] == "problems" and row["class"] is None]
    counts = whole["counts"]
    assert counts["without_gold"] == counts["unlabelled"] > 0
    assert counts["gold_without_text"] == 0
    each = {row["class"]: row["counts"]["train"] for row in rows if row["table"] == "problems" and row["class"]}
    split_rows = prepare(job, results).split(0).open["problems"]
    labels = to_array(split_rows["label"])[split_rows["part"].to_numpy() == TRAIN]
    names = prepare(job, results).split(0).classes["problems"]
    assert each == {f"label={name}": int(count) for name, count in zip(names, labels.sum(axis=0), strict=True)}
    assert sum(each.values()) > counts["train"]


def test_settings_of_labels_are_in_the_tables(ran):
    job, results = ran
    [row] = (
        open_tables(results)
        .execute("select any_value(\"corpus.tasks\") from trials where arm not like 'b%'")
        .fetchall()
    )
    assert json.loads(row[0])["problems"]["labels"]["label"] == "problems"
    assert list_settings(job)["corpus.tasks"]["problems"]["multi_label"] is True


def test_confusions_that_are_gone_are_made_again(ran, tmp_path):
    """Of a trial of an older raylab, which wrote none, they are not missed."""
    job, results = ran
    shutil.copytree(results / job.name, tmp_path / job.name)
    rows = [row for row in list_trials(tmp_path, job.name) if not row["arm"].startswith("baseline:")]
    trial_id = rows[0]["trial_id"]
    assert repair_job(tmp_path, job.name) == []
    table_path(tmp_path, job.name, "confusions", trial_id).unlink()
    scores = read_rows(tmp_path, job.name, "scores", trial_id)
    write_rows(tmp_path, job.name, "scores", trial_id, [row for row in scores if row["class"] is None])
    assert repair_job(tmp_path, job.name) == []
    write_rows(tmp_path, job.name, "scores", trial_id, scores)
    assert repair_job(tmp_path, job.name) == [f"trial {trial_id}: rows of confusions are gone; it is measured again"]
