"""Jobs through a cluster's Jobs API: a real head and a second node on this machine, in token mode."""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import raylab
from raylab.job.jobs import dump_yaml
from raylab.results.queries import open_tables

KEYS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ROOT = Path(raylab.__file__).parents[1]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def child_processes(pid: int) -> list[int]:
    """All descendants of a process."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    children = [int(child) for child in listed.split()]
    return [*children, *(below for child in children for below in child_processes(child))]


def wait_until(condition, seconds: float = 180):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def run_raylab(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in KEYS} | variables
    command = [sys.executable, "-m", "raylab.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


class Cluster:
    """A cluster under test, and commands as a user of it gives them."""

    def __init__(self, folder: Path, token: Path, url: str) -> None:
        self.folder, self.token, self.url = folder, token, url
        self.results = folder / "results"

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        done = run_raylab(*arguments, "--address", self.url, HOME=str(self.folder), **token)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def submit(self, job, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        path = self.folder / "here" / "job.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump_yaml(job))
        return self.run("submit", str(path), "--results", str(self.results), *arguments, code=code)

    def status(self, name: str) -> dict:
        (row,) = json.loads(self.run("status", name, "--format", "json").stdout)
        return row


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a second node with a CPU each; the folder of their Python is not on their PATH."""
    folder = tmp_path_factory.mktemp("cluster")
    # Ray's sockets need a short path.
    ray_folder = Path(tempfile.mkdtemp(prefix="rs.", dir="/tmp"))
    token = folder / "token"
    token.write_text("a-token-of-the-tests-0123456789abcdef")
    environment = {
        "HOME": str(folder),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    assert str(Path(sys.executable).parent) not in environment["PATH"].split(":")
    gcs, dashboard, agent, client, agent2 = free_ports(5)
    ports = [
        "--min-worker-port",
        "0",
        "--max-worker-port",
        "0",
        "--num-cpus",
        "1",
        "--object-store-memory",
        "100000000",
    ]
    head = ["--head", "--port", str(gcs), "--dashboard-port", str(dashboard)]
    head += ["--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client)]
    node = ["--address", f"127.0.0.1:{gcs}", "--dashboard-agent-listen-port", str(agent2)]
    started = []
    try:
        for options in (head, node):
            log = folder / f"ray{len(started)}.log"
            # A folder each: a node deletes the uploads that it no longer needs.
            place = ["--temp-dir", str(ray_folder / str(len(started)))]
            with log.open("w") as stream:
                command = [*RAY, "start", "--block", "--disable-usage-stats", *options, *ports, *place]
                started.append(
                    subprocess.Popen(command, env=environment, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
                )
            wait_until(lambda log=log: "runtime started" in log.read_text())
        yield Cluster(folder, token, f"http://127.0.0.1:{dashboard}")
    finally:
        processes = [pid for process in started for pid in (process.pid, *child_processes(process.pid))]
        for process in started:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()
        subprocess.run(["rm", "-rf", str(ray_folder)], check=False)


@pytest.fixture(scope="module")
def submitted(cluster, make_job, notes):
    """A job of two arms, run on the cluster to its end; its corpus files are named by --data alone."""
    elsewhere = {"path": "/nowhere/notes.parquet"}
    job = make_job(
        "mlm",
        {
            "name": "arms",
            "corpus.documents": elsewhere,
            "corpus.tasks": {"condition": elsewhere, "severity": elsewhere},
            "search": {"space": {"pretrain.objective": {"choices": ["none", "mlm"]}}},
        },
    )
    return cluster.submit(job, "--data", str(notes), "--wait")


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_fills_the_tables(cluster, submitted):
    rows = open_tables(cluster.results).execute(
        "select \"pretrain.objective\", status from trials where arm not like 'baseline:%' order by 1"
    )
    assert rows.fetchall() == [("mlm", "complete"), ("none", "complete")]
    submission_id, *log = submitted.stdout.splitlines()
    assert submission_id.startswith("raylab-arms-")
    assert any("difference to base" in line for line in log)
    # Nothing of Ray's own client: the id, the log, and how to follow it.
    assert submitted.stderr == f"submitted; follow it with: raylab logs arms --address {cluster.url} --follow\n"


@pytest.mark.ray
@pytest.mark.slow
def test_status_and_logs_by_name(cluster, submitted):
    row = cluster.status("arms")
    assert (row["ray_job"], row["complete"], row["arms"]) == ("succeeded", 2, 2)
    assert row["submission_id"] == submitted.stdout.splitlines()[0]
    whole = cluster.run("logs", "arms").stdout
    assert "difference to base" in whole
    assert cluster.run("logs", "arms", "--follow").stdout.splitlines() == whole.splitlines()
    for command in ("logs", "resume"):
        refused = cluster.run(command, "other", code=2).stderr
        assert refused == f"raylab: no job 'other' was submitted to {cluster.url}; jobs there: arms\n"


@pytest.mark.ray
@pytest.mark.slow
def test_resume_goes_on_with_nothing_to_run(cluster, submitted):
    before = {path: path.stat().st_mtime_ns for path in cluster.results.glob("arms/trials/[!b]*.parquet")}
    resumed = cluster.run("resume", "arms").stdout.strip()
    assert resumed != submitted.stdout.splitlines()[0]
    assert "difference to base" in cluster.run("logs", "arms", "--follow").stdout
    row = cluster.status("arms")
    assert (row["ray_job"], row["submission_id"]) == ("succeeded", resumed)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_fails_is_a_failed_ray_job(cluster, make_job):
    """A corpus that the cluster does not see: the driver's exit code is Ray's state, and the command's."""
    job = make_job("mlm", {"name": "fails", "corpus.documents": {"path": "/nowhere/notes.parquet"}})
    done = cluster.submit(job, "--wait", code=1)
    assert "raylab: corpus.documents" in done.stdout
    assert "/nowhere/notes.parquet" in done.stdout
    # Ray's own state of it.
    assert done.stderr.splitlines()[-1] == "job fails failed"


@pytest.fixture
def endless(cluster, make_job):
    """A job of a hundred rungs of some seconds, under way."""
    changes = {"name": "endless", "pretrain.num_tokens": 20_000_000, "pretrain.rungs": 100}
    job = make_job("mlm", changes)
    submission_id = cluster.submit(job).stdout.strip()
    wait_until(lambda: list(cluster.results.glob("endless/trials/[!b]*.parquet")))
    yield job
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    stop = [*RAY, "job", "stop", "--address", cluster.url, submission_id]
    subprocess.run(stop, env={**os.environ, **token}, capture_output=True, timeout=60)


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_job_is_told_apart_and_stops(cluster, endless):
    refused = cluster.submit(endless, code=2).stderr
    assert refused.startswith("raylab: job endless is running there as raylab-endless-")
    assert f"raylab stop endless --address {cluster.url}" in refused
    assert len(refused.splitlines()) == 1
    assert cluster.status("endless")["ray_job"] == "running"
    cluster.run("stop", "endless")
    row = wait_until(lambda: (row := cluster.status("endless"))["ray_job"] != "running" and row)
    assert (row["running"], row["complete"]) == (1, 0)
    rungs = open_tables(cluster.results).execute("select max(rung) from trials where job = 'endless'").fetchone()
    assert 1 <= rungs[0] < 100
    told = cluster.run("stop", "endless", code=2).stderr
    assert told == f"raylab: job endless is not running there ({row['ray_job']}); nothing to stop\n"


SLOW_TO_STOP = r"""
import sys, time
from raylab.runs import submission

submission.RAYLAB = "sh -c 'trap \"sleep 4; echo recorded; exit 1\" TERM; echo up; while :; do sleep 0.1; done'"
with submission.connect(sys.argv[1]) as cluster:
    submission_id = submission.start_driver(cluster, "slow", "/nowhere", [])
    while "\nup\n" not in cluster.client.get_job_logs(submission_id):
        time.sleep(0.2)
    cluster.client.stop_job(submission_id)
    print(submission.wait_for(cluster, submission_id))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_has_time_to_record_when_its_ray_job_is_stopped(cluster):
    """Ray's own 3 seconds would kill this one, which takes 4, before its last line."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    command = [sys.executable, "-c", SLOW_TO_STOP, cluster.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.stdout.splitlines()[-2:] == ["recorded", "stopped"], done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "the cluster asks for a token; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "the cluster asks for a token; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "the cluster refuses this token; correct RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "RAY_AUTH_TOKEN_PATH: no token in /nowhere/token"),
    ],
)
def test_a_missing_or_wrong_token_is_one_line(cluster, tmp_path, variables, told):
    done = run_raylab("status", "--address", cluster.url, HOME=str(tmp_path), **variables)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


class OtherVersion(http.server.BaseHTTPRequestHandler):
    """Answers as the dashboard of another Ray does."""

    def do_GET(self):
        body = json.dumps({"version": "4", "ray_version": "2.44.1"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_another_ray_version_is_refused():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherVersion) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run_raylab("status", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 2
    assert "the cluster runs Ray 2.44.1, this machine" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["status", "--address", "head:8265"], "--address head:8265: must be the URL of the cluster's dashboard"),
        (["logs", "arms", "--address", "http://"], "--address http://: must be the URL"),
        (["stop", "arms", "--address", "http://head:none"], "--address http://head:none: must be the URL"),
        (["status", "--address", "http://127.0.0.1:1"], "--address http://127.0.0.1:1: no Ray cluster answers"),
        (["run", "JOB", "--address", "http://head:8265"], "a dashboard takes jobs by 'raylab submit'"),
        (["resume", "arms", "--here", "--address", "http://head:8265"], "--here: runs in this process"),
        (
            ["submit", "JOB", "--address", "http://head:8265", "--results", "results"],
            "--results results: must be an abs",
        ),
        (
            ["submit", "JOB", "--address", "http://head:8265", "--results", "/shared", "--data", "notes"],
            "--data notes: must be an absolute path",
        ),
    ],
)
def test_a_wrong_request_is_one_line(command, told, make_job, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(dump_yaml(make_job()))
    done = run_raylab(*(str(job) if argument == "JOB" else argument for argument in command))
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_logs_of_a_job_here(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "job.yaml").write_text("")
    missing = run_raylab("logs", "mine", "--results", str(tmp_path))
    assert missing.returncode == 2
    assert "job mine: no log yet" in missing.stderr
    log = folder / "log.txt"
    log.write_text("first\n")
    assert run_raylab("logs", "mine", "--results", str(tmp_path)).stdout == "first\n"
    command = [sys.executable, "-m", "raylab.cli", "logs", "mine", "--results", str(tmp_path), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "first\n"
        with log.open("a") as stream:
            stream.write("second\n")
        assert process.stdout.readline() == "second\n"
        log.write_text("anew\n")
        assert process.stdout.readline() == "anew\n"
        process.send_signal(signal.SIGINT)
        process.wait(20)
