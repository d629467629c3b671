"""The plan: counted from the corpus before anything runs."""

import json
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from raylab.cli import main
from raylab.data.corpus import DOCUMENTS, TRAIN
from raylab.data.tokens import open_tokens
from raylab.job.designs import list_points
from raylab.runs.plan import plan_job, print_plan
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.trial import run_trial
from raylab.store.stages import FOLDER, read_info

SPACE = {
    "pretrain.objective": ["none", "mlm", "declutr"],
    "pretrain.declutr.max_span": [16, 24],
    "pretrain.declutr.num_anchors": {"low": 1, "high": 2},
}


def make_grid(make_job, space=SPACE, changes=None):
    search = {"design": "grid", "space": space, "seeds": [0, 1, 2]}
    return make_job("declutr", {"search": search, **(changes or {})})


def read_lengths(job, results):
    """Token counts of the documents and which of them train, read beside the plan."""
    preparation = prepare(job, results)
    store = open_tokens(results / FOLDER / make_spec(preparation, {}, 0, "fixed").tokens[DOCUMENTS])
    documents = preparation.split(0).open[DOCUMENTS]
    return store.lengths, documents["part"].to_numpy() == TRAIN, documents


def test_arms_and_trials_of_a_grid(make_job, results):
    job = make_grid(make_job)
    found = plan_job(job, results)
    points = list(list_points(job))
    assert len(points) == 2 + 4
    assert (found["arms"], found["trials"], found["trials_done"]) == (6, 18, 0)
    assert found["pretrainings"] == 5 * 3
    assert found["tokens"] == 15 * job.pretrain.num_tokens
    assert found["encoder_starts"] == 3
    assert [rate["objective"] for rate in found["rates"]] == ["mlm", "declutr"]
    # Each pre-training at each of its rungs, and the arm without one on each seed.
    assert found["evaluated_encoders"] == 15 * job.pretrain.rungs + 3
    assert found["cant_work"] == []
    assert found["disk_bytes"] > 0


@pytest.mark.parametrize("long_documents", ["truncate", "windows"])
def test_bytes_of_hidden_states_are_those_that_are_kept(long_documents, make_job, tmp_path):
    changes = {"evaluate.frozen_layers": ["all", "1", "none"], "evaluate.fine_tune": {"steps": 1}, "pretrain": None}
    changes |= {"pretrain.objective": "none", "corpus.long_documents": long_documents}
    job = make_job("mlm", changes)
    found = plan_job(job, tmp_path)
    run_trial(make_spec(prepare(job, tmp_path), {}, 0, "fixed"))
    [kept] = (tmp_path / FOLDER).glob("activations-*")
    assert found["state_bytes"] == read_info(kept)["bytes"] > 0
    assert plan_job(make_job("mlm", {"evaluate.frozen_layers": ["all", "none"]}), tmp_path)["state_bytes"] == 0


def test_arms_and_trials_of_a_search(make_job, results):
    search = {
        "design": "tpe", "num_arms": 10, "targets": [{"task": "severity"}], "seeds": [0, 1],
        "space": {"pretrain.learning_rate": {"low": 1e-5, "high": 1e-3}}, "confirm": {"top": 2, "seeds": [7, 8, 9]},
    }  # fmt: skip
    found = plan_job(make_job("mlm", {"search": search}), results)
    assert (found["arms"], found["trials"]) == (10, 10 * 2 + 3 * 3)
    assert found["tokens"] == 29 * 12_000
    assert found["encoder_starts"] == 5


@pytest.mark.parametrize(
    ("design", "space", "arms"),
    [
        ("one_factor", {"pretrain.objective": ["none", "declutr"], "pretrain.declutr.max_span": [16, 24, 512]}, 3),
        ("leave_one_out", {"pretrain.mlm.weight": [0.0], "pretrain.declutr.num_positives": [1]}, 3),
        ("factorial", {"pretrain.mlm.weight": [0.5], "pretrain.declutr.max_span": [16]}, 4),
    ],
)
def test_arms_and_trials_around_the_base(make_job, results, design, space, arms):
    found = plan_job(make_job("declutr", {"search": {"design": design, "space": space, "seeds": [0, 1]}}), results)
    assert (found["arms"], found["trials"]) == (arms, 2 * arms)
    assert found["pretrainings"] == 2 * (arms - (design == "one_factor"))  # one without pre-training
    assert len(found["cant_work"]) == (design == "one_factor")
    # The base arm's own span is among those counted.
    assert 24 in {row["settings"]["max_span"] for row in found["spans"]}


def test_equal_points_are_one_arm(make_job, results):
    space = {"evaluate.frozen_layers": ["all", ["all"]], "pretrain.learning_rate": [1e-4, 1e-3]}
    found = plan_job(make_grid(make_job, space), results)
    assert (found["arms"], found["trials"]) == (2, 6)


@pytest.mark.parametrize("short_documents", ["drop", "shrink"])
def test_documents_kept_and_spans_equal_a_direct_count(make_job, results, short_documents):
    changes = {"pretrain.declutr.short_documents": short_documents, "pretrain.declutr.min_span": 8}
    space = {"pretrain.objective": ["declutr", "metadata"], "pretrain.declutr.max_span": [24, 60],
             "pretrain.declutr.num_anchors": {"low": 1, "high": 2}}  # fmt: skip
    job = make_grid(
        make_job, space, {**changes, "pretrain.metadata.field": "category", "pretrain.batch_tokens": 2048}
    )  # fmt: skip
    rows = plan_job(job, results)["spans"]
    lengths, train, documents = read_lengths(job, results)
    categories = prepare(job, results).split(0).categories["category"]
    assert len(rows) == 4 * (1 + len(categories))
    seen = 0
    for row in rows:
        here = train.copy()
        if row["class"] is not None:
            column, _, value = row["class"].partition("=")
            assert column == "category"
            here &= documents["category"].to_numpy() == categories.index(value)
        anchors, longest = row["settings"]["num_anchors"], row["settings"]["max_span"]
        needed = 2 * anchors * (8 if short_documents == "shrink" else longest)
        kept = lengths[here & (lengths >= needed)]
        spans = np.minimum(longest, kept // (2 * anchors))
        assert row["documents"] == len(kept)
        assert row["share"] == pytest.approx(len(kept) / here.sum())
        assert row["shrunk"] == (spans < longest).sum()
        assert row["median_max_span"] == (np.median(spans) if len(spans) else 0)
        seen += len(kept)
    assert seen > 0
    by_class = [row["documents"] for row in rows if row["class"] and row["settings"] == rows[0]["settings"]]
    assert sum(by_class) == rows[0]["documents"]


def test_tables_and_their_classes_equal_a_direct_count(make_job, results):
    job = make_job("cross_entropy")
    rows = plan_job(job, results)["corpus"]
    lengths, train, documents = read_lengths(job, results)
    by_name = {(row["table"], row["class"]): row for row in rows}
    whole = by_name[DOCUMENTS, None]
    room = job.corpus.max_length - 2
    assert whole["rows"] == len(lengths)
    assert whole["counts"]["train"] == train.sum()
    assert whole["median_tokens"] == np.median(lengths)
    assert whole["rows_cut"] == pytest.approx((lengths > room).mean())
    assert whole["tokens_cut"] == pytest.approx(np.maximum(lengths - room, 0).sum() / lengths.sum())
    words = sum(len(text.split()) for text in documents["text"].to_pylist())
    assert whole["tokens_per_word"] == pytest.approx(lengths.sum() / words)
    for table, column in ((DOCUMENTS, "category"), ("severity", "label")):
        split = prepare(job, results).split(0)
        names = split.categories["category"] if table == DOCUMENTS else split.classes["severity"]
        codes = split.open[table][column].to_numpy()
        assert [by_name[table, f"{column}={name}"]["rows"] for name in names] == list(np.bincount(codes))
    assert (
        sum(row["counts"]["train"] for row in rows if row["table"] == "severity" and row["class"])
        == (by_name["severity", None]["counts"]["train"])
    )


def test_settings_that_can_not_work_are_listed(make_job, results):
    space = {"pretrain.declutr.max_span": [16, 24, 512], "pretrain.declutr.min_span": [8, 20]}
    found = plan_job(make_grid(make_job, space), results)
    assert (found["arms"], found["trials"]) == (4 - 1, 3 * 3)
    assert len(found["cant_work"]) == 3
    assert sum("corpus.max_length" in line for line in found["cant_work"]) == 2
    assert sum("min_span (20)" in line for line in found["cant_work"]) == 1
    notes = {(r["settings"]["max_span"], r["settings"]["min_span"]): r["cant_work"] for r in found["spans"]}
    assert notes[16, 8] is notes[24, 8] is notes[24, 20] is None
    assert notes[16, 20] == "pretrain.declutr: min_span (20) must not exceed max_span (16)"
    assert "max_span" in notes[512, 8]


def test_spans_that_no_document_is_long_enough_for(make_job, results):
    changes = {"pretrain.declutr.min_document_length": 5000, "pretrain.declutr.short_documents": "drop"}
    found = plan_job(make_grid(make_job, {"pretrain.objective": ["declutr"]}, changes), results)
    assert [row["cant_work"] for row in found["spans"]] == ["no training document has 5000 tokens"]


def test_a_search_lists_spans_that_break_a_rule(make_job, results):
    search = {
        "design": "random", "num_arms": 3, "targets": [{"task": "severity"}],
        "space": {"pretrain.declutr.max_span": [16, 512]},
    }  # fmt: skip
    spans = plan_job(make_job("declutr", {"search": search}), results)["spans"]
    assert spans[0]["cant_work"] is None
    assert "pretrain.declutr.max_span: 512" in spans[1]["cant_work"]


def test_the_command(tiny_job, notes, tmp_path, capsys):
    """JSON, quick the second time, and no text of a note in it."""
    raw = tiny_job | {
        "pretrain": {**tiny_job["pretrain"], "objective": "declutr", "declutr": {"max_span": 24, "min_span": 8}},
        "search": {"design": "grid", "space": {"pretrain.declutr.max_span": [16, 24]}},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    texts = pq.read_table(notes / "notes.parquet")["text"].to_pylist()
    pieces = {" ".join(text.split()[i : i + 3]) for text in texts for i in range(0, len(text.split()) - 3, 3)}
    for turn, form in enumerate(("json", "json", "table")):
        started = time.perf_counter()
        with pytest.raises(SystemExit) as end:
            main(["plan", str(path), "--results", str(tmp_path / "results"), "--format", form])
        assert end.value.code == 0
        if turn:
            assert time.perf_counter() - started < 5
        printed = capsys.readouterr()
        if form == "json":
            found = json.loads(printed.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            assert found["arms"] == 2
        flat = " ".join((printed.out + printed.err).split())
        assert not [piece for piece in pieces if piece in flat]
    assert not (tmp_path / "results" / "tiny").exists()


def test_the_table_shows_what_can_not_work(make_job, results):
    from rich.console import Console

    console = Console(width=200, record=True)
    space = {"pretrain.declutr.max_span": [16, 512]}
    print_plan(plan_job(make_grid(make_job, space), results), console)
    text = console.export_text()
    assert "1 arms, 3 trials" in text
    assert "can't work: pretrain.declutr.max_span: 512" in text
