"""Early stopping: which running trials of a search are stopped, from the tables alone."""

import datetime

import pytest

from raylab.job.settings import list_measures
from raylab.job.specs import TrialSpec
from raylab.results.tables import digest_measures, list_summaries, table_path, write_rows
from raylab.search.judge import decide, keep_going

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
TARGET = {"task": "severity"}


def make_stopping(make_job, changes=None, space=None):
    search = {
        "design": "random", "num_arms": 8, "targets": [TARGET], "early_stopping": "successive_halving",
        "space": space or {"pretrain.declutr.temperature": {"low": 0.01, "high": 1.0}},
    }  # fmt: skip
    return make_job("declutr", {"pretrain.rungs": 4, "search": search, **(changes or {})})


def write_scores(folder, job, name, values, *, phase="search"):
    """A trial whose target was `values` at rungs 1, 2 and so on."""
    row = {
        **list_measures(job), "arm": name, "seed": 0, "phase": phase,
        "measures": digest_measures(list_measures(job), job.search.space),
        "status": "running", "rung": len(values), "num_rungs": 4, "started_at": START,
    }  # fmt: skip
    write_rows(folder, job.name, "trials", f"{name}-0", [row | {"rung_values": list(values)}])


def judge(folder, job, name, rung, phase="search"):
    spec = TrialSpec(
        job=job.name, arm=name, trial_id=f"{name}-0", phase=phase, seed=0, settings=job, results=str(folder),
        corpus="", tokens={}, tokenizer="", encoder_digest="", data_digest="",
    )  # fmt: skip
    return decide(spec, rung)


def test_a_bad_trial_is_stopped_and_a_good_one_goes_on(make_job, tmp_path, capfd):
    job = make_stopping(make_job)
    for index, value in enumerate((0.4, 0.5, 0.6, 0.7)):
        write_scores(tmp_path, job, f"other{index}", [value, value])
    write_scores(tmp_path, job, "bad", [0.3])
    write_scores(tmp_path, job, "good", [0.8])
    assert not judge(tmp_path, job, "bad", 1)
    assert judge(tmp_path, job, "good", 1)
    # The second rung is judged as well, among those that came so far.
    write_scores(tmp_path, job, "good", [0.8, 0.1])
    assert not judge(tmp_path, job, "good", 2)
    write_scores(tmp_path, job, "good", [0.8, 0.9])
    assert judge(tmp_path, job, "good", 2)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    "changes",
    [{"pretrain.rungs": 2}, {"pretrain.num_tokens": 99_000}, {"search.targets": [{**TARGET, "metric": "accuracy"}]}],
)
def test_values_of_other_rungs_budgets_and_targets_stop_no_trial(make_job, tmp_path, changes):
    """A finished job that is asked for more: its old values stay in the tables until its trials ran again."""
    job, earlier = make_stopping(make_job), make_stopping(make_job, changes)
    for index, value in enumerate((0.4, 0.5, 0.6, 0.7)):
        write_scores(tmp_path, earlier, f"other{index}", [value])
    write_scores(tmp_path, job, "new", [0.3])
    assert judge(tmp_path, job, "new", 1)


def test_a_damaged_file_of_another_trial_fails_none(make_job, tmp_path):
    job = make_stopping(make_job)
    write_scores(tmp_path, job, "good", [0.8])
    write_scores(tmp_path, job, "damaged", [0.9])
    path = table_path(tmp_path, job.name, "trials", "damaged-0")
    path.write_bytes(path.read_bytes()[:-100])
    assert judge(tmp_path, job, "good", 1)


def test_the_first_trial_goes_on(make_job, tmp_path):
    job = make_stopping(make_job)
    write_scores(tmp_path, job, "first", [0.1])
    assert judge(tmp_path, job, "first", 1)


def test_a_minimised_target_stops_high_values(make_job, tmp_path):
    job = make_stopping(make_job, {"search.targets": [{**TARGET, "mode": "min"}]})
    for index, value in enumerate((0.4, 0.5, 0.6, 0.7)):
        write_scores(tmp_path, job, f"other{index}", [value])
    write_scores(tmp_path, job, "low", [0.3])
    write_scores(tmp_path, job, "high", [0.8])
    assert judge(tmp_path, job, "low", 1)
    assert not judge(tmp_path, job, "high", 1)


@pytest.mark.parametrize("phase", ["confirm", "fixed"])
def test_only_a_search_stops_trials(make_job, tmp_path, phase):
    job = make_stopping(make_job)
    for index, value in enumerate((0.4, 0.5, 0.6, 0.7)):
        write_scores(tmp_path, job, f"other{index}", [value])
    write_scores(tmp_path, job, "bad", [0.1], phase=phase)
    assert judge(tmp_path, job, "bad", 1, phase)
    # Nor are other phases what a search is judged by.
    for index in range(4):
        write_scores(tmp_path, job, f"other{index}", [0.9], phase=phase)
    write_scores(tmp_path, job, "bad", [0.1])
    assert judge(tmp_path, job, "bad", 1)
    off = make_stopping(make_job, {"search.early_stopping": "none"})
    assert keep_going(off, list_summaries(tmp_path, job.name), "bad-0", 1)
