"""A job's arms compared, from tables written by hand."""

import datetime

import numpy as np
import pytest

from raylab.base.mistakes import JobError
from raylab.job.primary import read_cell_target
from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.results.tables import now, write_rows
from raylab.runs.plan import plan_comparisons, tell_comparisons
from raylab.statistics.analysis import (
    analyse_job,
    compare_named,
    count_family,
    list_arms,
    measure_gap,
    read_scores,
    tell_gap,
)
from raylab.statistics.comparisons import compare_arms, count_least_seeds
from raylab.statistics.verdicts import EXPLORATORY, PRIMARY, tell_verdicts

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
CELL = {"task": "severity", "metric": "f1_macro", "shots": 2, "frozen_layers": "all", "probe": "logistic"}
SPACE = {"pretrain.objective": ["none", "mlm", "declutr"]}
NAMES = {"none": 0.3, "mlm": 0.5, "declutr": 0.6}


@pytest.fixture
def write(tmp_path):
    """`write(job, "arm", 0, 0.5, values)`: a complete trial with two draws about a value, and a row of its search."""

    def write_trial(job, arm, seed, value, values=None, *, phase="fixed", split="validation", cell=None, start=START,
                    status="complete", target=None):  # fmt: skip
        trial_id = f"{arm}-{seed}"
        settings = {} if arm.startswith("baseline:") else list_settings(with_settings(job, values or {}))
        row = {
            **settings, "arm": arm, "seed": seed, "phase": phase, "status": status, "rung": 1, "num_rungs": 1,
            "started_at": start, "target_values": [value if target is None else target],
        }  # fmt: skip
        write_rows(tmp_path, job.name, "trials", trial_id, [row])
        shared = {**CELL, **(cell or {}), "rung": 1, "split": split}
        rows = [{**shared, "draw": draw, "value": value + off} for draw, off in ((0, -0.1), (1, 0.1))]
        suffix = ".test" if split == "test" else ""
        write_rows(tmp_path, job.name, "scores", trial_id, rows, suffix)

    return write_trial


@pytest.fixture
def objectives(make_job, write, tmp_path):
    """`objectives(9, analysis)`: a grid over objectives that ran on so many seeds; the base arm is DeCLUTR."""

    def run(num_seeds, analysis=None, noise=0.01):
        rng = np.random.default_rng(0)
        job = make_job("declutr", {"search": {"design": "grid", "space": SPACE}, "analysis": analysis or {}})
        for name, mean in NAMES.items():
            for seed in range(num_seeds):
                write(job, name, seed, mean + rng.normal(0, noise), {"pretrain.objective": name})
        return job

    return run


def test_the_arms_are_those_of_the_job_as_it_is_on_the_newest_data(objectives, write, make_job, tmp_path):
    job = objectives(2)
    write(job, "newer", 0, 0.9, {"pretrain.objective": "mlm"}, start=START + datetime.timedelta(days=1))
    write(job, "gone", 0, 0.9, {"pretrain.objective": "mlm", "pretrain.learning_rate": 5e-3})
    write(job, "baseline:tfidf", 0, 0.9)
    arms = list_arms(tmp_path, job)
    assert set(arms.rows) == {"none", "newer", "declutr"}
    assert arms.base == "declutr"
    assert arms.labels == {"none": "objective=none", "newer": "objective=mlm", "declutr": "objective=declutr"}


def test_the_primary_comparison_is_alone_and_the_rest_one_family(objectives, tmp_path):
    job = objectives(9, {"primary": "objective=declutr vs objective=mlm at shots=2, frozen_layers=all"})
    verdicts, notes = analyse_job(tmp_path, job)
    assert notes == []
    assert [(v.role, v.comparison.a, v.comparison.b) for v in verdicts] == [
        (PRIMARY, "declutr", "mlm"), (EXPLORATORY, "none", "declutr")
    ]  # fmt: skip
    first = verdicts[0].comparison
    assert (first.num_comparisons, first.p_holm) == (1, first.p)
    assert first.better == "a"
    assert tell_verdicts(verdicts)[0].startswith("Primary: objective=declutr beats objective=mlm: ")
    assert verdicts[0].sentence.endswith("; given this split.")
    cell = resolve_target(job, job.search.targets[0]) if job.search.targets else {**CELL, "class": None}
    scores = read_scores(tmp_path, job, cell)
    assert scores["mlm"][0].keys() == {0, 1}
    assert [first] == compare_arms(scores, [("declutr", "mlm")])


def test_all_pairs_are_a_family_of_their_own(objectives, tmp_path):
    job = objectives(9, {"primary": "objective=declutr vs objective=mlm", "family": "pairs"})
    verdicts, _ = analyse_job(tmp_path, job)
    explored = [verdict.comparison for verdict in verdicts if verdict.role == EXPLORATORY]
    assert [{row.a, row.b} for row in explored] == [{"none", "mlm"}, {"none", "declutr"}] or len(explored) == 2
    assert {row.num_comparisons for row in explored} == {2}


def test_without_a_declaration_all_is_exploratory_and_said_so(objectives, tmp_path):
    verdicts, notes = analyse_job(tmp_path, objectives(3))
    assert {verdict.role for verdict in verdicts} == {EXPLORATORY}
    assert notes == ["no primary comparison was declared (analysis.primary): all of these are exploratory"]
    assert all(verdict.comparison.better is None for verdict in verdicts)
    assert "p is never under 0.25" in verdicts[0].sentence


def test_a_primary_arm_that_has_not_run_is_told(objectives, write, make_job, tmp_path):
    job = objectives(2, {"primary": "objective=declutr vs objective=mlm"})
    for seed in (0, 1):
        (tmp_path / job.name / "trials" / f"mlm-{seed}.parquet").unlink()
    verdicts, [note] = analyse_job(tmp_path, job)
    assert note.startswith("primary comparison: 'objective=mlm': has no complete trial in tiny")
    assert [verdict.role for verdict in verdicts] == [EXPLORATORY]


def test_arms_are_compared_by_settings_by_name_and_with_baselines(objectives, write, tmp_path):
    job = objectives(6, {"primary": "objective=declutr vs objective=mlm"})
    for seed in range(6):
        write(job, "baseline:tfidf", seed, 0.7, cell={"frozen_layers": None, "probe": None})
    assert compare_named(tmp_path, job, ("objective=mlm", "declutr")).role == PRIMARY
    other = compare_named(tmp_path, job, ("baseline:tfidf", "objective=none"))
    assert (other.role, other.comparison.better) == (EXPLORATORY, "a")
    assert other.comparison.difference == pytest.approx(0.4, abs=0.02)
    for pair, problem in {
        ("objective=mlm", "mlm"): "are the same arm",
        ("objective=mln", "mlm"): "did you mean 'mlm'",
        ("objective=mlm", "baseline:majority"): "has no value of validation",
    }.items():
        with pytest.raises(JobError, match=problem):
            compare_named(tmp_path, job, pair)


def make_search(make_job, primary=None):
    search = {
        "design": "tpe", "num_arms": 4, "targets": [{"task": "severity"}], "confirm": {"top": 2, "seeds": [5, 6, 7]},
        "space": {"pretrain.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}, "seeds": [0, 1],
    }  # fmt: skip
    return make_job("mlm", {"search": search, "analysis": {"primary": primary}})


def test_only_confirmed_arms_are_compared_and_the_winner_is_that_of_the_search(make_job, write, tmp_path):
    job = make_search(make_job, "winner vs base")
    for arm, rate, found in (("lucky", 1e-4, 0.9), ("second", 2e-4, 0.8), ("third", 3e-4, 0.7)):
        for seed in (0, 1):
            write(job, arm, seed, found, {"pretrain.learning_rate": rate}, phase="search")
        if arm != "third":
            for seed in (5, 6, 7):
                confirmed = 0.6 if arm == "lucky" else 0.65
                write(job, arm, seed, confirmed, {"pretrain.learning_rate": rate}, phase="confirm")
    for seed in (5, 6, 7):
        write(job, "base", seed, 0.5, phase="confirm")
    verdicts, notes = analyse_job(tmp_path, job)
    assert notes == []
    assert [(v.role, v.comparison.a, v.comparison.b) for v in verdicts] == [
        (PRIMARY, "lucky", "base"), (EXPLORATORY, "second", "base")
    ]  # fmt: skip
    assert verdicts[0].label_a == "winner"
    assert verdicts[0].comparison.difference == pytest.approx(0.1)
    named = compare_named(tmp_path, job, ("learning_rate=2e-4", "base"))
    assert named.comparison.a == "second"
    with pytest.raises(JobError, match="'learning_rate=3e-4': has no confirmed trial"):
        compare_named(tmp_path, job, ("learning_rate=3e-4", "base"))


def test_the_winner_stands_beside_its_unsealed_score(objectives, write, tmp_path):
    job = objectives(3, noise=0.0)
    sealed = measure_gap(tmp_path, job)
    assert (sealed.arm, sealed.test, sealed.gap, sealed.num_unseals) == ("declutr", None, None, 0)
    assert "its test score is sealed" in tell_gap(sealed)
    for seed, value in enumerate((0.5, 0.52, 0.54)):
        rows = [{**CELL, "rung": 1, "split": "test", "draw": draw, "value": value} for draw in (0, 1)]
        write_rows(tmp_path, job.name, "scores", f"declutr-{seed}", rows, ".test")
        record = {"at": START, "by": "someone", "reason": ""}
        write_rows(tmp_path, job.name, "unseals", f"declutr-{seed}", [record], ".first")
    write_rows(tmp_path, job.name, "unseals", "mlm-0", [{"at": now(), "by": "someone", "reason": ""}], ".second")
    gap = measure_gap(tmp_path, job)
    assert gap.validation.mean == pytest.approx(0.6)
    assert gap.test.mean == pytest.approx(0.52)
    assert (gap.gap.mean, gap.gap.num_seeds, gap.num_unseals) == (pytest.approx(-0.08), 3, 2)
    assert "a gap of -0.080 [" in tell_gap(gap)
    assert "opened 2 times" in tell_gap(gap)


@pytest.mark.parametrize(
    ("search", "analysis", "family", "warned"),
    [
        ({"seeds": [0, 1, 2]}, {}, 2, ["2 exploratory comparisons"]),
        ({"seeds": list(range(7))}, {}, 2, []),
        ({"seeds": [0, 1, 2]}, {"primary": "objective=mlm vs base"}, 1, ["the primary comparison", "1 exploratory"]),
        ({"seeds": list(range(6))}, {"primary": "objective=mlm vs base"}, 1, []),
        ({"seeds": list(range(6))}, {"primary": "objective=mlm vs objective=none"}, 2, ["2 exploratory comparisons"]),
        ({"seeds": list(range(6))}, {"primary": "objective=mlm vs baseline:tfidf"}, 2, ["2 exploratory comparisons"]),
        ({"seeds": list(range(6))}, {"family": "pairs"}, 3, ["3 exploratory comparisons"]),
        ({"seeds": list(range(6))}, {"family": "pairs", "primary": "objective=mlm vs objective=none"}, 2, ["2 expl"]),
    ],
)
def test_plan_says_how_many_seeds_the_declared_comparisons_need(make_job, search, analysis, family, warned):
    job = make_job("declutr", {"search": {"design": "grid", "space": SPACE, **search}, "analysis": analysis})
    assert count_family(job) == family
    found = plan_comparisons(job)
    assert found["seeds_at_least"]["exploratory"] == count_least_seeds(family)
    assert found["seeds_at_least"]["primary"] == (6 if "primary" in analysis else None)
    assert len(found["warnings"]) == len(warned)
    for line, part in zip(found["warnings"], warned, strict=True):
        assert line.startswith("search.seeds: ")
        assert part in line


def test_plan_counts_the_seeds_of_a_confirmation(make_job):
    found = plan_comparisons(make_search(make_job, "winner vs base"))
    assert (found["seeds"], found["family"]) == (3, 1)
    assert tell_comparisons(found).startswith(
        "comparisons: 3 seeds an arm; needed at least: 6 for the primary one, 6 for 1 exploratory one; "
    )
    assert found["warnings"][0].startswith(
        "search.confirm.seeds: 3 can't show the primary comparison (p is never under 0.25)"
    )
    lonely = make_search(make_job)
    lonely = lonely.model_copy(update={"search": lonely.search.model_copy(update={"confirm": None})})
    found = plan_comparisons(lonely)
    [warning] = found["warnings"]
    assert "search.confirm is not set" in warning
    assert tell_comparisons(found) is None


def test_a_winner_that_is_the_base_arm_is_told(make_job, write, tmp_path):
    job = make_search(make_job, "winner vs base")
    write(job, "base", 0, 0.9, phase="search")
    write(job, "other", 0, 0.8, {"pretrain.learning_rate": 2e-4}, phase="search")
    for seed in (5, 6, 7):
        write(job, "base", seed, 0.9, phase="confirm")
        write(job, "other", seed, 0.8, {"pretrain.learning_rate": 2e-4}, phase="confirm")
    verdicts, [note] = analyse_job(tmp_path, job)
    assert [verdict.role for verdict in verdicts] == [EXPLORATORY]
    assert note == "primary comparison: 'winner' and 'base' turned out to be one arm, base"


def test_in_another_cell_than_the_declared_all_is_exploratory(objectives, write, tmp_path):
    job = objectives(2, {"primary": "objective=declutr vs objective=mlm"})
    for name in NAMES:
        for seed in (0, 1):
            rows = [{**CELL, "metric": "accuracy", "rung": 1, "split": "validation", "draw": 0, "value": 0.5 + seed}]
            write_rows(tmp_path, job.name, "scores", f"{name}-{seed}", rows)
    verdicts, [note] = analyse_job(tmp_path, job, read_cell_target(job, {"metric": "accuracy"}))
    assert {verdict.role for verdict in verdicts} == {EXPLORATORY}
    assert note.startswith("the declared comparison is of another cell")
    with pytest.raises(JobError, match="no ranked arm of tiny has a value of test at task=severity"):
        analyse_job(tmp_path, job, split="test")
