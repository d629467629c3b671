"""Whatever breaks or stops a job, resuming it gives the tables of an unbroken run."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from raylab.base.mistakes import BusyError, JobError, SupersededError
from raylab.job.jobs import dump_yaml, load_job
from raylab.job.specs import Target
from raylab.results.queries import summarise_jobs
from raylab.results.tables import list_trials, now, read_rows, read_trial, write_rows
from raylab.runs import schedule, sweep
from raylab.runs.preparation import make_spec, name_point, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.schedule import Schedule
from raylab.runs.sweep import run_job
from raylab.runs.trial import run_trial
from raylab.search.search import Search
from raylab.store.driver import claim_job, is_driven, read_stop, request_stop
from raylab.store.stages import FOLDER, find_stage, open_stage
from raylab.training.rungs import list_rungs

processes = multiprocessing.get_context("spawn")
SPACE = {"pretrain.objective": {"choices": ["none", "mlm"]}}


@pytest.fixture(scope="module")
def job(make_job):
    """Two arms, one of them in three rungs."""
    return make_job("mlm", {"name": "faults", "pretrain.rungs": 3, "search": {"space": SPACE}})


def run(job, results, **options):
    return run_job(job, results, SweepProgress(Console(quiet=True)), here=True, **options)


@pytest.fixture(scope="module")
def unbroken(job, read_values, tmp_path_factory):
    """The results folder of a run that nothing broke, and its values."""
    results = tmp_path_factory.mktemp("unbroken")
    assert run(job, results).states == {"complete": 2}
    return results, read_values(results)


@pytest.fixture(scope="module")
def _stopped(job, tmp_path_factory):
    """A results folder whose run was interrupted after the second rung of three."""
    results = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "decide", lambda spec, rung: rung < 2 or _interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(job, results)
    return results


def _interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def stopped(_stopped, tmp_path):
    """A copy of it: at another path, as on another machine."""
    shutil.copytree(_stopped, tmp_path / "moved")
    return tmp_path / "moved"


def find_trial(results, status):
    return next(row["trial_id"] for row in list_trials(results, "faults") if row["status"] == status)


def test_a_stopped_job_goes_on_elsewhere_from_its_last_rung(job, stopped, unbroken, read_values):
    trial_id = find_trial(stopped, "running")
    assert read_trial(stopped, "faults", trial_id)["rung"] == 2
    before = {path: path.stat().st_mtime_ns for path in (stopped / FOLDER).glob("pretrain-*/progress.json")}
    assert len(before) == 3
    assert run(load_job(stopped / "faults" / "job.yaml"), stopped).states == {"complete": 1}
    assert read_values(stopped) == unbroken[1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((stopped / FOLDER).glob("pretrain-*/progress.json"))) == 4


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other bytes": lambda path: path.write_bytes(bytes(255 - byte for byte in path.read_bytes())),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-200] + bytes([path.read_bytes()[-200] ^ 1])
                                             + path.read_bytes()[-199:]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("table", ["trials", "scores", "confusions", "geometry", "curves", "stages"])
def test_a_damaged_table_file_is_written_again(table, damage, job, stopped, unbroken, read_values):
    for path in list((stopped / "faults" / table).glob("[!b]*.parquet")):
        DAMAGE[damage](path)
    run(job, stopped)
    assert read_values(stopped) == unbroken[1]


@pytest.mark.parametrize("damage", ["cut short", "one bit", "gone"])
@pytest.mark.parametrize(
    "file",
    [
        "pretrain-*/encoder/model.safetensors",
        "pretrain-*/optimizer.safetensors",
        "pretrain-*/progress.json",
        "pretrain-*/stage.json",
        "embed-*/embeddings.npy",
        "heldout-*/stage.json",
        "tokens-*/*.arrow",
        "corpus-*/*",
        "tokenizer-*/tokenizer.json",
    ],
)
def test_a_damaged_stage_is_built_again(file, damage, job, stopped, unbroken, read_values):
    paths = [path for path in (stopped / FOLDER).glob(file) if path.is_file() and path.stat().st_size > 200]
    assert paths
    for path in paths:
        DAMAGE[damage](path)
    run(job, stopped)
    assert read_values(stopped) == unbroken[1]


def test_what_a_stop_in_the_middle_of_a_write_leaves_is_cleared(job, stopped, unbroken, read_values):
    trial_id = find_trial(stopped, "running")
    half = stopped / "faults" / "scores" / f".{trial_id}.parquet.4711"
    half.write_bytes(b"PAR1 half")
    building = stopped / FOLDER / ".building-pretrain-0123456789abcdef"
    building.mkdir()
    (building / "half").write_text("?")
    run(job, stopped)
    assert read_values(stopped) == unbroken[1]
    assert not half.exists()
    assert not building.exists()


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_was_changed_changes_no_value(days, job, stopped, unbroken, read_values):
    for row in list_trials(stopped, "faults"):
        moved = {name: row[name] + timedelta(days=days) for name in ("started_at", "updated_at")}
        write_rows(stopped, "faults", "trials", row["trial_id"], [row | moved])
    for path in stopped.rglob("*"):
        os.utime(path, (time.time() + days * 86400,) * 2)
    run(job, stopped)
    assert read_values(stopped) == unbroken[1]


def test_a_finished_job_runs_only_what_is_asked_more_of_it(job, unbroken, read_values, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(unbroken[0], results)
    assert run(job, results).states == {}
    before = {path: path.stat().st_mtime_ns for path in results.glob("faults/trials/[!b]*.parquet")}
    more = job.model_copy(update={"search": job.search.model_copy(update={"seeds": (0, 1)})})
    assert run(more, results).states == {"complete": 2}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {row["seed"] for row in list_trials(results, "faults")} == {0, 1}


def test_other_targets_of_a_finished_job_are_read_from_what_was_measured(job, unbroken, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(unbroken[0], results)
    assert {row["target_values"] for row in list_trials(results, "faults") if row["status"] == "complete"} <= {
        "[]",
        None,
    }
    target = Target(task="severity", metric="accuracy")
    changed = job.model_copy(update={"search": job.search.model_copy(update={"targets": (target,)})})
    built = len(list((results / FOLDER).glob("*/stage.json")))
    assert run(changed, results).states == {"complete": 2}
    assert len(list((results / FOLDER).glob("*/stage.json"))) == built
    for row in list_trials(results, "faults"):
        if not row["arm"].startswith("baseline"):
            scores = read_rows(results, "faults", "scores", row["trial_id"])
            found = [s["value"] for s in scores if (s["metric"], s["rung"]) == ("accuracy", row["num_rungs"])]
            assert json.loads(row["target_values"]) == [pytest.approx(sum(found) / len(found))]


def test_checkpoints_are_pruned_to_the_final_encoders_and_made_again_where_needed(job, unbroken, make_job, tmp_path):
    """More shots of a finished job: earlier rungs' encoders are trained again and give the numbers of a fresh run."""
    results = tmp_path / "results"
    shutil.copytree(unbroken[0], results)
    trial = next(row for row in list_trials(results, "faults") if row["pretrain.objective"] == "mlm")
    spec = make_spec(prepare(job, results), {"pretrain.objective": "mlm"}, 0, "fixed")
    assert spec.trial_id == trial["trial_id"]
    rungs = [link.stage_id for link in list_rungs(spec)]
    kept = [open_stage(results, stage_id, "encoder") is not None for stage_id in rungs]
    # The start is the untrained arm's final encoder.
    assert kept == [True, False, False, True]
    assert all(open_stage(results, stage_id) for stage_id in rungs)
    assert not list((results / FOLDER).glob("*/optimizer.safetensors"))
    more = make_job(
        "mlm", {"name": "faults", "pretrain.rungs": 3, "search": {"space": SPACE}, "evaluate.shots": [2, 4]}
    )
    assert run(more, results).states == {"complete": 2}
    assert run(more, tmp_path / "fresh").states == {"complete": 2}
    columns = ("rung", "shots", "draw", "metric", "value")
    again, fresh = (
        [tuple(row[c] for c in columns) for row in read_rows(where, "faults", "scores", spec.trial_id)]
        for where in (results, tmp_path / "fresh")
    )
    assert again == fresh
    assert {row[1] for row in fresh} == {2, 4}


def test_nothing_is_pruned_while_another_jobs_needs_are_not_known(job, unbroken, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(unbroken[0] / "faults", results / "other")
    for path in results.glob("other/trials/*.parquet"):
        DAMAGE["cut short"](path)
    assert run(job, results).states == {"complete": 2}
    assert len(list((results / FOLDER).glob("pretrain-*/encoder"))) == 4


def test_all_checkpoints_are_kept_where_the_job_says_so(make_job, tmp_path):
    """Hidden states are no checkpoints: they are large, and go when the job is done."""
    depths = {"evaluate.frozen_layers": ["1"], "evaluate.fine_tune": {"steps": 2, "hidden_size": 8}}
    search = {"space": SPACE}
    run(
        make_job(
            "mlm", {"name": "faults", "pretrain.rungs": 3, "search": search, **depths, "limits.checkpoints": "all"}
        ),
        tmp_path,
    )
    folders = [path.parent for path in (tmp_path / FOLDER).glob("pretrain-*/stage.json")]
    assert len(folders) == 4
    assert all((folder / "encoder" / "model.safetensors").exists() for folder in folders)
    assert list((tmp_path / FOLDER).glob("activations-*/embeddings.npy"))
    assert not list((tmp_path / FOLDER).glob("activations-*/states-*"))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"hours": 1e-9}, "limits.hours"),
        ({"gpu_hours": 0.5}, "limits.gpu_hours"),
        ({"disk_gb": 1e-6}, "limits.disk_gb"),
    ],
)
def test_a_limit_ends_a_sweep_and_resume_goes_on(limits, said, job, stopped, unbroken, read_values, monkeypatch):
    monkeypatch.setattr(schedule, "LOOK_SECONDS", 0)
    trial_id = find_trial(stopped, "running")
    row = read_trial(stopped, "faults", trial_id)
    write_rows(stopped, "faults", "trials", trial_id, [row | {"gpu_seconds": 3600.0}])
    ended = run(job.model_copy(update={"limits": job.limits.model_copy(update=limits)}), stopped)
    assert said in ended.why
    assert ended.by_limit
    assert read_trial(stopped, "faults", trial_id)["status"] == "running"
    ended = run(job, stopped)
    assert ended.why is None
    assert read_values(stopped) == unbroken[1]


def test_a_request_to_stop_lets_the_rung_end(job, unbroken, read_values, tmp_path, monkeypatch):
    def ask(spec, rung):
        request_stop(tmp_path, "faults", now=False)
        return True

    monkeypatch.setattr(sweep, "decide", ask)
    ended = run(job, tmp_path)
    assert (ended.why, ended.by_limit) == ("it was asked to stop", False)
    rows = {row["pretrain.objective"]: row for row in list_trials(tmp_path, "faults") if row["num_rungs"]}
    assert (rows["mlm"]["status"], rows["mlm"]["rung"]) == ("running", 1)
    monkeypatch.undo()
    run(job, tmp_path)
    assert read_values(tmp_path) == unbroken[1]


def test_stop_is_refused_where_nothing_runs(unbroken):
    with pytest.raises(JobError, match="is not running; 'raylab resume faults'"):
        request_stop(unbroken[0], "faults", now=False)


def hold(results, ready):
    with claim_job(results, "faults"):
        ready.set()
        time.sleep(60)


def test_a_second_driver_is_refused_until_the_first_is_dead(tmp_path):
    ready = processes.Event()
    first = processes.Process(target=hold, args=(tmp_path, ready))
    first.start()
    assert ready.wait(30)
    with pytest.raises(JobError, match=f"being run by process {first.pid} on"), claim_job(tmp_path, "faults"):
        pass
    assert is_driven(tmp_path, "faults")
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert not is_driven(tmp_path, "faults")
    with claim_job(tmp_path, "faults"):
        request_stop(tmp_path, "faults", now=True)
        assert read_stop(tmp_path, "faults") == "now"
    with claim_job(tmp_path, "faults"):
        assert read_stop(tmp_path, "faults") is None


def test_a_trial_that_outlives_its_driver_writes_nothing(job, tmp_path):
    with claim_job(tmp_path, "faults") as token:
        spec = make_spec(prepare(job, tmp_path), {"pretrain.objective": "mlm"}, 0, "fixed")
        spec = spec.model_copy(update={"driver": token})

    with claim_job(tmp_path, "faults") as token:
        assert token != spec.driver
        with pytest.raises(SupersededError):
            run_trial(spec)
    assert read_trial(tmp_path, "faults", spec.trial_id) is None
    with claim_job(tmp_path, "faults") as token:
        run_trial(spec.model_copy(update={"driver": token}))
    assert read_trial(tmp_path, "faults", spec.trial_id)["status"] == "complete"


def build_slowly(results, stage_id, ready):
    from filelock import FileLock

    with FileLock(results / FOLDER / f".{stage_id}.lock"):
        ready.set()
        time.sleep(60)


def test_a_trial_does_not_wait_for_a_pretraining_of_another_process(job, tmp_path):
    """It returns, so that the GPU it was given is free; the sweep holds it back while the lock is held."""
    spec = make_spec(prepare(job, tmp_path), {"pretrain.objective": "mlm"}, 0, "fixed")
    ready = processes.Event()
    other = processes.Process(target=build_slowly, args=(tmp_path, list_rungs(spec)[1].stage_id, ready))
    other.start()
    assert ready.wait(30)
    with pytest.raises(BusyError):
        run_trial(spec)
    assert read_trial(tmp_path, "faults", spec.trial_id)["status"] == "running"
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert run_trial(spec)["status"] == "complete"


def test_trials_that_share_a_pretraining_run_one_after_another(make_job, tmp_path):
    space = {"evaluate.frozen_layers": {"choices": ["all", "1", "none"]}}
    job = make_job("mlm", {"name": "faults", "search": {"space": space, "seeds": [0, 1]}})
    preparation = prepare(job, tmp_path)
    with claim_job(tmp_path, "faults") as token:
        search = Search(job, tmp_path, lambda values: name_point(preparation, values)[0])
        under_way = Schedule(preparation, search, SweepProgress(Console(quiet=True)), token)
        first, second = under_way.next_trial(), under_way.next_trial()
        # One of each seed; the other arms wait for their encoders.
        assert {first.seed, second.seed} == {0, 1}
        assert under_way.next_trial() is None
        run_trial(first)
        under_way.finish_trial(first.trial_id, "done")
        third = under_way.next_trial()
        assert third.seed == first.seed
        fourth = under_way.next_trial()
        assert fourth.seed == first.seed
        assert under_way.next_trial() is None
        assert run_trial(third)["status"] == "complete"
    rows = read_rows(tmp_path, "faults", "stages", third.trial_id)
    assert {row["kind"] for row in rows if row["reused"]} == {"pretrain", "heldout", "embed"}
    # What is frozen at depth 1 is computed by the arm of that depth.
    assert {row["kind"] for row in rows if not row["reused"]} == {"activations", "evaluate"}
    assert all(row["saved_seconds"] > 0 for row in rows if row["reused"])


@pytest.fixture
def under_way(job, tmp_path):
    """A sweep of the job whose ends of trials the test tells."""
    preparation = prepare(job, tmp_path)
    with claim_job(tmp_path, "faults") as token:
        search = Search(job, tmp_path, lambda values: name_point(preparation, values)[0])
        yield Schedule(preparation, search, SweepProgress(Console(quiet=True)), token)


def test_a_trial_whose_code_fails_is_tried_once_more_and_then_failed(under_way, tmp_path):
    first = under_way.next_trial()
    path = Path(first.results) / FOLDER / first.corpus / "stage.json"
    whole = path.read_bytes()
    path.unlink()
    for attempt in (1, 2):
        with pytest.raises(FileNotFoundError):
            run_trial(first)
        # Before it could open a row: as a process that died.
        under_way.finish_trial(first.trial_id, "died")
        first = under_way.next_trial()
        assert read_trial(tmp_path, "faults", first.trial_id) is None, attempt
    path.write_bytes(whole)
    tokens = Path(first.results) / FOLDER / first.tokens["severity"] / "tokens.arrow"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:100])
    for attempt in (1, 2):
        with pytest.raises(Exception, match=r"."):
            run_trial(first)
        row = read_trial(tmp_path, "faults", first.trial_id)
        assert (row["status"], row["attempts"]) == ("failed", attempt)
        under_way.finish_trial(first.trial_id, "died")
        following = under_way.next_trial()
        assert (following.trial_id == first.trial_id) == (attempt == 1)
    assert under_way.progress.states == {"failed": 1}
    tokens.write_bytes(whole)
    assert run_trial(following)["status"] == "complete"
    under_way.finish_trial(following.trial_id, "done")
    with pytest.raises(StopIteration):
        under_way.next_trial()


def test_a_trial_whose_process_dies_again_and_again_is_failed(under_way, tmp_path):
    first = under_way.next_trial()
    for _ in range(schedule.MOST_DEATHS - 1):
        under_way.finish_trial(first.trial_id, "died")
        assert under_way.next_trial().trial_id == first.trial_id
    under_way.finish_trial(first.trial_id, "died")
    row = read_trial(tmp_path, "faults", first.trial_id)
    assert row["status"] == "failed"
    assert "died 3 times without a new rung" in row["error"]
    assert under_way.next_trial().trial_id != first.trial_id


def test_deaths_count_from_the_last_rung(under_way, tmp_path):
    trials = [under_way.next_trial(), under_way.next_trial()]
    mlm = next(spec for spec in trials if spec.settings.pretrain.objective == "mlm")
    for rung in (1, 1, 2, 2):
        row = {"arm": mlm.arm, "phase": "fixed", "seed": 0, "status": "running", "rung": rung, "attempts": 1}
        write_rows(tmp_path, "faults", "trials", mlm.trial_id, [row | {"started_at": now(), "updated_at": now()}])
        under_way.finish_trial(mlm.trial_id, "died")
        assert under_way.next_trial().trial_id == mlm.trial_id
    under_way.finish_trial(mlm.trial_id, "died")
    assert read_trial(tmp_path, "faults", mlm.trial_id)["status"] == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 256 KiB; `grow()` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def raylab(*arguments):
    command = [sys.executable, "-m", "raylab.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_and_resume_goes_on(job, unbroken, read_values, small_disk, tmp_path):
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    results = small_disk / "results"
    sizes = iter(range(512, 16_000, 256))
    ended = []
    done = raylab("run", str(tmp_path / "job.yaml"), "--results", str(results), "--here")
    while done.returncode and (size := next(sizes, None)):
        ended.append(done.stderr.strip().splitlines()[-1])
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        remount(small_disk, f"size={size}k")
        done = raylab("run", str(tmp_path / "job.yaml"), "--results", str(results), "--here")
    assert done.returncode == 0, done.stderr
    assert len(ended) >= 2
    assert read_values(results) == unbroken[1]
    assert not [row for row in list_trials(results, "faults") if row["status"] == "failed"]


@pytest.mark.slow
def test_read_only_results_can_be_read_and_running_says_what_is_wrong(unbroken, small_disk):
    remount(small_disk, "size=50m")
    results = small_disk / "results"
    shutil.copytree(unbroken[0], results)
    remount(small_disk, "ro")
    assert raylab("status", "--results", str(results)).returncode == 0
    assert raylab("query", "select * from trials", "--results", str(results)).returncode == 0
    done = raylab("resume", "faults", "--results", str(results), "--here")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "Read-only file system" in line
    remount(small_disk, "rw")


def test_status_shows_disk_and_whether_it_runs(unbroken):
    (row,) = summarise_jobs(unbroken[0], "faults")
    assert row["complete"] == 2
    noted = json.loads((unbroken[0] / "faults" / ".disk.json").read_text())
    files = [path for path in unbroken[0].glob("faults/*/*.parquet") if not path.name.startswith(".")]
    assert noted["tables_bytes"] == sum(path.stat().st_size for path in files)
    assert row["disk_bytes"] == noted["tables_bytes"] + noted["stages_bytes"] > noted["tables_bytes"]
    assert row["driver"] is False


def test_a_stage_is_verified_byte_by_byte(unbroken, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(unbroken[0], results)
    path = next((results / FOLDER).glob("pretrain-*/encoder/model.safetensors"))
    stage_id = path.parts[-3]
    DAMAGE["one bit"](path)
    assert open_stage(results, stage_id) is not None
    assert find_stage(results, stage_id) is None
