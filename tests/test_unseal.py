"""Opening the test split of a tiny job that ran in this process."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer

from raylab.base.mistakes import JobError
from raylab.data.corpus import TRAIN
from raylab.data.tokens import TokenStore, Vocabulary, open_tokens
from raylab.encoders.unseal import unseal_job
from raylab.evaluation.draws import draw_shots
from raylab.measures.scores import compute_scores, list_confusions
from raylab.results.queries import query
from raylab.results.ranking import list_cells, rank_arms
from raylab.results.tables import list_trials, read_rows
from raylab.runs.preparation import make_spec, name_point, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job
from raylab.store.stages import FOLDER, read_info
from raylab.training.embedding import embed
from raylab.training.encoder import load_encoder

NONE, MLM = ({"pretrain.objective": objective} for objective in ("none", "mlm"))


def run_here(job, folder):
    run_job(job, folder, SweepProgress(Console(quiet=True)), here=True)


def unseal(job, folder, arms=(), reason="paper", by="me"):
    return unseal_job(job, folder, list(arms), by=by, reason=reason, tell=lambda line: None)


@pytest.fixture(scope="module")
def job(make_job):
    search = {"design": "grid", "space": {"pretrain.objective": ["none", "mlm"]}, "seeds": [0, 1]}
    return make_job("mlm", {"name": "sealed", "search": search, "pretrain.num_tokens": 4096, "pretrain.rungs": 1})


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """The job's results before and after two accesses: all of them, then one arm."""
    folder = tmp_path_factory.mktemp("sealed")
    run_here(job, folder)
    before = digest_tables(folder)
    trials = unseal(job, folder)
    arm, _ = name_point(prepare(job, folder), NONE)
    again = unseal(job, folder, [arm], reason="once more", by="you")
    return folder, before, trials, arm, again


def digest_tables(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("sealed/*/*.parquet")
    }


def test_all_ranked_trials_are_scored(finished, job):
    folder, _, trials, arm, again = finished
    rows = [row for row in list_trials(folder, job.name) if not row["arm"].startswith("baseline:")]
    assert sorted(trials) == sorted(row["trial_id"] for row in rows)
    assert len(trials) == 4
    assert sorted(again) == [f"{arm}-0", f"{arm}-1"]
    for row in list_trials(folder, job.name):
        scores = read_rows(folder, job.name, "scores", row["trial_id"], ".test")
        validation = read_rows(folder, job.name, "scores", row["trial_id"])
        assert {score["split"] for score in scores} == {"test"}
        assert {score["rung"] for score in scores} == {row["num_rungs"]}
        # The same cells as on validation, from the same numbers of training rows.
        cells = [
            {tuple(s[k] for k in ("task", "shots", "frozen_layers", "probe", "draw", "metric", "num_train")) for s in t}
            for t in (scores, [s for s in validation if s["rung"] == row["num_rungs"]])
        ]
        assert cells[0] == cells[1]
    assert len(list(list_trials(folder, job.name))) == 4 + 2 * 2


def test_every_access_is_recorded(finished, job):
    folder, _, trials, arm, _ = finished
    rows = query(folder, 'select trial_id, "by", reason, "at" from unseals order by "at", trial_id').to_pylist()
    seen = [(row["trial_id"], row["by"], row["reason"]) for row in rows]
    baselines = [f"baseline:{name}-{seed}" for name in ("majority", "tfidf") for seed in (0, 1)]
    assert seen[:8] == [(trial, "me", "paper") for trial in sorted([*trials, *baselines])]
    assert seen[8:] == [(trial, "you", "once more") for trial in sorted([f"{arm}-0", f"{arm}-1", *baselines])]
    assert rows[0]["at"] < rows[8]["at"]


def test_what_was_there_is_untouched(finished):
    folder, before, _, _, _ = finished
    after = digest_tables(folder)
    assert {path: after[path] for path in before} == before
    new = {path for path in after.keys() - before.keys()}
    assert all(path.parent.name == "unseals" or path.name.endswith(".test.parquet") for path in new)
    assert not any(path.name.endswith(".test.parquet") or path.parent.name == "unseals" for path in before)


def test_scores_of_the_untrained_encoder_equal_a_direct_computation(finished, job):
    folder, _, _, arm, _ = finished
    preparation = prepare(job, folder)
    spec = make_spec(preparation, NONE, 1, "fixed")
    assert spec.arm == arm
    split, root = preparation.split(1), folder / FOLDER
    [stage] = {r["stage_id"] for r in read_rows(folder, job.name, "stages", spec.trial_id) if r["kind"] == "pretrain"}
    model, _ = load_encoder(str(root / stage / "encoder"))
    model.eval()
    vocabulary = Vocabulary(**read_info(root / spec.tokenizer))
    options = {"max_length": 64, "long_documents": "truncate"}

    tokenizer = AutoTokenizer.from_pretrained(root / spec.tokenizer)
    sealed, opened = split.sealed["severity"].to_pydict(), split.open["severity"].to_pydict()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sealed["text"]]
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    test_store = TokenStore(np.concatenate(ids).astype(np.int32), offsets)
    test_x = embed(model, test_store, np.arange(len(ids)), vocabulary, **options)
    store = open_tokens(root / spec.tokens["severity"])
    parts, labels, groups = (np.array(opened[column]) for column in ("part", "label", "group"))
    train = np.flatnonzero(parts == TRAIN)
    expected, confusions = {}, {}
    for draw in range(2):
        drawn = train[draw_shots(labels[train], groups[train], 2, seed=1, task="severity", draw=draw)]
        shown = embed(model, store, drawn, vocabulary, **options)
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-8)).fit(shown, labels[drawn])
        probabilities = np.zeros((len(ids), len(split.classes["severity"])))
        probabilities[:, plain.classes_] = plain.predict_proba(test_x)
        names = split.classes["severity"]
        for metric, label, value in compute_scores(np.array(sealed["label"]), probabilities):
            expected[draw, metric, None if label is None else names[label]] = value
        for row in list_confusions(np.array(sealed["label"]), probabilities, names):
            confusions[draw, row["class"], row["predicted"]] = row["count"]
    rows = read_rows(folder, job.name, "scores", spec.trial_id, ".test")
    found = {(row["draw"], row["metric"], row["class"]): row["value"] for row in rows}
    # scikit-learn ends its iterations a little earlier, which probabilities show and rankings do not.
    assert found == pytest.approx(expected, abs=1e-4)
    counts = read_rows(folder, job.name, "confusions", spec.trial_id, ".test")
    assert {(row["draw"], row["class"], row["predicted"]): row["count"] for row in counts} == confusions
    assert {(row["split"], row["rung"], row["task"]) for row in counts} == {("test", 1, "severity")}
    assert {row["num_eval"] for row in rows} == {len(ids)}


def test_arms_and_baselines_are_ranked_on_the_test_split(finished, job):
    folder, _, _, arm, _ = finished
    (table, cell, mode), *_ = list_cells(job)
    ranked = rank_arms(folder, job, table, cell, mode, name_point(prepare(job, folder), {})[0], "test")
    assert len(ranked) == 4
    assert {"baseline:majority", "baseline:tfidf", arm} < {row.arm for row in ranked}
    assert {row.value.num_seeds for row in ranked} == {2}


def test_an_unknown_arm_is_refused(finished, job):
    folder, *_ = finished
    before = digest_tables(folder)
    with pytest.raises(JobError, match="arm 'nowhere' has no complete ranked trial"):
        unseal(job, folder, ["nowhere"])
    assert digest_tables(folder) == before


def test_a_job_that_has_not_run_is_refused(job, tmp_path):
    with pytest.raises(JobError, match="no complete ranked trial"):
        unseal(job, tmp_path)


@pytest.mark.parametrize("part", ["open", "sealed"])
def test_changed_training_data_are_refused(finished, job, notes, make_job, tmp_path, part):
    """Before anything is written. Other test texts are no other data: nothing was trained on them."""
    folder, *_ = finished
    before = digest_tables(folder)
    chosen = set(getattr(prepare(job, folder).split(0), part)["severity"]["text"].to_pylist()[:3])
    table = pq.read_table(notes / "notes.parquet")
    texts = [f"{text} changed" if text in chosen else text for text in table["text"].to_pylist()]
    table = table.set_column(table.column_names.index("text"), "text", pa.array(texts))
    path = tmp_path / "notes.parquet"
    pq.write_table(table, path)
    raw = job.model_dump(mode="json")
    raw["corpus"]["documents"]["path"] = str(path)
    for task in raw["corpus"]["tasks"].values():
        task["path"] = str(path)
    changed = type(job).model_validate_json(json.dumps(raw))
    if part == "open":
        with pytest.raises(JobError, match="no complete ranked trial of this job and data"):
            unseal(changed, folder)
        assert digest_tables(folder) == before
    else:
        base = name_point(prepare(job, folder), {})[0]
        assert name_point(prepare(changed, folder), {})[0] == base


def drop_times(rows):
    return [{name: value for name, value in row.items() if name != "train_seconds"} for row in rows]


def test_more_rungs_asked_for_later_leave_the_last_encoder_the_last(job, make_job, tmp_path):
    """The rung that was there already is listed first, yet it is the end of the budget."""
    changes = {"name": "rungs", "pretrain.num_tokens": 4096, "evaluate.draws": 1}
    one, two = (make_job("mlm", {**changes, "pretrain.rungs": rungs}) for rungs in (1, 2))
    run_here(one, tmp_path)
    [trial] = unseal(one, tmp_path)
    first = drop_times(read_rows(tmp_path, "rungs", "scores", trial, ".test"))
    run_here(two, tmp_path)
    stages = [row for row in read_rows(tmp_path, "rungs", "stages", trial) if row["kind"] == "pretrain"]
    notes = [json.loads((tmp_path / FOLDER / row["stage_id"] / "stage.json").read_text()) for row in stages]
    assert [note["key"].get("until") for note in notes] == [None, "1/1", "1/2"]
    assert unseal(two, tmp_path) == [trial]
    second = drop_times(read_rows(tmp_path, "rungs", "scores", trial, ".test"))
    assert [row | {"rung": 1} for row in second] == first


def test_nothing_of_the_sealed_rows_is_kept_but_tokens_and_sums_keep_their_order(make_job, tmp_path):
    """Nor does the number of cores of the machine that opens the split decide a digit."""
    changes = {"evaluate.frozen_layers": ["1"], "evaluate.fine_tune": {"steps": 2, "hidden_size": 8}}
    job = make_job("mlm", {"name": "deep", "pretrain": None, "pretrain.objective": "none", **changes})
    run_here(job, tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        unseal(job, tmp_path)
        assert torch.get_num_threads() == job.resources.cpus_per_worker == 1
    finally:
        torch.set_num_threads(before)
    num_sealed = len(prepare(job, tmp_path).split(0).sealed["severity"])
    kept = [path for kind in ("activations", "embed") for path in (tmp_path / FOLDER).glob(f"{kind}-*")]
    notes = {path: json.loads((path / "stage.json").read_text()) for path in kept}
    [sealed] = [path for path, note in notes.items() if note["info"]["rows"] == num_sealed]
    assert notes[sealed]["files"] == {}
    assert [path.name for path in sealed.iterdir()] == ["stage.json"]
