import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from raylab.data.corpus import TRAIN, VALIDATION, open_rows
from raylab.data.tokens import open_tokens
from raylab.evaluation import cells, evaluation
from raylab.evaluation.draws import list_draws
from raylab.evaluation.finetune import Tuning
from raylab.measures.scores import METRICS
from raylab.results.tables import OF_A_RUN, read_rows, read_trial
from raylab.runs.trial import run_trial
from raylab.store.stages import FOLDER, read_info
from raylab.training.embedding import embed
from raylab.training.encoder import choose_device, load_encoder
from raylab.training.pretrain import open_data

TABLES = ("scores", "confusions", "geometry", "curves")
DEPTHS = ("all", "none", "embeddings", "1")
FULL = {
    "evaluate.tasks": ["condition", "severity"],
    "evaluate.shots": [2, "full"],
    "evaluate.frozen_layers": list(DEPTHS),
    "evaluate.probes": ["logistic", "mlp"],
    "evaluate.fine_tune": {"steps": 3, "learning_rate": 1e-2, "hidden_size": 8},
    "search.targets": [
        {
            "table": "scores",
            "task": "condition",
            "metric": "f1_macro",
            "shots": 2,
            "probe": "mlp",
            "frozen_layers": "all",
        }
    ],
}


def read_values(spec, folder):
    """Rows of the trial's tables as texts, since NaN differs from itself; without the times that training took."""

    def plain(row):
        return repr({name: value for name, value in row.items() if name != "train_seconds"})

    rows = {table: read_rows(folder, spec.job, table, spec.trial_id) for table in TABLES}
    rows["curves"] = [row for row in rows["curves"] if row["metric"] not in OF_A_RUN]
    return {table: [plain(row) for row in found] for table, found in rows.items()}


@pytest.fixture(scope="module")
def full(make_spec, tmp_path_factory):
    """A trial of two rungs with every kind of score, run to its end: its spec, row and folder."""
    folder = tmp_path_factory.mktemp("full")
    spec = make_spec("declutr", FULL, folder=folder)
    return spec, run_trial(spec), folder


def test_every_table_is_written(full):
    spec, row, folder = full
    kept = read_trial(folder, spec.job, spec.trial_id)
    assert (row["status"], row["rung"], row["num_rungs"]) == ("complete", 2, 2)
    assert (kept["status"], kept["rung"], kept["attempts"], kept["error"]) == ("complete", 2, 1, None)
    assert kept["num_tokens"] >= 12_000
    assert kept["num_steps"] > 0
    assert kept["flops"] > 0
    assert kept["data_digest"] == spec.data_digest
    for table in TABLES:
        assert read_values(spec, folder)[table]
    stages = read_rows(folder, spec.job, "stages", spec.trial_id)
    # Both tasks have the same texts and, with all shots, need the same rows: they share their embeddings.
    assert sorted(stage["kind"] for stage in stages) == [
        *["activations"] * 2, *["embed"] * 2, *["evaluate"] * 4, *["heldout"] * 3, *["pretrain"] * 3,
    ]  # fmt: skip
    assert {point["step"] for point in read_rows(folder, spec.job, "curves", spec.trial_id)} >= {0, kept["num_steps"]}


def test_scores_are_complete(full):
    spec, _, folder = full
    rows = read_rows(folder, spec.job, "scores", spec.trial_id)
    found = sorted(
        (r["rung"], r["task"], str(r["shots"]), r["draw"], r["frozen_layers"], r["probe"], r["metric"], str(r["class"]))
        for r in rows
    )
    draws = [("2", 0), ("2", 1), ("None", 0)]
    classifiers = [("all", "logistic"), ("all", "mlp"), *((depth, "mlp") for depth in DEPTHS[1:])]
    classes = read_info(folder / FOLDER / spec.corpus)["classes"]
    expected = sorted(
        (rung, task, *draw, *classifier, metric, str(name))
        for rung, task, draw, classifier, metric in itertools.product(
            (1, 2), ("condition", "severity"), draws, classifiers, METRICS
        )
        for name in (classes[task] if metric.endswith("_class") else [None])
    )
    assert found == expected
    coded = {task: open_rows(folder / FOLDER / spec.corpus, task) for task in ("condition", "severity")}
    for row in rows:
        assert row["split"] == "validation"
        part = coded[row["task"]]["part"]
        assert row["num_eval"] == (part == VALIDATION).sum()
        assert row["num_train"] == (part == TRAIN).sum() if row["shots"] is None else row["num_train"] <= 2 * 6
        assert row["value"] is None or 0 <= row["value"] <= 1
        assert row["selection"] == "fixed"
        assert row["train_seconds"] > 0
    key = ("rung", "task", "shots", "frozen_layers", "probe", "draw")
    confusions = read_rows(folder, spec.job, "confusions", spec.trial_id)
    for row in rows:
        if row["metric"] == "accuracy":
            cell = [r for r in confusions if all(r[k] == row[k] for k in key)]
            assert sum(r["count"] for r in cell) == row["num_eval"]
            right = sum(r["count"] for r in cell if r["class"] == r["predicted"])
            assert right / row["num_eval"] == pytest.approx(row["value"])
    geometry = read_rows(folder, spec.job, "geometry", spec.trial_id)
    assert {(r["rung"], r["task"]) for r in geometry} == set(itertools.product((1, 2), ("condition", "severity")))


def test_parameters_updated(full):
    spec, _, folder = full
    rows = read_rows(folder, spec.job, "scores", spec.trial_id)
    head = 16 * 8 + 8 + 8 * 6 + 6
    layer = 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 4 * 16
    found = {
        (r["frozen_layers"], r["probe"]): r["parameters_updated"]
        for r in rows
        if r["task"] == "condition" and r["shots"] is None
    }
    assert found["all", "logistic"] == 17 * 6
    assert found["all", "mlp"] == head
    assert found["1", "mlp"] == head + layer
    assert found["embeddings", "mlp"] == head + 2 * layer
    # Words, positions, one type, and a norm.
    assert found["none", "mlp"] == head + 2 * layer + (400 + 64 + 2) * 16 + 16 + 32


def test_targets_are_means_over_draws(full):
    spec, row, folder = full
    values = [
        r["value"]
        for r in read_rows(folder, spec.job, "scores", spec.trial_id)
        if (r["rung"], r["task"], r["shots"], r["probe"], r["metric"]) == (2, "condition", 2, "mlp", "f1_macro")
        and r["frozen_layers"] == "all"
    ]
    assert len(values) == 2
    assert row["target_values"] == [pytest.approx(np.mean(values))]


def test_a_rerun_changes_nothing(full):
    spec, row, folder = full
    before = read_values(spec, folder)
    stages = read_rows(folder, spec.job, "stages", spec.trial_id)
    again = run_trial(spec)
    assert read_values(spec, folder) == before
    assert (again["status"], again["attempts"], again["target_values"]) == ("complete", 2, row["target_values"])
    for name in ("num_steps", "num_tokens", "num_documents", "flops", "precision", "started_at"):
        assert again[name] == row[name]
    # What the trial itself built stays its own work.
    kept = {stage["stage_id"]: stage["reused"] for stage in read_rows(folder, spec.job, "stages", spec.trial_id)}
    assert kept == {stage["stage_id"]: stage["reused"] for stage in stages}


def test_rows_say_what_products_were_computed_in(full, make_spec, tmp_path):
    """A narrow encoder stays in float32 by itself, on a processor; what is asked for is done, and told apart."""
    assert full[1]["precision"] == ("bfloat16" if choose_device().type == "cuda" else "float32")
    asked = {"pretrain.precision": "bfloat16", "evaluate.precision": "float32", "pretrain.rungs": 1}
    trained = run_trial(make_spec("mlm", asked, folder=tmp_path))
    assert trained["precision"] == "pretrain bfloat16, evaluate float32"
    untrained = {"pretrain": None, "pretrain.objective": "none", "evaluate.precision": "bfloat16"}
    assert run_trial(make_spec("mlm", untrained, folder=tmp_path))["precision"] == "bfloat16"
    full_precision = run_trial(make_spec("mlm", asked | {"pretrain.precision": "float32"}, folder=tmp_path))
    assert full_precision["precision"] == "float32"
    curves = [
        [
            row["value"]
            for row in read_rows(tmp_path, "tiny", "curves", row["trial_id"])
            if row["metric"] == "train_loss"
        ]
        for row in (trained, full_precision)
    ]
    assert curves[0] != curves[1]
    np.testing.assert_allclose(*curves, rtol=0.02)


def test_the_same_in_another_folder(full, make_spec, tmp_path):
    """Promise 2: nothing depends on where the results lie, nor on what lies there."""
    spec, _, folder = full
    other = make_spec("declutr", FULL, folder=tmp_path)
    assert (other.trial_id, other.corpus, other.tokens) == (spec.trial_id, spec.corpus, spec.tokens)
    run_trial(other)
    assert read_values(other, tmp_path) == read_values(spec, folder)


def test_tables_come_back_from_stages(full, tmp_path):
    spec, _, folder = full
    shutil.copytree(folder / FOLDER, tmp_path / FOLDER)
    row = run_trial(spec.model_copy(update={"results": str(tmp_path)}))
    assert row["status"] == "complete"
    assert read_values(spec, tmp_path) == read_values(spec, folder)
    assert all(stage["reused"] for stage in read_rows(tmp_path, spec.job, "stages", spec.trial_id))


class CrashError(Exception):
    """An error of a kind that the trial does not know."""


LIGHT = {"evaluate.frozen_layers": ["all", "1"], "evaluate.fine_tune": {"steps": 2, "hidden_size": 8}}


@pytest.fixture(scope="module")
def unbroken(make_spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    spec = make_spec("declutr", LIGHT, folder=folder)
    run_trial(spec)
    return read_values(spec, folder)


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_a_broken_trial_goes_on(how, unbroken, make_spec, tmp_path):
    spec = make_spec("declutr", LIGHT, folder=tmp_path)

    def decide(spec, rung):
        if how == "failed":
            raise CrashError("with a text in it")
        return False

    if how == "failed":
        with pytest.raises(CrashError):
            run_trial(spec, decide=decide)
    else:
        run_trial(spec, decide=decide)
    row = read_trial(tmp_path, spec.job, spec.trial_id)
    assert (row["status"], row["rung"]) == (how, 1)
    assert "with a text" not in str(row["error"])
    assert {r["rung"] for r in read_rows(tmp_path, spec.job, "scores", spec.trial_id)} == {1}
    row = run_trial(spec)
    assert (row["status"], row["rung"], row["attempts"], row["error"]) == ("complete", 2, 2, None)
    assert read_values(spec, tmp_path) == unbroken


def test_more_shots_of_a_complete_trial(make_spec, tmp_path):
    first = make_spec("mlm", folder=tmp_path)
    run_trial(first)
    before = read_values(first, tmp_path)
    more = make_spec("mlm", {"evaluate.shots": [2, 4]}, folder=tmp_path)
    assert more.trial_id == first.trial_id
    run_trial(more)
    after = read_values(more, tmp_path)
    assert len(after["scores"]) == 2 * len(before["scores"])
    assert set(before["scores"]) <= set(after["scores"])
    assert after["geometry"] == before["geometry"]


def test_without_pretraining(make_spec, tmp_path):
    spec = make_spec("mlm", {"pretrain": None, "pretrain.objective": "none"}, folder=tmp_path)
    row = run_trial(spec)
    assert (row["status"], row["rung"], row["num_rungs"], row["num_steps"]) == ("complete", 1, 1, 0)
    assert {r["rung"] for r in read_rows(tmp_path, spec.job, "scores", spec.trial_id)} == {1}


def draws_of(spec, task="condition"):
    rows = open_rows(Path(spec.results) / FOLDER / spec.corpus, task)
    return rows, list(list_draws(rows, task, spec.settings.evaluate, spec.seed))


def test_draws_are_the_same_for_every_arm(make_spec):
    many = {"evaluate.shots": [1, 3, "full"], "evaluate.draws": 4}
    _, draws = draws_of(make_spec("mlm", many))
    assert [(d.shots, d.draw) for d in draws] == [(s, d) for s in (1, 3) for d in range(4)] + [(None, 0)]
    for other in (make_spec("declutr", many), make_spec("cross_entropy", many)):
        for ours, theirs in zip(draws, draws_of(other)[1], strict=True):
            assert ours[:2] == theirs[:2]
            assert np.array_equal(ours.rows, theirs.rows)
    _, others = draws_of(make_spec("mlm", many, seed=1))
    assert not all(np.array_equal(a.rows, b.rows) for a, b in zip(draws[:-1], others[:-1], strict=True))


def test_shots_are_training_rows(make_spec):
    rows, draws = draws_of(make_spec("mlm", {"evaluate.shots": [1, 3, "full"], "evaluate.draws": 4}))
    evaluated = set(rows["group"][rows["part"] == VALIDATION].tolist())
    for draw in draws:
        assert (rows["part"][draw.rows] == TRAIN).all()
        assert not evaluated & set(rows["group"][draw.rows].tolist())
        if draw.shots:
            assert np.bincount(rows["label"][draw.rows]).max() <= draw.shots
            assert len(set(rows["group"][draw.rows].tolist())) == len(draw.rows)
    assert np.array_equal(draws[-1].rows, np.flatnonzero(rows["part"] == TRAIN))


def test_embeddings_are_the_encoders(full):
    spec, _, folder = full
    stages = read_rows(folder, spec.job, "stages", spec.trial_id)
    last = [s["stage_id"] for s in stages if s["kind"] == "pretrain"][-1]
    model, _ = load_encoder(str(folder / FOLDER / last / "encoder"))
    data = open_data(spec)
    rows, draws = draws_of(spec)
    needed = np.unique(np.concatenate([np.flatnonzero(rows["part"] == VALIDATION), *(d.rows for d in draws)]))
    store = open_tokens(folder / FOLDER / spec.tokens["condition"])
    x = embed(model, store, needed, data.vocabulary, max_length=64, long_documents="truncate")
    kept = [np.load(folder / FOLDER / s["stage_id"] / "embeddings.npy") for s in stages if s["kind"] == "embed"]
    assert sum(np.array_equal(x, other) for other in kept) >= 1
    assert read_info(folder / FOLDER / last)["step"] > 0


def count_cells(folder):
    return len(list((folder / FOLDER).glob("cell-*")))


def test_fine_tuned_cells_are_kept_and_found(make_spec, tmp_path, monkeypatch):
    """An evaluation that dies in its last cell goes on with the others; another draw trains only what is new."""
    changes = {"evaluate.frozen_layers": ["1"], "evaluate.fine_tune": {"steps": 60, "hidden_size": 8}}
    changes |= {"pretrain": None, "pretrain.objective": "none"}
    spec = make_spec("mlm", changes, folder=tmp_path)
    trained, real = [], Tuning.train

    def die_at_second(self, *how):
        if len(trained) == 1:
            raise CrashError
        trained.append(self.run)
        real(self, *how)

    monkeypatch.setattr(Tuning, "train", die_at_second)
    with pytest.raises(CrashError):
        run_trial(spec)
    assert count_cells(tmp_path) == 1
    monkeypatch.setattr(Tuning, "train", lambda self, *how: trained.append(self.run) or real(self, *how))
    run_trial(spec)
    assert len(trained) == 2  # the first is found, with the seconds that it took
    first = read_rows(tmp_path, spec.job, "scores", spec.trial_id)
    assert len({row["train_seconds"] for row in first}) == 2
    more = make_spec("mlm", {**changes, "evaluate.draws": 3}, folder=tmp_path)
    run_trial(more)
    assert len(trained) == 3
    kept = [row for row in read_rows(tmp_path, more.job, "scores", more.trial_id) if row["draw"] < 2]
    assert kept == first


def test_a_long_cell_goes_on_from_its_last_part(make_spec, tmp_path, monkeypatch):
    changes = {"evaluate.frozen_layers": ["1"], "evaluate.fine_tune": {"steps": 64, "hidden_size": 8}}
    changes |= {"pretrain": None, "pretrain.objective": "none", "evaluate.draws": 1, "evaluate.shots": ["full"]}
    changes |= {"evaluate.selection": "validation"}  # probabilities at 16, 32, 64 and 128 steps
    whole = make_spec("mlm", changes, folder=tmp_path / "whole")
    run_trial(whole)
    expected = read_values(whole, tmp_path / "whole")
    monkeypatch.setattr(cells, "PART_STEPS", 50)
    broken = make_spec("mlm", changes, folder=tmp_path / "broken")
    begun, real = [], Tuning.train

    def die_in_third(self, *how):
        begun.append(self.step)
        if self.step == 100 and len(begun) < 4:
            raise CrashError
        real(self, *how)

    monkeypatch.setattr(Tuning, "train", die_in_third)
    with pytest.raises(CrashError):
        run_trial(broken)
    run_trial(broken)
    assert begun == [0, 50, 100, 100]
    assert read_values(broken, tmp_path / "broken") == expected
    # Its weights on the way are gone.
    assert not list((tmp_path / "broken" / FOLDER).glob("cell-*/*.safetensors"))


@pytest.mark.parametrize("selection", ["cross_validation", "validation"])
def test_selection_is_said_in_every_row(selection, make_spec, tmp_path):
    changes = {
        "evaluate.selection": selection, "evaluate.frozen_layers": ["all", "1"], "evaluate.probes": ["logistic", "mlp"],
        "evaluate.fine_tune": {"steps": 4, "hidden_size": 8}, "evaluate.draws": 1,
        "pretrain": None, "pretrain.objective": "none",
    }  # fmt: skip
    spec = make_spec("mlm", changes, folder=tmp_path)
    assert run_trial(spec)["status"] == "complete"
    rows = read_rows(tmp_path, spec.job, "scores", spec.trial_id)
    assert {row["selection"] for row in rows} == {selection}
    assert {(row["frozen_layers"], row["probe"]) for row in rows} == {("all", "logistic"), ("all", "mlp"), ("1", "mlp")}


def test_depths_of_a_search_share_one_pass(make_spec, tmp_path):
    space = {"evaluate.frozen_layers": {"choices": ["all", "1", "embeddings"]}}
    changes = {"search": {"space": space}, "evaluate.fine_tune": {"steps": 2}, "pretrain": None}
    changes |= {"pretrain.objective": "none"}
    for depth in ("1", "embeddings"):
        run_trial(make_spec("mlm", {**changes, "evaluate.frozen_layers": [depth]}, folder=tmp_path))
    kept = list((tmp_path / FOLDER).glob("activations-*"))
    assert [sorted(file.name for file in folder.glob("states-*")) for folder in kept] == [
        ["states-1.npy", "states-embeddings.npy"]
    ]


@pytest.mark.parametrize("start", ["pretrained", "config"])
def test_an_encoder_that_no_seed_changes_embeds_all_rows_once(start, make_spec, encoder_folders, tmp_path):
    changes = {**LIGHT, "pretrain": None, "pretrain.objective": "none", "evaluate.shots": [2, "full"]}
    if start == "pretrained":
        encoder = {"pretrained": str(encoder_folders["bert"]), "config": None, "tokenizer": None}
        changes["encoder"] = encoder
    specs = [make_spec("mlm", changes, folder=tmp_path, seed=seed) for seed in (0, 1)]
    for spec in specs:
        assert run_trial(spec)["status"] == "complete"
    rows = [{row["kind"]: row for row in read_rows(tmp_path, spec.job, "stages", spec.trial_id)} for spec in specs]
    for kind in ("embed", "activations"):
        shared = rows[0][kind]["stage_id"] == rows[1][kind]["stage_id"]
        assert shared == rows[1][kind]["reused"] == (start == "pretrained")
    assert rows[0]["evaluate"]["stage_id"] != rows[1]["evaluate"]["stage_id"]  # the draws are other ones


def test_large_states_are_pruned_at_once(make_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 1000)
    spec = make_spec("mlm", LIGHT, folder=tmp_path)
    run_trial(spec)
    folders = list((tmp_path / FOLDER).glob("activations-*"))
    assert len(folders) == 2
    assert not [file for folder in folders for file in folder.glob("states-*")]
