"""Fine-tuned cells of trials of two workers, under Ray Train: the numbers of one, kept, resumed, and never hanging."""

import contextlib
import os
import threading

import numpy as np
import pytest

from raylab.evaluation import cells
from raylab.evaluation.finetune import Tuning
from raylab.results.tables import read_rows, read_trial
from raylab.runs import sweep
from raylab.runs.trial import run_trial
from raylab.store.stages import FOLDER

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CELLS = {
    "pretrain": None,
    "pretrain.objective": "none",
    "encoder.config.dropout": 0.0,
    "evaluate.tasks": ["condition"],
    "evaluate.shots": [1, "full"],
    "evaluate.draws": 1,
    "evaluate.frozen_layers": ["none", "1"],
    "evaluate.fine_tune": {"steps": 60, "hidden_size": 8, "class_weights": "balanced"},
    "evaluate.geometry": {"max_points": 30, "graph_points": 30},
    "resources": {"workers": 2, "gpus_per_worker": 0},
}
# One cell, of three parts.
LONG = {**CELLS, "evaluate.shots": ["full"], "evaluate.frozen_layers": ["1"]}
LONG |= {"evaluate.fine_tune": {"steps": 120, "hidden_size": 8}}


class CrashError(Exception):
    """What the tests let a worker die of."""


@pytest.fixture(scope="module")
def cluster():
    """Ray on two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sweep.ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def run_pair(cluster, tmp_path, monkeypatch):
    """`run_pair(spec, die)`: a trial of two workers; its error, and (rank, step, until) of each training.

    In a worker's process `prepare()` is called first, and `die(rank, step)` before each; parts are of 50 steps.
    """
    from raylab.runs import workers

    def run(spec, die=None, prepare=lambda: None):
        notes = tmp_path / "begun"
        notes.mkdir(exist_ok=True)

        def work(config):
            import torch.distributed as dist

            from raylab.evaluation import cells
            from raylab.evaluation.finetune import Tuning
            from raylab.runs.workers import train_worker

            cells.PART_STEPS, real = 50, Tuning.train

            def note(self, until, *how):
                with (notes / str(dist.get_rank())).open("a") as stream:
                    stream.write(f"{self.step} {until}\n")
                if die is not None:
                    die(dist.get_rank(), self.step)
                real(self, until, *how)

            Tuning.train = note
            prepare()
            train_worker(config)

        monkeypatch.setattr(workers, "train_worker", work)
        errors = []

        def fit():
            try:
                workers._train_with_workers(spec)
            except Exception as error:
                errors.append(error)

        fitting = threading.Thread(target=fit, daemon=True)
        fitting.start()
        fitting.join(480)
        assert not fitting.is_alive(), "it hangs"
        begun = [
            (int(file.name), *map(int, line.split()))
            for file in sorted(notes.iterdir())
            for line in file.read_text().splitlines()
        ]
        for file in notes.iterdir():
            file.unlink()
        return (errors[0] if errors else None), begun

    return run


def read_cells(folder):
    """The probabilities of the kept cells, by the ids of their stages."""
    return {path.parent.name: np.load(path) for path in (folder / FOLDER).glob("cell-*/probabilities.npy")}


def assert_same_cells(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, probabilities in theirs.items():
        np.testing.assert_allclose(ours[name], probabilities, atol=1e-3)


@pytest.fixture(scope="module")
def alone(make_spec, tmp_path_factory):
    """The long cell of one worker that nothing broke: its probabilities."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "PART_STEPS", 50)
        run_trial(make_spec("mlm", LONG, folder=folder))
    return read_cells(folder)


def test_two_workers_give_the_cells_of_one(run_pair, make_spec, tmp_path):
    """A small one is rank 0's alone."""
    specs = [make_spec("mlm", CELLS, folder=tmp_path / name) for name in ("one", "two")]
    run_trial(specs[0])
    error, begun = run_pair(specs[1])
    assert error is None
    parts = [(0, 50), (50, 60)]
    assert begun == [(0, *part) for part in parts * 4] + [(1, *part) for part in parts * 2]
    assert_same_cells(read_cells(tmp_path / "two"), read_cells(tmp_path / "one"))
    one, two = (read_rows(tmp_path / name, spec.job, "scores", spec.trial_id) for name, spec in
                zip(("one", "two"), specs, strict=True))  # fmt: skip
    for row, other in zip(one, two, strict=True):
        assert row["parameters_updated"] == other["parameters_updated"]
        if row["metric"] == "average_precision":
            assert row["value"] == pytest.approx(other["value"], abs=1e-3)
    assert not list((tmp_path / "two" / FOLDER).glob("cell-*/*.safetensors"))


def test_a_killed_worker_costs_a_part_and_one_worker_goes_on(run_pair, make_spec, alone, tmp_path, monkeypatch):
    spec = make_spec("mlm", LONG, folder=tmp_path / "results")

    def die(rank, step):
        if rank == 1 and step == 100:
            os.kill(os.getpid(), 9)

    error, begun = run_pair(spec, die)
    assert type(error).__name__ == "WorkerGroupError"
    assert {step for _, step, _ in begun} == {0, 50, 100}
    assert not read_cells(tmp_path / "results")
    steps, real = [], Tuning.train
    monkeypatch.setattr(cells, "PART_STEPS", 50)
    monkeypatch.setattr(Tuning, "train", lambda self, *how: steps.append(self.step) or real(self, *how))
    assert run_trial(spec)["status"] == "complete"
    assert steps == [100]
    assert_same_cells(read_cells(tmp_path / "results"), alone)


def test_two_workers_go_on_with_what_one_began(run_pair, make_spec, alone, tmp_path, monkeypatch):
    spec, real = make_spec("mlm", LONG, folder=tmp_path / "results"), Tuning.train

    def die_in_third(self, *how):
        if self.step == 100:
            raise CrashError
        real(self, *how)

    with monkeypatch.context() as patch, contextlib.suppress(CrashError):
        patch.setattr(cells, "PART_STEPS", 50)
        patch.setattr(Tuning, "train", die_in_third)
        run_trial(spec)
    error, begun = run_pair(spec)
    assert error is None
    assert begun == [(0, 100, 120), (1, 100, 120)]
    assert_same_cells(read_cells(tmp_path / "results"), alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_worker_ends_the_trial(rank, run_pair, make_spec, tmp_path):
    def die(own, step):
        if own == rank and step == 50:
            raise MemoryError

    spec = make_spec("mlm", LONG, folder=tmp_path / "results")
    error, begun = run_pair(spec, die)
    assert "MemoryError at" in str(list(error.worker_failures.values()))
    assert max(step for _, step, _ in begun) == 50
    # Of a follower's error rank 0 hears nothing: the driver tries again and, at last, says that it failed.
    expected = "failed" if rank == 0 else "running"
    assert read_trial(tmp_path / "results", spec.job, spec.trial_id)["status"] == expected


def test_an_evaluation_that_is_infeasible_ends_both(run_pair, make_spec, tmp_path):
    """Rank 0 records it and ends its part of the trial, without an error that would end the other's process."""

    def refuse():
        from raylab.base.mistakes import InfeasibleError

        real = cells.copy_above

        def copy_above(model, depth):
            if depth == "embeddings":
                raise InfeasibleError("not this one")
            return real(model, depth)

        cells.copy_above = copy_above

    spec = make_spec("mlm", {**LONG, "evaluate.frozen_layers": ["1", "embeddings"]}, folder=tmp_path / "results")
    error, begun = run_pair(spec, prepare=refuse)
    assert error is None
    assert {rank for rank, _, _ in begun} == {0, 1}  # the first depth was shared
    row = read_trial(tmp_path / "results", spec.job, spec.trial_id)
    assert (row["status"], row["error"]) == ("infeasible", "not this one")
