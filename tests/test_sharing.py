"""Trials that share a GPU: how many fit, what memory each keeps to, what is refused, and what a full one is told."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from raylab.base.memory import CONTEXT_BYTES, cut_share, share_memory
from raylab.base.mistakes import JobError
from raylab.results.tables import list_trials, read_trial
from raylab.runs import sweep
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job
from raylab.runs.trial import run_trial

GIGABYTE = 2**30


@pytest.mark.parametrize(("gpus", "refused"), [(0.25, False), (1, False), (0, False), (1.5, True), (2, True)])
def test_a_worker_computes_on_one_gpu_at_most(gpus, refused, make_job):
    if refused:
        with pytest.raises(JobError, match=r"resources.gpus_per_worker: .* less than or equal to 1"):
            make_job("mlm", {"resources": {"gpus_per_worker": gpus}})
    else:
        assert make_job("mlm", {"resources": {"gpus_per_worker": gpus}}).resources.gpus_per_worker == gpus


def test_several_workers_of_one_trial_share_no_gpu(make_job):
    with pytest.raises(JobError) as error:
        make_job("mlm", {"resources": {"gpus_per_worker": 0.5, "workers": 2}})
    [line] = error.value.problems
    assert line.startswith("resources: several 'workers' need whole GPUs")
    for gpus in (0, 1, None):
        make_job("mlm", {"resources": {"gpus_per_worker": gpus, "workers": 2}})


def test_nothing_is_compiled_without_a_gpu(make_job):
    with pytest.raises(JobError) as error:
        make_job("mlm", {"resources": {"gpus_per_worker": 0, "compile": "always"}})
    [line] = error.value.problems
    assert line.startswith("resources: 'compile: always' is for GPUs")
    assert make_job("mlm", {"resources": {"gpus_per_worker": 0}}).resources.compile == "auto"
    with pytest.raises(JobError, match=r"resources\.compile: 'always' needs bf16"):
        make_job("mlm", {"resources": {"compile": "always"}, "pretrain.precision": "float32"})


def test_shares_and_what_cuda_takes_fit_on_the_gpu():
    for share in (0.5, 0.25, 0.1):
        total = 80 * GIGABYTE
        each = cut_share(share, total) * total
        assert (each + CONTEXT_BYTES) / share == pytest.approx(total)
    assert cut_share(0.1, 8 * GIGABYTE) == 0.05  # of little memory torch keeps half


@pytest.mark.parametrize(("share", "visible", "given"), [(0.0, "", []), (0.25, "0", [0.25 - 1 / 80]), (1.0, "0", [])])
def test_torch_keeps_to_the_share(share, visible, given, monkeypatch):
    """Of none the GPU is hidden: a fraction of 0 would leave one that nothing fits on."""
    fractions = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = SimpleNamespace(total_memory=80 * GIGABYTE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    share_memory(share)
    assert fractions == given
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize(("gpus", "visible"), [(0, ""), (None, "0")])
def test_a_run_here_without_gpus_sees_none(gpus, visible, make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    job = make_job("mlm", {"resources": {"gpus_per_worker": gpus}})
    seen = []

    def stop(schedule):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(sweep, "_run_here", stop)
    run_job(job, tmp_path, SweepProgress(Console(quiet=True)), here=True)
    assert seen == [visible]


@pytest.mark.parametrize("gpus", [0.25, None])
def test_a_trial_without_memory_is_told_what_to_set(gpus, make_spec, tmp_path):
    """The error of the allocator ends the trial, its row names the setting; its message stays out."""
    spec = make_spec("mlm", {"resources": {"gpus_per_worker": gpus}}, folder=tmp_path)

    def fill(spec, rung):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a note about a patient")

    with pytest.raises(torch.OutOfMemoryError):
        run_trial(spec, decide=fill)
    row = read_trial(tmp_path, spec.job, spec.trial_id)
    assert row["status"] == "failed"
    assert row["error"].startswith("OutOfMemoryError at trial.py:")
    wanted = "resources.gpus_per_worker: 0.25 of" if gpus else "the GPU's memory is full; set resources.chunk_tokens"
    assert wanted in row["error"]
    assert "lower evaluate.fine_tune.batch_size" in row["error"]
    assert "note" not in row["error"]
    assert "\n" not in row["error"]


COUNT_THREADS = """
import json
from raylab.runs.trial import set_threads
set_threads(1)
import pyarrow, scipy.sparse, sklearn.linear_model, threadpoolctl, torch
pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
print(json.dumps({"pools": pools, "torch": torch.get_num_threads(), "arrow": pyarrow.cpu_count()}))
"""


def test_a_trial_has_as_many_threads_as_cpus():
    """Of torch, of every BLAS and OpenMP, and of Arrow, in a process whose libraries would take all cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", COUNT_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert len(found["pools"]) >= 2
    assert {*found["pools"], found["torch"], found["arrow"]} == {1}


@pytest.fixture(scope="module")
def cluster():
    """Ray on two CPUs and a GPU, which nothing here computes on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sweep.ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # set to none, it forbids Ray the GPU
        import ray

        quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
        ray.init(address="local", num_cpus=2, num_gpus=1, **quiet)
        yield
        ray.shutdown()


@pytest.mark.ray
def test_trials_share_the_gpu_of_a_sweep(cluster, make_job, tmp_path):
    from raylab.runs.tuning import ArmSearcher
    from raylab.runs.workers import check_fit, count_workers

    class Idle:
        """What a searcher gives trials from."""

        gpus = 0.0

    # Two CPUs; one process more may wait where several trials fit.
    for gpus, slots in ((None, 1), (1, 1), (0.5, 3), (0.25, 3), (0, 3)):
        job = make_job("mlm", {"resources": {"gpus_per_worker": gpus}})
        check_fit(job)
        searcher = ArmSearcher(job, Idle())
        assert searcher._count_slots() == slots
        assert searcher.gpus == (1 if gpus is None else gpus)
    # Of two GPUs each takes two trials of 0.4, not the five that the sum would.
    counts = [count_workers({"CPU": 64.0, "GPU": 2.0}, 1, gpus) for gpus in (0.4, 0.1, 0.2, 1 / 3, 0.3333, 1, 0)]
    assert counts == [4, 20, 10, 6, 6, 2, 64]
    assert count_workers({"CPU": 3.0, "GPU": 1.0}, 2, 0.25) == 1
    assert count_workers({"CPU": 8.0}, 1, 0.25) == 0

    search = {"design": "grid", "space": {"pretrain.learning_rate": [1e-3, 2e-3]}, "seeds": [0, 1]}
    job = make_job("mlm", {"name": "shared", "resources": {"gpus_per_worker": 0.5}, "search": search})
    assert run_job(job, tmp_path, SweepProgress(Console(quiet=True))).states == {"complete": 4}
    rows = [row for row in list_trials(tmp_path, "shared") if not row["arm"].startswith("baseline")]
    assert {row["status"] for row in rows} == {"complete"}
    assert all(row["peak_memory_bytes"] > 0 for row in rows)
