"""Arms ranked from tables written by hand."""

import datetime

import numpy as np
import pytest
from scipy import stats

from raylab.job.settings import list_settings, with_settings
from raylab.results.ranking import compute_interval, find_front, label_arms, list_cells, rank_arms, summarise_heldout
from raylab.results.tables import write_rows
from raylab.runs.preparation import name_point, prepare

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
CELL = {"task": "severity", "metric": "f1_macro", "shots": 2, "frozen_layers": "all", "probe": "logistic"}


@pytest.fixture
def job(make_job):
    space = {"pretrain.declutr.temperature": [0.05, 0.1], "pretrain.declutr.sampling": ["any", "adjacent"]}
    return make_job("declutr", {"search": {"design": "grid", "space": space, "targets": [{"task": "severity"}]}})


@pytest.fixture
def write(job, tmp_path):
    """`write("arm", 0, 0.5)`: a trial with two draws around a value; keywords change its row or its cell."""

    def write_trial(arm, seed, value, *, values=(), cell=None, phase="fixed", status="complete", rung=2):
        trial_id = f"{arm}-{seed}"
        settings = {} if arm.startswith("baseline:") else list_settings(with_settings(job, dict(values)))
        row = {
            **settings, "arm": arm, "seed": seed, "phase": phase, "status": status, "rung": rung, "num_rungs": 2,
            "started_at": START,
        }  # fmt: skip
        write_rows(tmp_path, job.name, "trials", trial_id, [row])
        scores = [
            {**CELL, **(cell or {}), "rung": at, "draw": draw, "split": split, "value": other + (-0.1, 0.1)[draw]}
            for at, split, other in ((1, "validation", 0.9), (rung, "validation", value), (rung, "test", 1 - value))
            for draw in (0, 1)
        ]
        write_rows(tmp_path, job.name, "scores", trial_id, scores)

    return write_trial


def rank(job, folder, mode="max", base="base", split="validation", cell=CELL):
    return rank_arms(folder, job, "scores", cell, mode, base, split)


@pytest.mark.parametrize("num", [2, 3, 10])
def test_an_interval_is_that_of_student(num):
    values = list(np.random.default_rng(num).normal(0.5, 0.1, num))
    interval = compute_interval(values)
    test = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval == pytest.approx((np.mean(values), test.low, test.high, num))


def test_one_seed_has_no_interval():
    interval = compute_interval([0.5])
    assert interval.mean == 0.5
    assert interval.num_seeds == 1
    assert np.isnan([interval.low, interval.high]).all()


def test_differences_are_paired_on_shared_seeds(job, write, tmp_path):
    base, other = {0: 0.50, 1: 0.60, 2: 0.40, 3: 0.9}, {0: 0.55, 1: 0.70, 2: 0.45, 7: 0.1}
    for arm, values in (("base", base), ("other", other), ("alone", {8: 0.2})):
        for seed, value in values.items():
            write(arm, seed, value)
    rows = {row.arm: row for row in rank(job, tmp_path)}
    assert rows["base"].difference is None
    assert rows["alone"].difference is None
    assert rows["base"].value == pytest.approx(compute_interval(list(base.values())))
    assert rows["other"].value == pytest.approx(compute_interval(list(other.values())))
    paired = stats.ttest_rel([other[s] for s in (0, 1, 2)], [base[s] for s in (0, 1, 2)]).confidence_interval(0.95)
    assert rows["other"].difference == pytest.approx((0.2 / 3, paired.low, paired.high, 3))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_arm_stands_first(job, write, tmp_path, mode):
    for arm, value in (("a", 0.2), ("b", 0.6), ("base", 0.4)):
        write(arm, 0, value)
    ranked = [row.arm for row in rank(job, tmp_path, mode)]
    assert ranked == (["b", "base", "a"] if mode == "max" else ["a", "base", "b"])
    assert [row.arm for row in rank(job, tmp_path, mode, split="test")] == ranked[::-1]


def test_baselines_stand_in_the_list(job, write, tmp_path):
    write("base", 0, 0.4)
    write("base", 1, 0.6)
    for seed in (0, 1):
        write("baseline:tfidf", seed, 0.7, cell={"frozen_layers": None, "probe": None})
    baseline, base = rank(job, tmp_path)
    assert (baseline.arm, baseline.label, base.arm) == ("baseline:tfidf", "baseline:tfidf", "base")
    assert baseline.difference.mean == pytest.approx(0.2)
    assert baseline.difference.num_seeds == 2


def test_only_complete_trials_of_ranked_phases_count(job, write, tmp_path):
    write("base", 0, 0.4, phase="confirm")
    write("a", 0, 0.5, phase="confirm")
    write("a", 1, 0.9, phase="search")
    write("lucky", 0, 0.99, phase="search")
    write("stopped", 0, 0.8, status="stopped", rung=1)
    write("running", 0, 0.8, status="running")
    ranked = rank(job, tmp_path)
    assert [row.arm for row in ranked] == ["a", "base"]
    assert ranked[0].value.mean == pytest.approx(0.5)
    assert ranked[0].value.num_seeds == 1


def test_labels_say_what_sets_an_arm_apart(job, write, tmp_path):
    write("a", 0, 0.5, values={"pretrain.declutr.temperature": 0.1, "pretrain.declutr.sampling": "adjacent"})
    write("b", 0, 0.4, values={"pretrain.objective": "mlm"})
    write("baseline:majority", 0, 0.1)
    labels = label_arms(tmp_path, job)
    assert labels == {"a": "temperature=0.1, sampling=adjacent", "b": ""}
    assert {row.arm: row.label for row in rank(job, tmp_path, base="b")} == {
        "a": labels["a"], "b": "base", "baseline:majority": "baseline:majority"
    }  # fmt: skip


def test_cells_begin_with_the_target(make_job):
    target = {"task": "severity", "metric": "accuracy", "shots": 4, "mode": "max"}
    search = {"design": "grid", "targets": [target]}
    cells = list_cells(make_job("mlm", {"search": search, "evaluate.shots": [2, 4, "full"]}))
    assert [cell["shots"] for _, cell, _ in cells] == [4, 2, 4, None]
    assert [cell["metric"] for _, cell, _ in cells] == ["accuracy", "f1_macro", "f1_macro", "f1_macro"]
    geometry = {"table": "geometry", "task": "severity", "metric": "uniformity", "parameter": 2.0, "mode": "min"}
    table, cell, mode = list_cells(make_job("mlm", {"search": {**search, "targets": [geometry]}}))[0]
    assert (table, mode, cell["metric"]) == ("geometry", "min", "uniformity")


def test_searched_depths_are_ranked_each_at_its_own(make_job, write, tmp_path):
    space = {"evaluate.frozen_layers": ["all", "none"]}
    searched = make_job("declutr", {"search": {"design": "grid", "space": space}})
    write("base", 0, 0.4)
    write("none", 0, 0.6, values={"evaluate.frozen_layers": "none"}, cell={"frozen_layers": "none", "probe": "mlp"})
    write("baseline:majority", 0, 0.1, cell={"frozen_layers": None, "probe": None})
    ranked = rank(searched, tmp_path)
    assert [row.arm for row in ranked] == ["none", "base", "baseline:majority"]
    assert ranked[0].difference.mean == pytest.approx(0.2)
    assert ranked[0].label == 'frozen_layers=["none"]'


def test_heldout_measures_and_the_relative_change_of_the_error(job, write, tmp_path):
    for seed, (first, last) in enumerate([(0.2, 0.6), (0.1, 0.55)]):
        write("arm", seed, 0.5)
        curves = [
            {"step": step, "tokens": 10 * step, "metric": f"heldout_{metric}", "value": value}
            for metric, start, end in (("retrieval_accuracy", first, last), ("mlm_loss", 6.0, 4.0 + seed))
            for step, value in ((0, start), (5, 99.0), (9, end))
        ]
        write_rows(tmp_path, job.name, "curves", f"arm-{seed}", curves)
    measures = summarise_heldout(tmp_path, job)["arm"]
    assert measures["mlm_loss"] == pytest.approx(compute_interval([4.0, 5.0]))
    assert measures["retrieval_error"] == pytest.approx(compute_interval([0.4, 0.45]))
    assert measures["retrieval_error_change"] == pytest.approx(
        compute_interval([0.4 / 0.8 - 1, 0.45 / 0.9 - 1]), nan_ok=True
    )


def test_the_front_holds_the_arms_that_no_other_beats(make_job, write, tmp_path):
    """Over the means of two seeds, one target to be high and one low; arms without a value for both are left out."""
    space = {"pretrain.declutr.temperature": [0.05, 0.1]}
    targets = [{"task": "severity"}, {"task": "severity", "shots": 4, "mode": "min"}]
    changes = {"search": {"design": "grid", "space": space, "targets": targets}, "evaluate.shots": [2, 4]}
    job = make_job("declutr", changes)
    arms = {"high": (0.9, 0.8), "low": (0.2, 0.1), "between": (0.5, 0.4), "beaten": (0.4, 0.5), "equal": (0.5, 0.4)}
    for arm, pair in arms.items():
        for seed, off in ((0, -0.05), (1, 0.05)):
            write(arm, seed, pair[0] + off)
            both = [
                {**CELL, "shots": shots, "rung": 2, "draw": 0, "split": "validation", "value": value + off}
                for shots, value in zip((2, 4), pair, strict=True)
            ]
            write_rows(tmp_path, job.name, "scores", f"{arm}-{seed}", both)
    write("half", 0, 0.99)
    write("baseline:tfidf", 0, 1.0, cell={"frozen_layers": None, "probe": None})
    front = find_front(tmp_path, job, "high")
    assert [member.arm for member in front] == ["high", "between", "equal", "low"] or [
        member.arm for member in front
    ] == ["high", "equal", "between", "low"]
    assert front[0].label == "temperature=0.05"
    assert [value.mean for value in front[0].values] == pytest.approx([0.9, 0.8])
    assert front[0].values[0] == pytest.approx(compute_interval([0.85, 0.95]))
    assert [m.arm for m in find_front(tmp_path, job, "high", arms=["beaten", "low"])] == ["beaten", "low"]
    assert find_front(tmp_path, make_job("declutr"), "high") == []


def test_the_front_is_printed(make_job, write, tmp_path, notes, capsys):
    from raylab.commands.output import print_ranking

    targets = [{"task": "severity"}, {"task": "severity", "metric": "accuracy", "mode": "min"}]
    space = {"pretrain.declutr.temperature": [0.05, 0.1]}
    job = make_job("declutr", {"search": {"design": "grid", "space": space, "targets": targets}})
    preparation = prepare(job, tmp_path)
    for value, temperature in ((0.7, 0.05), (0.6, 0.1)):
        arm, _ = name_point(preparation, {"pretrain.declutr.temperature": temperature})
        write(arm, 0, value, values={"pretrain.declutr.temperature": temperature})
        rows = [
            {**CELL, "metric": metric, "rung": 2, "draw": 0, "split": "validation", "value": value}
            for metric in ("f1_macro", "accuracy")
        ]
        write_rows(tmp_path, job.name, "scores", f"{arm}-0", rows)
    print_ranking(job, tmp_path)
    text = " ".join(capsys.readouterr().out.split())
    front = text.partition("Pareto front")[2].partition("tables:")[0]
    assert front.count("temperature=") == 2
    assert "0.700" in front
    assert "0.600" in front
