"""Sweeps on a Ray cluster of several nodes (of this machine): nodes come and go, and trials leave nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from raylab.job.jobs import dump_yaml
from raylab.results.tables import list_trials
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import ENVIRONMENT, run_job
from raylab.store.driver import request_stop
from raylab.store.stages import FOLDER
from raylab.training.rungs import list_rungs

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster():
    """A head that runs no trials, to which the tests add nodes of one CPU; this process is connected to it."""
    os.environ.update(ENVIRONMENT)
    import ray
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Two nodes of one CPU each; whatever nodes a test leaves are removed."""
    added = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield added
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    wait_until(lambda: read_cpus("cluster_resources") == 0)


def read_cpus(which: str) -> float:
    import ray

    return getattr(ray, which)().get("CPU", 0)


def wait_until(condition, process: subprocess.Popen | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)


def trained(results, name) -> list[dict]:
    return [row for row in list_trials(results, name) if not row["arm"].startswith("baseline:")]


def list_running(results) -> list[dict]:
    return [row for row in trained(results, "nodes") if row["status"] == "running"]


def test_nodes_come_and_go_and_cost_one_rung_each(cluster, nodes, make_job, read_values, tmp_path):
    space = {"pretrain.learning_rate": {"choices": [1e-3, 2e-3]}}
    changes = {"name": "nodes", "pretrain.num_tokens": 96_000, "pretrain.rungs": 4}
    job = make_job("mlm", {**changes, "search": {"space": space, "seeds": [0, 1, 2]}})
    cluster.remove_node(nodes.pop())
    wait_until(lambda: read_cpus("cluster_resources") == 1)
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    results = tmp_path / "results"
    command = [sys.executable, "-m", "raylab.cli", "run", str(tmp_path / "job.yaml"), "--results", str(results)]
    process = subprocess.Popen(
        [*command, "--address", cluster.address], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: any(row["rung"] for row in list_running(results)), process)
        assert len(list_running(results)) == 1
        # A node that comes is used.
        nodes.append(cluster.add_node(num_cpus=1))
        wait_until(lambda: len([row for row in list_running(results) if row["rung"]]) == 2, process)
        built = {path: path.stat().st_mtime_ns for path in (results / FOLDER).glob("pretrain-*/progress.json")}
        interrupted = {row["trial_id"] for row in list_running(results)}
        for node in nodes:
            cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: read_cpus("cluster_resources") == 0)
        time.sleep(2)  # the trials' processes end with their nodes
        before = {path: path.stat().st_mtime_ns for path in results.glob("nodes/*/*.parquet")}
        # Longer than the sweep needs to see it.
        time.sleep(8)
        assert process.poll() is None
        assert {path: path.stat().st_mtime_ns for path in before} == before
        cluster.add_node(num_cpus=1)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    # Trials that ran when their nodes left went on from the rungs that they had.
    again = {row["trial_id"] for row in trained(results, "nodes") if row["attempts"] > 1}
    assert again
    assert again <= interrupted
    assert {path: path.stat().st_mtime_ns for path in built} == built
    run_job(job, tmp_path / "unbroken", SweepProgress(Console(quiet=True)), here=True)
    assert read_values(results) == read_values(tmp_path / "unbroken")


def is_idle() -> bool:
    """Whether every CPU of the cluster is free and no placement group is left."""
    from ray.util import placement_group_table

    left = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return not left and read_cpus("available_resources") == read_cpus("cluster_resources") > 0


SEARCH = {
    "space": {"pretrain.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
    "design": "random", "early_stopping": "successive_halving", "targets": [{"task": "severity"}],
}  # fmt: skip


def sweep(job, results):
    return run_job(job, results, SweepProgress(Console(quiet=True)))


def test_trials_that_stop_early_or_are_asked_to_leave_nothing_behind(nodes, make_job, tmp_path):
    changes = {"name": "early", "pretrain.num_tokens": 24_000, "pretrain.rungs": 4}
    job = make_job("mlm", {**changes, "search": {**SEARCH, "num_arms": 6}})

    def ask():
        wait_until(lambda: any(row["rung"] for row in trained(tmp_path, "early")))
        used.extend(read_usage())
        request_stop(tmp_path, "early", now=False)

    from raylab.runs.tuning import read_usage

    used = []
    asking = threading.Thread(target=ask)
    asking.start()
    assert sweep(job, tmp_path).why == "it was asked to stop"
    asking.join()
    ((name, number, total),) = used
    assert (name, total) == ("CPU", 2)
    assert number >= 1
    assert "running" in {row["status"] for row in trained(tmp_path, "early")}
    wait_until(is_idle)
    assert read_usage() == [("CPU", 0, 2)]
    assert "stopped" in sweep(job, tmp_path).states
    wait_until(is_idle)


def test_trials_of_two_workers_leave_nothing_behind_however_they_end(nodes, make_job, tmp_path):
    """One of them stops early, one's loss is infinite, and a worker of one is killed, after which it goes on."""
    space = {"pretrain.learning_rate": {"choices": [1e-2, 1e-3, 1e30]}}
    changes = {"name": "pair", "pretrain.rungs": 4, "pretrain.max_grad_norm": 1e30, "resources": {"workers": 2}}
    job = make_job("mlm", {**changes, "search": {**SEARCH, "space": space, "num_arms": 3}})
    killed = []

    def kill():
        wait_until(lambda: any(row["rung"] for row in trained(tmp_path, "pair")))
        for folder in Path("/proc").glob("[0-9]*"):
            if not killed and is_worker(folder):
                killed.append(int(folder.name))
                os.kill(killed[0], signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    states = sweep(job, tmp_path).states
    killing.join()
    assert states == {"complete": 1, "stopped": 1, "failed": 1}
    assert killed
    assert sorted(row["attempts"] for row in trained(tmp_path, "pair")) == [1, 1, 2]
    wait_until(is_idle)
    # Ray Train wants a folder of the results while a trial runs.
    assert not list(tmp_path.glob(".train-*"))


def is_worker(folder: Path) -> bool:
    """Whether a process is a Ray Train worker of this test's cluster."""
    try:
        parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        return b"RayTrainWorker" in (folder / "cmdline").read_bytes() and grandparent == os.getpid()
    except (OSError, ValueError):
        return False


class OneTrial:
    """A sweep of one trial, which notes how it ended."""

    def __init__(self, spec):
        self.specs, self.ends, self.why = [spec], [], None

    def next_trial(self):
        if not self.specs:
            raise StopIteration
        return self.specs.pop()

    def finish_trial(self, trial_id, end):
        self.ends.append(end)

    def look(self):
        """Nothing asks it to stop."""


def test_a_sweep_without_a_node_ends_when_it_is_asked_to(cluster, make_job):
    from raylab.runs.tuning import run_tune

    assert read_cpus("cluster_resources") == 0
    sweep = OneTrial(None)
    sweep.look = lambda: setattr(sweep, "why", "it was asked to stop")
    run_tune(make_job(), sweep)
    assert sweep.specs == [None]


def test_no_more_trials_at_once_than_the_job_allows(nodes, make_job):
    from raylab.runs.tuning import ArmSearcher

    for most, slots in ((None, 3), (1, 1), (2, 2)):
        searcher = ArmSearcher(make_job("mlm", {"resources": {"max_concurrent_trials": most}}), OneTrial(None))
        assert searcher._count_slots() == slots


def test_what_stops_a_worker_of_two_is_told_as_of_one(nodes, make_job, tmp_path):
    from raylab.runs.tuning import run_tune

    job = make_job("mlm", {"name": "told", "resources": {"workers": 2}})
    spec = make_spec(prepare(job, tmp_path), {}, 0, "fixed")
    with FileLock(tmp_path / FOLDER / f".{list_rungs(spec)[1].stage_id}.lock"):
        busy = OneTrial(spec)
        run_tune(job, busy)
    assert busy.ends == ["waiting"]
    (tmp_path / "told" / "trials").rename(tmp_path / "kept")
    # Where not even root may write.
    (tmp_path / "told" / "trials").symlink_to("/sys/kernel")
    full = OneTrial(spec)
    run_tune(job, full)
    assert full.ends == [os.strerror(13)]
    wait_until(is_idle)
