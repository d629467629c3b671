"""A job's arms as an Optuna study: what Optuna reads back is what the tables hold."""

import optuna
import pytest

from raylab.base.mistakes import JobError
from raylab.job.settings import list_settings, with_settings
from raylab.results.tables import now, write_rows
from raylab.statistics.studies import write_study

SPACE = {
    "pretrain.objective": ["mlm", "declutr"],
    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "pretrain.weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
    "pretrain.declutr.max_span": {"low": 8, "high": 24, "step": 8},
}
MLM = {"pretrain.objective": "mlm", "pretrain.learning_rate": 1e-3, "pretrain.weight_decay": 0.3}
DECLUTR = {**MLM, "pretrain.objective": "declutr", "pretrain.declutr.max_span": 16}


@pytest.fixture
def make(make_job):
    def build(design="tpe", **search):
        targets = [{"task": "severity"}]
        return make_job("declutr", {"search": {"design": design, "space": SPACE, "targets": targets, **search}})

    return build


def write_trial(job, folder, arm, values, *, seed=0, status="complete", phase="search", found=(0.5,), rungs=()):
    row = {
        **list_settings(with_settings(job, values)), "arm": arm, "seed": seed, "phase": phase, "status": status,
        "rung": 1, "num_rungs": 2, "started_at": now(), "updated_at": now(), "target_values": list(found),
        "rung_values": list(rungs), "wall_seconds": 2.0, "gpu_seconds": 0.0,
    }  # fmt: skip
    write_rows(folder, job.name, "trials", f"{arm}-{seed}{phase}", [row])


def open_study(path, name="tiny"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def test_optuna_reads_back_settings_values_and_states(make, tmp_path):
    job = make(num_arms=5, seeds=[0, 1], confirm={"top": 1, "seeds": [7]})
    for seed, value in ((0, 0.4), (1, 0.6)):
        write_trial(job, tmp_path, "a", DECLUTR, seed=seed, found=[value], rungs=[value - 0.2, value])
    write_trial(job, tmp_path, "a", DECLUTR, seed=7, phase="confirm", found=[0.9])
    write_trial(job, tmp_path, "b", MLM, status="stopped", rungs=[0.1])
    write_trial(job, tmp_path, "b", MLM, seed=1, status="complete", rungs=[0.3, 0.5])
    low = {**MLM, "pretrain.weight_decay": 0.0}
    write_trial(job, tmp_path, "c", low)
    write_trial(job, tmp_path, "d", {**low, "pretrain.learning_rate": 2e-5}, status="failed", found=[])
    write_trial(job, tmp_path, "base", {}, phase="confirm", seed=7)
    write_trial(job, tmp_path, "old", {**MLM, "pretrain.mlm.weight": 3.0})

    path = tmp_path / "study.db"
    assert write_study(tmp_path, job, path) == 4
    trials = {trial.user_attrs["arm"]: trial for trial in open_study(path).trials}
    assert trials.keys() == {"a", "b", "c", "d"}
    assert {arm: trial.state.name for arm, trial in trials.items()} == {
        "a": "COMPLETE", "b": "PRUNED", "c": "RUNNING", "d": "FAIL",
    }  # fmt: skip
    first = trials["a"]
    assert first.value == pytest.approx(0.5)
    assert first.params == DECLUTR
    assert first.intermediate_values == pytest.approx({1: 0.3, 2: 0.5})
    assert first.user_attrs["seeds"] == {"0": [0.4], "1": [0.6]}
    assert first.user_attrs["confirmed"] == {"7": [0.9]}
    assert first.user_attrs["wall_seconds"] == 6.0
    assert trials["b"].params == MLM
    assert trials["b"].intermediate_values == pytest.approx({1: 0.2})
    assert open_study(path).best_trial.user_attrs["arm"] == "a"

    # Again, as a job goes on: the file is replaced whole.
    write_trial(job, tmp_path, "c", low, seed=1, found=[0.7])
    assert write_study(tmp_path, job, path) == 4
    assert open_study(path).best_value == pytest.approx(0.6)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["study.db"]


def test_several_targets_are_several_values(make, tmp_path):
    targets = [{"task": "severity"}, {"table": "geometry", "task": "severity", "metric": "uniformity", "mode": "min"}]
    job = make("nsga2", num_arms=4, targets=targets)
    write_trial(job, tmp_path, "a", MLM, found=[0.4, -2.0], rungs=[0.4])
    path = tmp_path / "study.db"
    write_study(tmp_path, job, path)
    study = open_study(path)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.trials[0].values == [0.4, -2.0]
    assert study.metric_names == ["severity f1_macro", "severity uniformity"]


def test_arms_around_a_base_show_every_setting_at_its_own_level(make, tmp_path):
    space = {"pretrain.learning_rate": [1e-3, 3e-3], "pretrain.weight_decay": [0.0, 0.2]}
    job = make("one_factor", space=space)
    base = {name: list_settings(job)[name] for name in space}
    write_trial(job, tmp_path, "base", {}, phase="fixed")
    write_trial(job, tmp_path, "other", {"pretrain.weight_decay": 0.2}, phase="fixed", found=[0.6])
    path = tmp_path / "study.db"
    assert write_study(tmp_path, job, path) == 2
    params = {trial.user_attrs["arm"]: trial.params for trial in open_study(path).trials}
    assert params == {"base": base, "other": {**base, "pretrain.weight_decay": 0.2}}


def test_what_can_t_be_shown_is_refused(make, make_job, tmp_path):
    job = make(num_arms=3)
    with pytest.raises(JobError, match="tiny has no trial of its search yet; run it first"):
        write_study(tmp_path, job, tmp_path / "study.db")
    write_trial(job, tmp_path, "a", MLM)
    with pytest.raises(JobError, match="No such file or directory; choose a file that can be written"):
        write_study(tmp_path, job, tmp_path / "absent" / "study.db")
    with pytest.raises(JobError, match=r"tiny has no search\.targets"):
        write_study(tmp_path, make_job("mlm"), tmp_path / "study.db")
