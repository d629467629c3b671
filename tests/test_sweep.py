"""Whole sweeps on real Ray processes: every objective, several workers, kills, Ctrl-C, and no text anywhere."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from raylab.job.jobs import dump_yaml
from raylab.results.queries import open_tables
from raylab.results.tables import list_trials, read_trial
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job

pytestmark = pytest.mark.ray

MARKER = "zebrafishpatient"


def raylab_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "raylab.cli", *arguments]


def run_raylab(*arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(raylab_command(*arguments), capture_output=True, text=True, timeout=300, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


def write_job(job, path: Path) -> Path:
    path.write_text(dump_yaml(job))
    return path


def child_processes(pid: int) -> list[int]:
    """All descendants of a process."""
    found, front = [], [pid]
    while front:
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(front.pop())], capture_output=True, text=True).stdout
        children = [int(child) for child in listed.split()]
        found += children
        front += children
    return found


@pytest.fixture(scope="module")
def marked_notes(notes, tmp_path_factory):
    """The notes with a word in every text that stands nowhere else."""
    folder = tmp_path_factory.mktemp("marked")
    table = pq.read_table(notes / "notes.parquet")
    texts = pa.array([f"{text} {MARKER}{row}" for row, text in enumerate(table["text"].to_pylist())])
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", texts), folder / "notes.parquet")
    return folder / "notes.parquet"


@pytest.fixture(scope="module")
def grid_job(make_job, marked_notes):
    """Four objectives on two seeds."""
    space = {
        "pretrain.objective": {"choices": ["none", "mlm", "declutr", "metadata"]},
        "pretrain.declutr.num_anchors": {"choices": [1, 2], "when": {"pretrain.objective": "declutr"}},
    }
    job = make_job(
        "declutr",
        {
            "name": "grid",
            "corpus.documents": {"path": str(marked_notes)},
            "corpus.tasks": {t: {"path": str(marked_notes)} for t in ("condition", "severity")},
            "pretrain.objective": "none",
            "pretrain.metadata": {"field": "category"},
            "search": {
                "space": space,
                "seeds": [0, 1],
                "targets": [{"task": "severity"}],
            },
        },
    )
    return job


# Run by each Python process as it starts, Ray's too.
AUDIT = """
import os, sys

def note(event, arguments):
    if event == "open" and "tfevents" in str(arguments[0]):
        os.close(os.open({path!r}, os.O_CREAT))

sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def unbroken(grid_job, tmp_path_factory):
    """The grid run once on Ray, in a home of its own; what it printed and where its files are."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = write_job(grid_job, folder / "job.yaml")
    # Ray keeps its session's logs and events there: they are searched for text below. Its sockets need a short path.
    ray_folder = Path(tempfile.mkdtemp(prefix="rl.", dir="/tmp"))
    (folder / "audit").mkdir()
    (folder / "audit" / "sitecustomize.py").write_text(AUDIT.format(path=str(folder / "tensorboard")))
    paths = os.pathsep.join([str(folder / "audit"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "TMPDIR": str(ray_folder), "PYTHONPATH": paths}
    done = run_raylab("run", str(job), "--results", str(folder / "results"), env=environment)
    yield {"results": folder / "results", "done": done, "ray": ray_folder, "tensorboard": folder / "tensorboard"}
    subprocess.run(["rm", "-rf", str(ray_folder)], check=False)


@pytest.mark.slow
def test_a_grid_fills_every_table(unbroken):
    rows = open_tables(unbroken["results"]).execute(
        "select \"pretrain.objective\", count(*), min(status), max(status) from trials where arm not like 'baseline:%' "
        "group by 1 order by 1"
    )
    assert rows.fetchall() == [
        ("declutr", 4, "complete", "complete"),
        ("metadata", 2, "complete", "complete"),
        ("mlm", 2, "complete", "complete"),
        ("none", 2, "complete", "complete"),
    ]
    counts = dict(
        open_tables(unbroken["results"])
        .execute(
            'select t."pretrain.objective", count(distinct s.rung) from scores s join trials t using (job, trial_id) '
            "where t.arm not like 'baseline:%' group by 1"
        )
        .fetchall()
    )
    assert counts["none"] == 1
    assert counts["mlm"] == counts["declutr"] == counts["metadata"] == 2
    # One tokenizer, one start a seed: what arms share is done once.
    built = open_tables(unbroken["results"]).execute(
        "select stage_id, count(*) from stages where not reused group by 1"
    )
    assert all(count == 1 for _, count in built.fetchall())
    assert "baseline:tfidf" in unbroken["done"].stdout
    assert "difference to base" in unbroken["done"].stdout


@pytest.mark.slow
def test_text_is_in_no_table_log_or_ray_file(unbroken, marked_notes):
    assert MARKER in pq.read_table(marked_notes)["text"][0].as_py()
    assert MARKER not in unbroken["done"].stdout + unbroken["done"].stderr
    searched = 0
    for root in (unbroken["results"], unbroken["ray"]):
        for file in root.rglob("*"):
            # A tokenizer's vocabulary may hold words of the training texts: it is kept with the encoder, not shown.
            if file.is_file() and "_stages/tokenizer-" not in str(file) and not file.name.startswith("tokenizer"):
                searched += 1
                assert MARKER.encode() not in file.read_bytes(), file
    assert searched > 50


@pytest.mark.slow
def test_a_sweep_writes_nothing_for_tensorboard_by_itself(unbroken):
    assert not unbroken["tensorboard"].exists()


@pytest.mark.slow
def test_running_again_runs_nothing(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken["results"].glob("grid/trials/[!b]*.parquet")}
    done = run_raylab("resume", "grid", "--results", str(unbroken["results"]))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "difference to base" in done.stdout


@pytest.mark.slow
def test_killed_driver_and_worker_leave_the_tables_of_an_unbroken_run(unbroken, grid_job, read_values, tmp_path):
    """SIGKILL of a trial's process, then of the driver with all its children; resume ends with the same values."""
    job, results = write_job(grid_job, tmp_path / "job.yaml"), tmp_path / "results"
    process = subprocess.Popen(
        raylab_command("run", str(job), "--results", str(results)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait(lambda: list(results.glob("grid/trials/[!b]*.parquet")), process)
    # A trial's own process; Ray starts another.
    actors = [pid for pid in child_processes(process.pid) if b"ray::ImplicitFunc" in _command(pid)]
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    _wait(lambda: len(list(results.glob("grid/scores/[!b]*.parquet"))) >= 3, process)
    for pid in [process.pid, *child_processes(process.pid)]:
        kill(pid)
    process.wait()
    done = run_raylab("resume", "grid", "--results", str(results), check=False)
    if done.returncode:  # the trial whose process was killed twice over is recorded as failed and run once more
        run_raylab("resume", "grid", "--results", str(results))
    assert read_values(results) == read_values(unbroken["results"])


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _wait(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def long_job(make_job):
    """Two trials of some seconds, in four rungs, one after the other."""
    space = {"pretrain.learning_rate": {"choices": [1e-3, 2e-3]}}
    changes = {"name": "long", "pretrain.num_tokens": 32_000, "pretrain.rungs": 4}
    changes["resources"] = {"max_concurrent_trials": 1}
    return make_job("mlm", {**changes, "search": {"space": space, "seeds": [0]}})


@pytest.fixture(scope="module")
def long_values(long_job, read_values, tmp_path_factory):
    """The values of an unbroken run of it."""
    results = tmp_path_factory.mktemp("long")
    assert finish(long_job, results).states == {"complete": 2}
    return read_values(results)


def finish(job, results):
    return run_job(job, results, SweepProgress(Console(quiet=True)), here=True)


def trained(results, name) -> list[dict]:
    """A job's trials in the order of their start, without baselines."""
    return [row for row in list_trials(results, name) if not row["arm"].startswith("baseline:")]


def start_long(job, results, folder) -> subprocess.Popen:
    """A run of the long job, of which some trial has written its first rung."""
    process = subprocess.Popen(
        raylab_command("run", str(write_job(job, folder / "job.yaml")), "--results", str(results)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _wait(lambda: any(row["rung"] for row in trained(results, "long")), process)
    return process


def kill_part(process: subprocess.Popen, part: bytes) -> None:
    """SIGKILL of a process of the Ray that a run has started."""
    (pid,) = [pid for pid in child_processes(process.pid) if part in _command(pid).split(b"\0")[0]]
    os.kill(pid, signal.SIGKILL)


ENDINGS = {
    "ctrl-c": (lambda run, results: run.send_signal(signal.SIGINT), "interrupted"),
    "sigterm": (lambda run, results: run.send_signal(signal.SIGTERM), "ended early: it was asked to stop"),
    "stop --now": (lambda run, results: run_raylab("stop", "long", "--now", "--results", str(results)), "interrupted"),
    "raylet": (lambda run, results: kill_part(run, b"/raylet"), "the Ray node here died (raylet)"),
    "gcs": (lambda run, results: kill_part(run, b"/gcs_server"), "the Ray node here died (gcs_server)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_is_ended_says_how_to_go_on_and_leaves_nothing_behind(
    ending, long_job, long_values, read_values, tmp_path
):
    act, said = ENDINGS[ending]
    results = tmp_path / "results"
    process = start_long(long_job, results, tmp_path)
    children = child_processes(process.pid)
    act(process, results)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    lines = [line for line in stderr.splitlines() if line]
    assert lines[-1].startswith(said)
    assert lines[-1].lower().endswith(f"go on with: raylab resume long --results {results}")
    # No traceback, and nothing of Ray's.
    assert not [line for line in lines if "Traceback" in line or "ray." in line or "[2" in line]
    _wait_until(lambda: not [pid for pid in children if _command(pid)])
    assert any(0 < row["rung"] < 4 for row in trained(results, "long") if row["status"] == "running")
    assert finish(long_job, results).why is None
    assert read_values(results) == long_values


@pytest.mark.slow
def test_a_driver_that_is_killed_alone_is_followed_at_once_by_another(long_job, long_values, read_values, tmp_path):
    """What the first one started may live on for a moment; it writes nothing into what the second one writes."""
    results = tmp_path / "results"
    process = start_long(long_job, results, tmp_path)
    trials = [pid for pid in child_processes(process.pid) if b"ray::ImplicitFunc" in _command(pid)]
    assert trials
    kill(process.pid)
    run_raylab("resume", "long", "--results", str(results))
    process.communicate()
    assert not [pid for pid in trials if _command(pid)]
    assert read_values(results) == long_values


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_is_tried_again_and_at_the_third_time_failed(make_job, read_values, tmp_path):
    space = {"pretrain.learning_rate": {"choices": [1e-3, 2e-3]}}
    changes = {"name": "killed", "pretrain.num_tokens": 24_000, "pretrain.rungs": 1}
    job = make_job("mlm", {**changes, "search": {"space": space}, "resources": {"max_concurrent_trials": 1}})
    results = tmp_path / "results"
    process = subprocess.Popen(
        raylab_command("run", str(write_job(job, tmp_path / "job.yaml")), "--results", str(results)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # The first trial dies three times, the second one once.
    for count, attempts in ((1, 1), (1, 2), (1, 3), (2, 1)):

        def runs(count=count, attempts=attempts):
            rows = trained(results, "killed")
            return len(rows) == count and (rows[-1]["status"], rows[-1]["attempts"]) == ("running", attempts)

        _wait(runs, process)
        kill_trials(process)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    first, second = trained(results, "killed")
    assert (first["status"], first["attempts"]) == ("failed", 3)
    assert "its process died 3 times without a new rung" in first["error"]
    assert (second["status"], second["attempts"]) == ("complete", 2)
    assert finish(job, results).states == {"complete": 1}
    assert finish(job, tmp_path / "unbroken").states == {"complete": 2}
    assert read_values(results) == read_values(tmp_path / "unbroken")


def kill_trials(process: subprocess.Popen) -> None:
    for pid in child_processes(process.pid):
        if b"ray::ImplicitFunc" in _command(pid):
            kill(pid)


@pytest.mark.slow
def test_a_trial_that_fails_does_not_end_the_sweep(make_job, tmp_path):
    """A learning rate that makes the loss infinite, beside one that works."""
    space = {"pretrain.learning_rate": {"choices": [1e-3, 1e30]}}
    job = make_job("mlm", {"name": "fails", "search": {"space": space}, "pretrain.max_grad_norm": 1e30})
    results = tmp_path / "results"
    done = run_raylab("run", str(write_job(job, tmp_path / "job.yaml")), "--results", str(results), check=False)
    assert done.returncode == 1
    rows = open_tables(results).execute(
        "select status, error from trials where arm not like 'baseline:%' order by status"
    )
    (complete, _), (failed, error) = rows.fetchall()
    assert (complete, failed) == ("complete", "failed")
    assert "not finite at step" in error
    assert "raylab resume fails" in done.stderr


@pytest.mark.slow
def test_adaptive_search_confirms_and_ranks_on_fresh_seeds(make_job, tmp_path):
    space = {
        "pretrain.objective": {"choices": ["none", "mlm", "declutr"]},
        "pretrain.declutr.max_span": {"low": 12, "high": 24},
    }
    search = {
        "space": space, "design": "tpe", "num_arms": 4, "targets": [{"task": "severity"}],
        "early_stopping": "successive_halving", "confirm": {"top": 2, "seeds": [5, 6]},
    }  # fmt: skip
    job = make_job("declutr", {"name": "adaptive", "pretrain.objective": "mlm", "search": search})
    results = tmp_path / "results"
    done = run_raylab("run", str(write_job(job, tmp_path / "job.yaml")), "--results", str(results))
    phases = dict(
        open_tables(results)
        .execute("select phase, list_sort(list(distinct seed)) from trials where arm not like 'baseline:%' group by 1")
        .fetchall()
    )
    assert phases == {"search": [0], "confirm": [5, 6]}
    confirmed = open_tables(results).execute("select distinct arm from trials where phase = 'confirm'").fetchall()
    assert 2 <= len(confirmed) <= 3
    assert all(arm in done.stdout for (arm,) in confirmed)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["declutr"])
def test_two_workers_under_ray_train_give_the_numbers_of_one(objective, make_job, tmp_path):
    """Through TorchTrainer with gloo: the global batch, its negatives and so the curve are those of one worker."""
    changes = {"encoder.config.dropout": 0.0, "pretrain.num_tokens": 6000, "pretrain.rungs": 1}
    curves = {}
    for workers in (1, 2):
        job = make_job(objective, {**changes, "name": f"workers{workers}", "resources": {"workers": workers}})
        results = tmp_path / f"results{workers}"
        if workers == 1:
            finish(job, results)
        else:
            run_raylab("run", str(write_job(job, tmp_path / "job.yaml")), "--results", str(results))
        (path,) = results.glob(f"workers{workers}/trials/[!b]*.parquet")
        row = read_trial(results, f"workers{workers}", path.stem)
        assert row["status"] == "complete", row["error"]
        curves[workers] = {
            (step, metric): value
            for step, metric, value in open_tables(results)
            .execute("select step, metric, value from curves where metric like 'train%loss' or metric like 'heldout%'")
            .fetchall()
        }
    assert curves[1].keys() == curves[2].keys()
    for key, value in curves[1].items():
        assert curves[2][key] == pytest.approx(value, rel=2e-3, abs=2e-3), key


def test_job_file_is_kept_beside_its_results(unbroken, grid_job):
    kept = yaml.safe_load((unbroken["results"] / "grid" / "job.yaml").read_text())
    assert kept["search"]["seeds"] == [0, 1]
    assert json.loads(json.dumps(kept))["corpus"]["documents"]["path"] == grid_job.corpus.documents.path
