"""A job's trials as TensorBoard runs: what TensorBoard's own reader finds is what the tables hold."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from raylab.base.mistakes import JobError
from raylab.job.settings import list_settings, with_settings
from raylab.results.events import write_runs
from raylab.results.tables import now, write_rows

SPACE = {"pretrain.objective": ["mlm", "declutr"], "pretrain.learning_rate": [1e-3, 3e-3]}
CELL = {"task": "severity", "split": "validation", "metric": "f1_macro", "frozen_layers": "all", "probe": "logistic"}
F1 = "scores/severity/f1_macro/shots=2/frozen_layers=all/probe=logistic"


@pytest.fixture
def job(make_job):
    return make_job("declutr", {"search": {"design": "grid", "space": SPACE, "seeds": [0, 1]}})


def write_trial(job, folder, trial_id, values, rungs):
    """A trial that has come so far: a curve, scores of two draws, and geometry."""
    settings = list_settings(with_settings(job, values))
    arm, _, seed = trial_id.rpartition("-")
    row = {"arm": arm, "seed": int(seed), "phase": "fixed", "status": "running", "rung": rungs, "num_rungs": 2}
    write_rows(folder, job.name, "trials", trial_id, [{**settings, **row, "started_at": now()}])
    curve = [{"step": 10 * rung, "tokens": 100, "metric": "loss", "value": 5.0 - rung} for rung in range(1, rungs + 1)]
    write_rows(folder, job.name, "curves", trial_id, curve)
    scores = [
        {**CELL, "shots": 2, "rung": rung, "draw": draw, "value": 0.1 * rung + 0.2 * draw}
        for rung in range(1, rungs + 1) for draw in (0, 1)
    ]  # fmt: skip
    scores += [{**CELL, "shots": None, "rung": 1, "draw": 0, "value": 0.9}] if rungs else []
    scores += [{**row, "class": "low", "value": 0.1} for row in scores[:1]]
    scores += [{**row, "split": "test", "value": 0.1} for row in scores[:1]]
    write_rows(folder, job.name, "scores", trial_id, scores)
    geometry = [
        {"task": "severity", "split": "validation", "rung": rung, "num_points": 9} for rung in range(1, rungs + 1)
    ]
    geometry = [{**row, **of} for row in geometry for of in (
        {"metric": "uniformity", "parameter": 2.0, "value": -1.0}, {"metric": "isoscore", "value": 0.5},
        {"metric": "cosine_within_share", "parameter": 0.1, "value": 0.5},
    )]  # fmt: skip
    write_rows(folder, job.name, "geometry", trial_id, geometry)


def read_run(path):
    """Tag -> its points, step and value."""
    found = EventAccumulator(str(path)).Reload()
    return found, {
        tag: [(p.step, pytest.approx(p.value)) for p in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def test_tensorboard_reads_what_the_tables_hold(job, tmp_path):
    write_trial(job, tmp_path, "a-0", {"pretrain.objective": "mlm"}, 2)
    write_trial(job, tmp_path, "b-1", {}, 0)
    write_rows(tmp_path, job.name, "trials", "baseline:tfidf-0", [{"arm": "baseline:tfidf", "started_at": now()}])
    assert write_runs(tmp_path, job, tmp_path / "runs") == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"a-0", "b-1"}
    found, points = read_run(tmp_path / "runs" / "a-0")
    assert points == {
        "curves/loss": [(10, 4.0), (20, 3.0)],
        F1: [(1, 0.2), (2, 0.3)],
        F1.replace("shots=2", "shots=full"): [(1, 0.9)],
        "geometry/severity/uniformity at 2.0": [(1, -1.0), (2, -1.0)],
        "geometry/severity/isoscore": [(1, 0.5), (2, 0.5)],
    }
    (text,) = found.Tensors("settings/text_summary") if "settings/text_summary" in found.Tags()["tensors"] else (
        found.Tensors("settings")
    )  # fmt: skip
    told = text.tensor_proto.string_val[0].decode()
    assert "| searched | objective=mlm, learning_rate=0.001 |" in told
    assert "| pretrain.num_tokens | 12000 |" in told
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: value.string_value or value.number_value for name, value in values.items()} == {
        "pretrain.objective": "mlm", "pretrain.learning_rate": 1e-3, "seed": 0.0
    }  # fmt: skip
    assert read_run(tmp_path / "runs" / "b-1")[1] == {}


def test_written_again_it_doubles_nothing_even_where_it_is_open(job, tmp_path):
    write_trial(job, tmp_path, "a-0", {}, 1)
    run = tmp_path / "runs" / "a-0"
    write_runs(tmp_path, job, tmp_path / "runs")
    opened = EventAccumulator(str(run)).Reload()
    assert [point.step for point in opened.Scalars("curves/loss")] == [10]
    write_trial(job, tmp_path, "a-0", {}, 2)
    for _ in range(2):
        write_runs(tmp_path, job, tmp_path / "runs")
        opened.Reload()
        assert [point.step for point in opened.Scalars("curves/loss")] == [10, 20]
        assert [point.step for point in opened.Scalars(F1)] == [1, 2]
        assert [point.step for point in read_run(run)[0].Scalars("curves/loss")] == [10, 20]
        assert [path.stat().st_size > 0 for path in sorted(run.iterdir())] == [False, True]


def test_what_can_t_be_written_is_told_in_one_line(job, tmp_path, monkeypatch):
    with pytest.raises(JobError, match="tiny has no trial yet; run it first"):
        write_runs(tmp_path, job, tmp_path / "runs")
    write_trial(job, tmp_path, "a-0", {}, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="Not a directory; choose a folder that can be written"):
        write_runs(tmp_path, job, tmp_path / "file" / "runs")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(JobError, match=r"tensorboard: the package is not there; pip install 'raylab\[tensorboard\]'"):
        write_runs(tmp_path, job, tmp_path / "runs")
