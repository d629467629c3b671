"""Corpus hygiene on made-up notes: what was planted is found, what was not is not, and no text comes out."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from raylab.cli import main
from raylab.data.checks import DEFINITIONS, MAX_IDS
from raylab.data.tokens import open_tokens
from raylab.job.jobs import dump_yaml
from raylab.results.queries import query, summarise_jobs
from raylab.results.tables import read_rows, table_path
from raylab.runs.hygiene import CORPUS, check_corpus, keep_hygiene
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job
from raylab.store.stages import FOLDER

NUM_NOTES = 240
PARTS = ["train"] * 7 + ["validation"] * 2 + ["test"]
# In every note: words that nothing but a note's text has.
SENTINEL = re.compile(r"zq\d+q")


def write_notes(plant=None):
    """Notes of 40 words, two a group; the label is in words all over the text. `plant` changes the columns."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, NUM_NOTES)
    words = rng.integers(0, 200, (NUM_NOTES, 40))
    telling = rng.random(words.shape) < 0.12
    words = np.where(telling, 200 + 30 * labels[:, None] + words % 30, words)
    columns = {
        "note_id": [f"note-{row}" for row in range(NUM_NOTES)],
        "text": [[f"zq{word}q" for word in row] for row in words],
        "patient": [f"p{row // 2}" for row in range(NUM_NOTES)],
        "part": [PARTS[row // 2 % 10] for row in range(NUM_NOTES)],
        "grade": ["high" if label else "low" for label in labels],
    }
    if plant is not None:
        plant(columns)
    return columns


@pytest.fixture
def check(make_job, results, tmp_path):
    """`check(plant)`: the rows of `hygiene` by check, split and class, of the task; and the job."""

    def make(plant=None, changes=None):
        columns = write_notes(plant)
        table = pa.table({name: [" ".join(v) if name == "text" else v for v in c] for name, c in columns.items()})
        pq.write_table(table, tmp_path / "planted.parquet")
        source = {"path": str(tmp_path / "planted.parquet"), "text": "text", "id": "note_id", "group": "patient"}
        corpus = {
            "documents": source,
            "tasks": {"condition": None, "severity": None, "grade": {**source, "label": "grade"}},
            "split": {"column": "part", "train": None, "validation": None, "test": None},
        }
        job = make_job("mlm", {"name": "planted", "evaluate.tasks": ["grade"], "corpus": corpus, **(changes or {})})
        preparation = prepare(job, results)
        rows = check_corpus(preparation, make_spec(preparation, {}, 0, "fixed"))
        return {(r["check_name"], r["split"], r["class"]): r for r in rows if r["table_name"] == "grade"}, rows, job

    return make


def in_part(columns, part):
    return [row for row, name in enumerate(columns["part"]) if name == part]


def test_clean_notes_have_no_problem(check):
    found, rows, _ = check()
    assert {row["check_name"] for row in rows} == set(DEFINITIONS)
    about_text = [row for row in rows if row["check_name"] not in ("cut", "split_words")]  # of a tiny tokenizer
    assert [row for row in about_text if row["verdict"] != "ok"] == []
    assert found["groups", "train+validation", None]["evidence"]["effective_groups"] == pytest.approx(0.9 * 120)
    # The task's rows are those of the documents: what is found in the texts alone is the same.
    assert len(rows) > len(found) > len(DEFINITIONS)


def test_planted_duplicates_are_counted_on_each_side(check):
    names = {}

    def plant(columns):
        train, validation, test = (in_part(columns, part) for part in ("train", "validation", "test"))
        text = columns["text"]
        text[test[0]] = [word.upper() + "," for word in text[train[0]]]
        text[test[1]] = text[train[0]]
        text[validation[3]] = text[train[5]]
        text[train[9]] = text[train[8]]
        names.update(test=test, train=train, validation=validation)

    found, _, _ = check(plant)

    def ids(part, places):
        return [f"note-{names[part][place]}" for place in places]

    row = found["duplicates", "train/test", None]
    assert (row["num_rows"], row["evidence"]["rows_train"], row["evidence"]["pairs"]) == (2, 1, 2)
    assert (row["row_ids"], row["num_checked"], row["verdict"]) == (ids("test", [0, 1]), 24, "problem")
    row = found["duplicates", "train/validation", None]
    assert (row["row_ids"], row["verdict"]) == (ids("validation", [3]), "problem")
    assert found["duplicates", "validation/test", None]["num_rows"] == 0
    assert found["duplicates", "train", None]["row_ids"] == ids("train", [9])
    assert found["duplicates", "test", None]["row_ids"] == ids("test", [1])
    assert all(row["num_rows"] == 0 for key, row in found.items() if key[0] == "near_duplicates")


def test_planted_near_duplicates_are_counted_on_each_side(check):
    """One word of 40 replaced: a Jaccard of 35 / 41; two far apart: 32 / 44, under the limit."""

    def plant(columns):
        train, test = in_part(columns, "train"), in_part(columns, "test")
        text = columns["text"]
        text[test[0]] = [*text[train[0]][:20], "zq999q", *text[train[0]][21:]]
        text[test[1]] = [*text[train[0]][:15], "zq999q", *text[train[0]][16:]]
        text[test[2]] = [*text[train[2]][:10], "zq999q", *text[train[2]][11:30], "zq999q", *text[train[2]][31:]]

    found, _, _ = check(plant)
    row = found["near_duplicates", "train/test", None]
    assert (row["num_rows"], row["evidence"]["rows_train"], row["evidence"]["pairs"]) == (2, 1, 2)
    assert row["evidence"]["complete"]
    assert row["verdict"] == "problem"
    assert found["near_duplicates", "train/validation", None]["num_rows"] == 0
    assert found["duplicates", "train/test", None]["num_rows"] == 0


def test_planted_boilerplate_is_found_in_rows_groups_and_words(check):
    planted = []

    def plant(columns):
        planted[:] = [*in_part(columns, "train")[:20], *in_part(columns, "validation")[:4]]
        for row in [*planted, *in_part(columns, "test")]:
            columns["text"][row] = [*columns["text"][row], *(f"zq{word}q" for word in range(500, 512))]

    found, _, _ = check(plant)
    row = found["shared_text", "train+validation", None]
    assert row["num_rows"] == 24
    assert row["evidence"] == {"more_than_groups": 5, "groups": 12, "runs": 3, "rows_over_half": 0}
    assert row["value"] == pytest.approx(24 * 12 / (216 * 40 + 24 * 12))
    assert set(row["row_ids"]) <= {f"note-{note}" for note in planted}
    assert len(row["row_ids"]) == MAX_IDS


def test_a_group_that_dominates_a_table_and_a_class_is_found(check):
    def plant(columns):
        for row in in_part(columns, "train"):
            if columns["grade"][row] == "high":
                columns["patient"][row] = "one"

    found, _, _ = check(plant)
    whole = found["groups", "train+validation", None]
    high, low = (found["groups", "train+validation", f"label={grade}"] for grade in ("high", "low"))
    assert high["share"] == high["value"] > 0.5 > whole["value"] > 0.3
    assert (high["verdict"], whole["verdict"], low["verdict"]) == ("problem", "look", "ok")
    assert whole["evidence"]["big_groups"] == 1
    assert whole["num_rows"] == high["num_rows"]


def test_a_heading_that_gives_the_label_away_is_found(check):
    def plant(columns):
        for row, grade in enumerate(columns["grade"]):
            columns["text"][row] = ["zq700q", f"zq{[701, 702][grade == 'high']}q", *columns["text"][row]]

    found, _, _ = check(plant)
    assert found["opening_words", "validation", None]["verdict"] == "problem"
    assert found["one_word", "train+validation", "label=high"]["verdict"] == "problem"


def test_a_label_that_is_one_words_presence_is_found(check):
    """The issue's known answer: hygiene says so, and names no word."""

    def plant(columns):
        columns["grade"][:] = ["high" if "zq7q" in text else "low" for text in columns["text"]]

    found, _, _ = check(plant)
    for grade in ("high", "low"):
        row = found["one_word", "train+validation", f"label={grade}"]
        assert (row["verdict"], row["value"], row["share"]) == ("problem", 1.0, 1.0)
    assert found["opening_words", "validation", None]["verdict"] == "ok"


def test_rows_cut_and_words_split_equal_the_token_store(check, results):
    found, _, job = check()
    row = found["cut", "train+validation", None]
    spec = make_spec(prepare(job, results), {}, 0, "fixed")
    lengths = open_tokens(results / FOLDER / spec.tokens["grade"]).lengths
    room = job.corpus.max_length - 2
    assert row["num_rows"] == (lengths > room).sum()
    assert row["value"] == pytest.approx(np.maximum(lengths - room, 0).sum() / lengths.sum())
    by_class = [found["cut", "train+validation", f"label={grade}"]["num_rows"] for grade in ("high", "low")]
    assert sum(by_class) == row["num_rows"]
    split = found["split_words", "train+validation", None]
    assert split["evidence"]["tokens_per_word"] == pytest.approx(lengths.sum() / (40 * len(lengths)))
    windows, _, _ = check(changes={"corpus.long_documents": "windows"})
    assert windows["cut", "train+validation", None]["num_rows"] == row["num_rows"]
    assert windows["cut", "train+validation", None]["verdict"] == "ok"
    assert found["unknown_tokens", "train+validation", None]["num_rows"] == 0  # of a byte-level tokenizer


def test_test_texts_change_nothing_but_the_duplicates(check):
    def plant(columns):
        for row in in_part(columns, "test"):
            columns["text"][row] = [f"zq{word}q" for word in range(800, 840)]

    before, _, _ = check()
    after, _, _ = check(plant)
    assert after["duplicates", "test", None]["num_rows"] == 23
    for key, row in before.items():
        if "test" not in key[1]:
            assert after[key] == row, key


def test_stages_serve_again_and_a_changed_limit_counts_tokens_alone(check, monkeypatch):
    first, _, _ = check()
    for name in ("check_texts", "check_labels"):
        monkeypatch.setattr("raylab.runs.hygiene." + name, lambda *given: pytest.fail("made again"))
    again, _, _ = check(changes={"corpus.max_length": 32})
    assert again["cut", "train+validation", None]["value"] > first["cut", "train+validation", None]["value"]


def test_the_table_is_written_once_and_mended(check, tmp_path):
    _, rows, job = check()
    keep_hygiene(tmp_path, job.name, rows)
    path = table_path(tmp_path, job.name, "hygiene", CORPUS)
    before = path.stat().st_ino
    keep_hygiene(tmp_path, job.name, rows)
    assert path.stat().st_ino == before
    keep_hygiene(tmp_path, job.name, rows[1:])
    assert len(read_rows(tmp_path, job.name, "hygiene", CORPUS)) == len(rows) - 1
    asked = "select check_name, evidence->>'effective_groups' as groups from hygiene where check_name = 'groups'"
    assert {row["check_name"] for row in query(tmp_path, asked).to_pylist()} == {"groups"}


def test_a_run_writes_the_table_and_mends_it(check, tmp_path):
    """Beside the trials, and no trial of its own for `status`, ranking or resuming."""
    _, rows, job = check(changes={"pretrain.rungs": 1, "pretrain.num_tokens": 2000})

    def run():
        return run_job(job, tmp_path / "run", SweepProgress(Console(quiet=True)), here=True).states

    assert run() == {"complete": 1}
    written = read_rows(tmp_path / "run", job.name, "hygiene", CORPUS)
    assert [row["value"] for row in written] == [row["value"] for row in rows]
    assert [json.loads(row["row_ids"]) for row in written] == [row["row_ids"] for row in rows]
    assert [row["arms"] for row in summarise_jobs(tmp_path / "run")] == [1]
    path = table_path(tmp_path / "run", job.name, "hygiene", CORPUS)
    path.write_bytes(path.read_bytes()[:-20])
    assert run() == {}  # nothing is left to run
    assert read_rows(tmp_path / "run", job.name, "hygiene", CORPUS) == written


def test_limits_make_the_verdict(check):
    found, _, _ = check()
    for row in found.values():
        limits = DEFINITIONS[row["check_name"]]
        assert limits.look_above < limits.problem_above
        assert (row["look_above"], row["problem_above"]) == (limits.look_above, limits.problem_above)
        wanted = (
            "problem" if row["value"] > limits.problem_above else "look" if row["value"] > limits.look_above else "ok"
        )
        assert row["verdict"] == wanted
        assert row["share"] == pytest.approx(row["num_rows"] / max(row["num_checked"], 1))
        assert len(row["row_ids"]) == min(row["num_rows"], MAX_IDS)


def test_no_text_comes_out(check, tmp_path, capsys):
    """Notes with all of it planted: no word of them in the rows, the stages, the table, the plan or what is printed."""

    def plant(columns):
        train, test = in_part(columns, "train"), in_part(columns, "test")
        columns["text"][test[0]] = columns["text"][train[0]]
        columns["grade"][:] = ["high" if "zq7q" in text else "low" for text in columns["text"]]
        for row in range(NUM_NOTES):
            columns["text"][row] = [*columns["text"][row], *(f"zq{word}q" for word in range(500, 520))]

    _, rows, job = check(plant)
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    folder = tmp_path / "results"
    for form in ("json", "table"):
        with pytest.raises(SystemExit) as end:
            main(["plan", str(tmp_path / "job.yaml"), "--results", str(folder), "--format", form])
        assert end.value.code == 0
        printed = capsys.readouterr()
        assert not SENTINEL.search(printed.out + printed.err)
        assert "one_word" in printed.out
        if form == "json":
            assert json.loads(printed.out)["hygiene"] == rows
    keep_hygiene(folder, job.name, rows)
    files = [*folder.glob(f"{FOLDER}/hygiene-*/*"), *folder.glob("planted/hygiene/*")]
    assert len(files) >= 4
    for path in files:
        assert not SENTINEL.search(path.read_bytes().decode("latin-1"))
    cells = pq.read_table(table_path(folder, job.name, "hygiene", CORPUS)).to_pylist()
    assert len(cells) == len(rows)
    assert not SENTINEL.search(yaml.safe_dump(cells))
