"""The rate and the time that a plan tells: from own trials, from like trials of other jobs, or tried out."""

import os

import pytest

from raylab.job.jobs import dump_yaml
from raylab.job.settings import list_measures, list_settings
from raylab.results.tables import now, read_rows, read_trial, write_rows
from raylab.runs import rates
from raylab.runs.plan import plan_job
from raylab.runs.preparation import make_spec, name_point, prepare
from raylab.runs.rates import count_slots, make_key, tell_time
from raylab.runs.trial import run_trial
from raylab.training.dropout import QuickDropout

SEEDS = {"search": {"design": "grid", "space": {"pretrain.learning_rate": [1e-3]}, "seeds": [0, 1, 2]}}


@pytest.fixture(scope="module")
def ran(make_job, tmp_path_factory):
    """A job of three seeds of which one trial has run for real: the job, its results, and the trial's id."""
    folder = tmp_path_factory.mktemp("ran")
    job = make_job("mlm", {**SEEDS, "pretrain.num_tokens": 20_000, "pretrain.batch_tokens": 500})
    spec = make_spec(prepare(job, folder), {}, 0, "fixed")
    assert run_trial(spec)["status"] == "complete"
    return job, folder, spec.trial_id


def write_trial(job, folder, name, seconds, *, device="cpu", tokens=(1000, 3000), changes=None):
    """Rows of a complete trial, whose loop took so many seconds for each part of its tokens."""
    settings = list_measures(job)
    row = {"arm": name, "phase": "fixed", "seed": 0, "status": "complete", "attempts": 1, **settings}
    row |= {"device": device, "started_at": now(), "updated_at": now(), "wall_seconds": 10.0, **(changes or {})}
    write_rows(folder, job.name, "trials", name, [row])
    points, before = [], 0
    for at, took in zip(tokens, seconds, strict=True):
        value = (at - before) / took
        points.append({"step": at // 100, "tokens": at, "metric": "train_tokens_per_second", "value": value})
        points.append({"step": at // 100, "tokens": at, "metric": "train_loss", "value": 1.0})
        before = at
    write_rows(folder, job.name, "curves", name, points)
    (folder / job.name / "job.yaml").write_text(dump_yaml(job))


def test_the_time_is_that_of_trials_that_ran(ran):
    """Twice a real trial's, for the two seeds that are left; within what that trial took as a whole."""
    job, folder, trial_id = ran
    found = plan_job(job, folder)
    row = read_trial(folder, job.name, trial_id)
    loop = before = 0.0
    for point in read_rows(folder, job.name, "curves", trial_id):
        if point["metric"] == "train_tokens_per_second":
            loop, before = loop + (point["tokens"] - before) / point["value"], point["tokens"]
    stages = read_rows(folder, job.name, "stages", trial_id)
    trained = sum(stage["wall_seconds"] for stage in stages if stage["kind"] == "pretrain")
    assert 0 < loop < trained < row["wall_seconds"]
    assert found["tokens"] == 2 * 20_000
    assert found["hours"] * 3600 == pytest.approx(2 * 20_000 * loop / before)
    assert found["evaluation_hours"] * 3600 == pytest.approx(2 * (row["wall_seconds"] - trained))
    whole = 3600 * (found["hours"] + found["evaluation_hours"])
    assert 2 * row["wall_seconds"] / 3 < whole < 2 * row["wall_seconds"] * 1.1
    [rate] = found["rates"]
    assert rate["source"] == "measured in 1 trial of this job on cpu"
    assert found["tokens_per_second"] == pytest.approx(before / loop)
    assert rate["tokens_per_second"] == pytest.approx(before / loop)


def test_own_trials_count_before_others(make_job, tmp_path):
    job = make_job("mlm", SEEDS)
    other = job.model_copy(update={"name": "other"})
    write_trial(other, tmp_path, "x", (1.0, 1.0))
    [rate] = plan_job(job, tmp_path)["rates"]
    assert rate == {
        "objective": "mlm", "encoder": "2 x 16", "tokens_per_second": pytest.approx(1500),
        "source": "measured in 1 trial of job other on cpu",
    }  # fmt: skip
    for name, seconds in (("a", (1.0, 5.0)), ("b", (2.0, 4.0)), ("c", (15.0, 15.0))):
        write_trial(job, tmp_path, name, seconds)
    found = plan_job(job, tmp_path)
    [rate] = found["rates"]
    # Of a trial the mean over its time, over trials the median.
    assert rate["tokens_per_second"] == pytest.approx(3000 / 6)
    assert rate["source"] == "measured in 3 trials of this job on cpu"
    assert found["hours"] == pytest.approx(3 * 12_000 / 500 / 3600)


@pytest.mark.parametrize(
    "change",
    [
        {"pretrain.objective": "declutr"},
        {"encoder.config.hidden_size": 32},
        {"encoder.config.num_hidden_layers": 1},
        {"encoder.tokenizer.vocab_size": 300},
        {"pretrain.precision": "bfloat16"},
        {"device": "NVIDIA H100"},
        {"resources": {"workers": 2}},
        {"resources": {"chunk_tokens": 100}},
    ],
)
def test_unlike_trials_of_other_jobs_tell_nothing(change, make_job, tmp_path, monkeypatch):
    job = make_job("mlm", {**SEEDS, "resources": {"gpus_per_worker": 0}})
    monkeypatch.setattr(rates, "_try_kind", lambda *given: rates.Rate(7.0, "tried"))
    settings = {name: value for name, value in change.items() if name not in ("device", "resources")}
    resources = job.resources.model_copy(update=change.get("resources", {}))
    other = job.model_copy(update={"name": "other", "resources": resources})
    write_trial(other, tmp_path, "x", (1.0, 1.0), device=change.get("device", "cpu"), changes=settings)
    assert plan_job(job, tmp_path)["tokens_per_second"] == pytest.approx(7.0)
    # What auto is for a narrow encoder on a processor.
    third = job.model_copy(update={"name": "third"})
    write_trial(third, tmp_path, "x", (1.0, 1.0), changes={"pretrain.precision": "float32"})
    assert plan_job(job, tmp_path)["tokens_per_second"] == pytest.approx(1500)


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({}, True),
        ({"gpus_per_worker": 1}, True),
        ({"gpus_per_worker": 0.5}, False),
        ({"gpus_per_worker": 1, "compile": "never"}, False),
    ],
)
def test_trials_on_a_gpu_are_alike_where_it_was_whole(resources, told, make_job, tmp_path):
    """Of another job that says null, or 1; and auto is bf16 there."""
    job = make_job("mlm", {**SEEDS, "resources": {"gpus_per_worker": 1}})
    other = make_job("mlm", {"name": "other", "resources": resources})
    write_trial(other, tmp_path, "x", (1.0, 1.0), device="NVIDIA H100", changes={"pretrain.precision": "bfloat16"})
    assert plan_job(job, tmp_path)["tokens_per_second"] == (pytest.approx(1500) if told else None)


def test_own_trials_tell_only_of_the_device_that_is_asked_for(make_job, tmp_path):
    job = make_job("mlm", {**SEEDS, "resources": {"gpus_per_worker": 1}})
    write_trial(job, tmp_path, "x", (1.0, 1.0))
    assert plan_job(job, tmp_path)["tokens_per_second"] is None
    write_trial(job, tmp_path, "y", (2.0, 2.0), device="NVIDIA H100")
    assert plan_job(job, tmp_path)["tokens_per_second"] == pytest.approx(750)


def test_trials_that_a_job_no_longer_asks_for_are_not_done(make_job, tmp_path):
    search = {"design": "grid", "space": {"pretrain.learning_rate": [1e-3, 2e-3]}, "seeds": [0, 1, 2]}
    whole, cut = make_job("mlm", {"search": search}), make_job("mlm", {**SEEDS, "search.seeds": [0, 3]})
    for value in (1e-3, 2e-3):
        arm, _ = name_point(prepare(whole, tmp_path), {"pretrain.learning_rate": value})
        for seed in (0, 1, 2):
            write_trial(whole, tmp_path, f"{arm}-{seed}", (1.0, 1.0), changes={"arm": arm, "seed": seed})
    assert plan_job(whole, tmp_path)["evaluation_hours"] == 0
    found = plan_job(cut, tmp_path)
    assert (found["trials"], found["trials_done"]) == (2, 1)
    assert found["evaluation_hours"] == pytest.approx(10 / 3600)


def test_arms_have_rates_of_their_own(make_job, tmp_path):
    """Two objectives on three seeds: each is told by its own rate, what is there already takes no time."""
    search = {"design": "grid", "space": {"pretrain.objective": ["mlm", "declutr", "none"]}, "seeds": [0, 1, 2]}
    job = make_job("declutr", {"search": search})
    write_trial(make_job("mlm", {"name": "one"}), tmp_path, "a", (1.0, 2.0))
    write_trial(make_job("declutr", {"name": "two"}), tmp_path, "b", (3.0, 3.0))
    found = plan_job(job, tmp_path)
    assert [(rate["objective"], rate["tokens_per_second"]) for rate in found["rates"]] == [
        ("mlm", pytest.approx(1000)), ("declutr", pytest.approx(500)),
    ]  # fmt: skip
    seconds = 3 * (12_000 / 1000 + 12_000 / 500)
    assert found["hours"] * 3600 == pytest.approx(seconds)
    assert found["tokens_per_second"] == pytest.approx(6 * 12_000 / seconds)
    assert found["evaluation_hours"] is None
    slots = found["trials_at_once"]
    assert found["clock_hours"] * 3600 == pytest.approx(max(seconds / min(slots, 9), 24))
    lines = tell_time(found)
    assert "rate: declutr, 2 x 16: 500 tokens/s (measured in 1 trial of job two on cpu)" in lines
    assert "evaluation is left out of the time: no trial of this job has ended yet" in lines


def test_a_search_shares_its_trials_among_objectives(make_job, tmp_path):
    search = {"design": "random", "num_arms": 4, "targets": [{"task": "severity"}], "seeds": [0],
              "space": {"pretrain.objective": ["mlm", "declutr"]}}  # fmt: skip
    job = make_job("declutr", {"search": search, "resources": {"max_concurrent_trials": 3}})
    write_trial(make_job("mlm", {"name": "one"}), tmp_path, "a", (1.0, 2.0))
    write_trial(make_job("declutr", {"name": "two"}), tmp_path, "b", (3.0, 3.0))
    found = plan_job(job, tmp_path)
    assert found["tokens"] == 4 * 12_000
    assert found["hours"] * 3600 == pytest.approx(2 * 12_000 / 1000 + 2 * 12_000 / 500)
    assert (found["trials_at_once"], found["trials_at_once_source"]) == (3, "resources.max_concurrent_trials")
    assert found["clock_hours"] == pytest.approx(found["hours"] / 3)


def test_a_rate_is_tried_out_once(make_job, tmp_path, monkeypatch):
    job = make_job("declutr", SEEDS)
    first = plan_job(job, tmp_path)
    [rate] = first["rates"]
    assert rate["tokens_per_second"] > 0
    assert rate["source"] == "tried out on this machine's CPU, 1 thread"
    assert first["hours"] == pytest.approx(3 * 12_000 / rate["tokens_per_second"] / 3600)
    from raylab.runs import tryout

    monkeypatch.setattr(tryout, "try_out", lambda *given: pytest.fail("tried again"))
    assert plan_job(job, tmp_path)["rates"] == first["rates"]


def test_steps_are_tried_out_as_a_trial_takes_them(make_job, tmp_path, monkeypatch):
    from raylab.runs import tryout

    changes = {"pretrain.accumulation": 2, "encoder.config.dropout": 0.1, "resources": {"chunk_tokens": 130}}
    spec = make_spec(prepare(make_job("declutr", changes), tmp_path), {}, 0, "fixed")
    taken, train = [], tryout.train

    def watch(training, units, data, pretrain, *given, **named):
        drops = {type(module).__name__ for module in training.learner.encoder.modules() if hasattr(module, "p")}
        taken.append((pretrain.accumulation, named, drops))
        train(training, units, data, pretrain, *given, **named)

    monkeypatch.setattr(tryout, "train", watch)
    assert tryout.try_out(spec, 0.1) > 0
    assert taken[-1] == (2, {"chunk_tokens": 130}, {QuickDropout.__name__})


def test_an_arm_that_can_not_work_is_not_the_rate_of_its_kind(make_job, tmp_path):
    """The first is of spans that no document has; it is not kept either."""
    space = {"pretrain.declutr.min_document_length": [100_000, 100]}
    job = make_job("declutr", {"search": {"design": "grid", "space": space, "seeds": [0]}})
    alone = make_job("declutr", {"pretrain.declutr.min_document_length": 100_000})
    [rate] = plan_job(alone, tmp_path)["rates"]
    assert rate["tokens_per_second"] is None
    [rate] = plan_job(job, tmp_path)["rates"]
    assert rate["tokens_per_second"] > 0


def test_what_can_not_be_tried_out_has_no_rate(make_job, tmp_path):
    """A step of an encoder as wide as RoBERTa's would take seconds here; a GPU that isn't here can't be tried."""
    wide = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    for changes, why in (
        ({"encoder.config": wide}, "could not be tried out here in a second"),
        ({"resources": {"gpus_per_worker": 1}}, "no GPU here"),
    ):
        found = plan_job(make_job("declutr", {**SEEDS, **changes}), tmp_path)
        assert (found["hours"], found["clock_hours"], found["tokens_per_second"]) == (None, None, None)
        assert why in found["rates"][0]["source"]
        assert any("no rate is known" in line for line in tell_time(found))


@pytest.mark.parametrize(("gpus", "fit"), [(0.25, 4), (0.2, 5), (1 / 3, 3), (0.5, 2), (1, 1)])
def test_trials_at_once_on_a_gpu(gpus, fit, make_job):
    slots, why = count_slots(make_job("mlm", {"resources": {"gpus_per_worker": gpus}}))
    assert slots == fit
    assert "one GPU" in why


def test_trials_at_once_have_cpus_beside_a_gpu(make_job, monkeypatch):
    monkeypatch.setattr(rates, "_has_gpu", lambda: True)
    resources = {"gpus_per_worker": 0.25, "cpus_per_worker": os.cpu_count()}
    slots, why = count_slots(make_job("mlm", {"resources": resources}))
    assert slots == 1
    assert "this machine" in why


def test_settings_that_rates_are_told_by_exist(make_job):
    key = make_key(list_settings(make_job("mlm")), gpu=False)
    assert key[0] == "mlm"
    assert len(key) == len(rates.LIKE)
