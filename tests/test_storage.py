"""Results at a URL: mirrors of several machines, on a folder's URL and on a server that speaks S3."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from raylab.base.mistakes import JobError, RemoteError, SupersededError, find_storage_problem
from raylab.job.jobs import dump_yaml, load_job
from raylab.results.compaction import compact_job, compact_results
from raylab.results.queries import find_job, open_tables, query, summarise_jobs
from raylab.results.repair import repair_job
from raylab.results.tables import list_trials, pull_trial, read_rows, read_trial, table_path, write_rows
from raylab.runs import sweep
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.submission import check_folder
from raylab.runs.sweep import run_job
from raylab.runs.trial import run_trial
from raylab.store import driver, storage
from raylab.store.driver import claim_job, has_lost, read_stop, read_token, request_stop
from raylab.store.stages import (
    FOLDER,
    build_stage,
    find_stage,
    list_stages,
    measure_stages,
    open_stage,
    peek_key,
    peek_stage,
    prune_stage,
)
from raylab.store.storage import is_url, name_results, open_results, pull

processes = multiprocessing.get_context("spawn")
SPACE = {"pretrain.objective": {"choices": ["none", "mlm"]}}
KEY = {"texts": "abc"}


@pytest.fixture(scope="module")
def s3():
    """A server on this machine that speaks S3, with a bucket of its own; its URL with room for a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert server.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
    from pyarrow.fs import FileSystem

    url = f"s3://studies/{{}}?endpoint_override=http://127.0.0.1:{port}&scheme=http"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem, _ = FileSystem.from_uri(url.format("any") + "&allow_bucket_creation=true")
        filesystem.create_dir("studies")
        yield url
    server.terminate()
    server.wait()


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    """The URL of a place that nothing is at yet."""
    if request.param == "file":
        return f"file://{tmp_path}/far"
    return request.getfixturevalue("s3").format(tmp_path.name)


@pytest.fixture
def mirror(url, tmp_path, monkeypatch):
    """`mirror("a")`: the mirror of the URL on machine a, which is this one from then on."""

    def open_on(machine):
        monkeypatch.setenv("RAYLAB_CACHE", str(tmp_path / machine))
        return open_results(url)

    return open_on


def list_remote(url, folder=""):
    """The files at a URL by their name: time of writing."""
    from pyarrow.fs import FileSelector, FileSystem, FileType

    filesystem, base = FileSystem.from_uri(url)
    infos = filesystem.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
    names = {info.path.removeprefix(f"{base}/"): info.mtime_ns for info in infos if info.type == FileType.File}
    return {name: time for name, time in names.items() if name.startswith(folder)}


def change_remote(url, name, content):
    from pyarrow.fs import FileSystem

    filesystem, base = FileSystem.from_uri(url)
    with filesystem.open_output_stream(f"{base}/{name}") as stream:
        stream.write(content)


def remove_remote(url, name):
    from pyarrow.fs import FileSystem

    filesystem, base = FileSystem.from_uri(url)
    filesystem.delete_file(f"{base}/{name}")


# --- opening


def test_a_path_is_a_path(tmp_path):
    assert open_results("results") == Path("results")
    assert not is_url("/a/results")
    assert is_url("s3://bucket/x")
    assert name_results(tmp_path) == str(tmp_path)
    assert check_folder("--results", "s3://bucket/x") == "s3://bucket/x"
    with pytest.raises(JobError, match="--data s3://bucket/x: must be an absolute path"):
        check_folder("--data", "s3://bucket/x")


def test_a_mirror_remembers_its_url(mirror, url):
    results = mirror("a")
    assert name_results(results) == url
    assert mirror("a") == results
    assert mirror("b") != results
    assert results.stat().st_mode & 0o077 == 0
    storage._find.cache_clear()  # as in another process
    assert name_results(results) == url


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("nosuch://bucket/x", "nosuch://bucket/x: Unrecognized filesystem type"),
        ("s3://bucket/x?endpoint_override=http://127.0.0.1:1&scheme=http", "NETWORK_CONNECTION"),
        ("gs://anonymous@b/x?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1", "Could not connect"),
        ("s3://", "names no folder"),
        ("s3://name:secret@bucket/x", "give keys in the environment"),
    ],
)
def test_a_url_that_can_not_be_opened_is_refused_in_one_line(where, told, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLAB_CACHE", str(tmp_path))
    with pytest.raises(JobError, match=told) as caught:
        open_results(where)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert "secret" not in line
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_is_not_there_is_refused_before_the_work(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLAB_CACHE", str(tmp_path))
    results = open_results(s3.format("x").replace("studies", "nosuch"))
    with pytest.raises(JobError, match=r"--results s3://nosuch/.*NO_SUCH_BUCKET.*choose a folder"):
        claim_job(results, "faults", 0.1).__enter__()
    with pytest.raises(RemoteError) as caught:
        write_scores(results, "t0", [1.0])
    assert "NO_SUCH_BUCKET" in find_storage_problem(caught.value)
    assert not list(results.glob("*/scores/*"))
    with pytest.raises(JobError, match="no such folder"):
        summarise_jobs(results)


# --- tables


def write_scores(results, trial_id, values):
    rows = [{"rung": 1, "task": "t", "split": "validation", "metric": "m", "value": value} for value in values]
    write_rows(results, "j", "scores", trial_id, rows)


def read_scores(results, trial_id):
    return [row["value"] for row in read_rows(results, "j", "scores", trial_id)]


@pytest.mark.parametrize("bring", [lambda results: pull(results), lambda results: pull_trial(results, "j", "t0")])
def test_machines_see_each_other_s_tables_after_a_pull(bring, mirror):
    a, b = mirror("a"), mirror("b")
    write_scores(a, "t0", [1.0])
    assert read_scores(b, "t0") == []
    for value in (1.0, 2.0, 3.0):  # of one size, and in one second, which is all that S3 tells of the time
        write_scores(a, "t0", [value])
        bring(b)
        assert read_scores(b, "t0") == [value]
    storage.remove(a, table_path(a, "j", "scores", "t0"))
    bring(b)
    assert read_scores(b, "t0") == []


def test_a_pull_gets_what_is_new_or_was_changed(mirror, monkeypatch):
    a, b = mirror("a"), mirror("b")
    write_scores(a, "t0", [1.0])
    write_scores(a, "t1", [1.0])
    time.sleep(2.1)  # so long a time may be told the same, see UNSURE_NS
    write_scores(a, "t2", [1.0])
    got = []
    before = storage._get
    monkeypatch.setattr(storage, "_get", lambda remote, name, path: (got.append(name), before(remote, name, path)))
    pull(b)
    assert sorted(got) == [f"j/scores/t{n}.parquet" for n in range(3)]
    got.clear()
    time.sleep(2.1)
    write_scores(a, "t1", [2.0, 2.0])
    pull(b, "j")
    # The last before was too new to be sure of.
    assert sorted(got) == ["j/scores/t1.parquet", "j/scores/t2.parquet"]
    assert read_scores(b, "t1") == [2.0, 2.0]


def test_a_write_that_fails_there_changes_nothing_here(mirror, monkeypatch):
    results = mirror("a")
    write_scores(results, "t0", [1.0])

    def refuse(remote, name, content):
        raise OSError("AWS Error ACCESS_DENIED during PutObject operation: no")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put", refuse)
        with pytest.raises(RemoteError) as caught:
            write_scores(results, "t0", [2.0])
    assert "ACCESS_DENIED" in find_storage_problem(caught.value)
    assert read_scores(results, "t0") == [1.0]
    assert [path.name for path in (results / "j" / "scores").iterdir()] == ["t0.parquet"]


def test_a_damaged_table_is_set_aside_there_too(mirror, url):
    results = mirror("a")
    write_scores(results, "t0", [1.0])
    change_remote(url, "j/scores/t0.parquet", b"PAR1 half")
    pull(results)
    assert repair_job(results, "j") == ["scores: the file of t0 was damaged; it is made again"]
    assert list(list_remote(url, "j/")) == ["j/scores/.damaged-t0.parquet"]
    pull(results)
    assert read_scores(results, "t0") == []


def count_versions(results):
    """Trial -> its value in `scores`, each trial's rows once."""
    rows = query(results, "select trial_id, min(value) as value, count(*) as rows from scores group by 1").to_pylist()
    assert all(row["rows"] == 2 for row in rows)
    return {row["trial_id"]: row["value"] for row in rows}


def test_packed_tables_read_the_same_on_all_machines(mirror, url):
    a, b = mirror("a"), mirror("b")
    for number in range(4):
        write_scores(a, f"t{number}", [1.0, 1.0])
    pull(b)
    time.sleep(2.1)  # see UNSURE_NS
    write_scores(a, "t9", [1.0, 1.0])
    expected = {f"t{number}": 1.0 for number in (0, 1, 2, 3, 9)}
    (a / "j" / "job.yaml").write_text("name: j")
    storage.push(a, a / "j" / "job.yaml")
    (packed,) = compact_results(a, "j")
    assert packed == ("j", {"scores": 5})
    names = {name.split("/")[-1] for name in list_remote(url, "j/scores")}
    assert names <= {"t9.parquet"}  # too new to be sure that nobody wrote it again
    assert len(list_remote(url, "j/_packed/scores")) == 1
    assert count_versions(a) == expected
    for bring in (lambda results: pull_trial(results, "j", "t0"), pull, pull):
        for results in (b, mirror("c")):
            bring(results)
            assert count_versions(results) == expected
            assert [row["value"] for row in read_rows(results, "j", "scores", "t1")] == [1.0, 1.0]
    write_scores(b, "t1", [2.0, 2.0])
    pull(a)
    assert count_versions(a) == expected | {"t1": 2.0}


def test_a_pull_that_meets_compaction_sees_every_file(mirror, monkeypatch):
    """What is gone by the time that it is fetched, or before it is listed, is in a pack."""
    a, b = mirror("a"), mirror("b")
    for number in range(4):
        write_scores(a, f"t{number}", [1.0, 1.0])
    time.sleep(2.1)
    write_rows(a, "j", "curves", "t0", [{"step": 1}])
    get, packed, first = storage._get, [], threading.Lock()

    def meanwhile(remote, name, path):
        with first:
            if not packed:
                packed.append(compact_job(a, "j"))
        get(remote, name, path)

    pull(a)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_get", meanwhile)
        patch.setattr("raylab.results.compaction.pull", lambda *rest: None)  # a's is the same function
        pull(b)
    assert packed == [{"scores": 4}]
    assert count_versions(b) == {f"t{number}": 1.0 for number in range(4)}


def test_a_job_at_a_url_is_not_packed_while_it_runs(mirror):
    a, b = mirror("a"), mirror("b")
    (a / "j").mkdir(parents=True)
    (a / "j" / "job.yaml").write_text("name: j")
    storage.push(a, a / "j" / "job.yaml")
    pull(b)
    with claim_job(a, "j", 1.0), pytest.raises(JobError, match="is being run by process"):
        list(compact_results(b, "j"))


# --- stages


def build(results, built=None, key=KEY):
    """A stage of two files, noted in `built` where it was not found."""

    def fill(folder):
        if built is not None:
            built.append(1)
        (folder / "encoder").mkdir()
        (folder / "encoder" / "weights").write_bytes(bytes(range(256)) * 100)
        (folder / "progress.json").write_text("{}")
        return {"tokens": 7}

    return build_stage(results, "pretrain", key, fill)


def test_a_stage_is_built_once_on_all_machines(mirror):
    built = []
    first, b = build(mirror("a"), built), mirror("b")
    assert peek_stage(b, first.stage_id) == {"tokens": 7}
    assert peek_key(b, first.stage_id) is not None
    assert peek_key(b, first.stage_id) == peek_key(mirror("a"), first.stage_id)
    assert (list_stages(b, "pretrain"), list_stages(b, "corpus")) == ([first.stage_id], [])
    assert not (b / FOLDER).exists()
    second = build(b, built)
    assert (built, second.reused, second.info) == ([1], True, first.info)
    for name in ("encoder/weights", "progress.json"):
        assert (second.path / name).read_bytes() == (first.path / name).read_bytes()
    assert measure_stages(b, [first.stage_id, "pretrain-none"]) > 25600


def test_half_an_upload_is_no_stage(mirror, url, monkeypatch):
    """The machine dies before the last file is there."""
    results, put = mirror("a"), storage._put

    def die(remote, name, content):
        if name.endswith("stage.json"):
            raise KeyboardInterrupt
        put(remote, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put", die)
        with pytest.raises(KeyboardInterrupt):
            build(results)
    assert len(list_remote(url, FOLDER)) == 2
    for machine in ("a", "b"):
        stage_id = next(iter(list_remote(url, FOLDER))).split("/")[1]
        assert open_stage(mirror(machine), stage_id) is None
    assert not build(mirror("b")).reused
    assert build(mirror("a")).reused


@pytest.mark.parametrize("content", [b"cut", bytes(25600), None], ids=["cut short", "other bytes", "gone"])
def test_a_stage_damaged_there_is_built_again_for_all(content, mirror, url):
    stage = build(mirror("a"))
    name = f"{FOLDER}/{stage.stage_id}/encoder/weights"
    if content is None:
        remove_remote(url, name)
    else:
        change_remote(url, name, content)
    assert find_stage(mirror("b"), stage.stage_id) is None
    assert [path.name for path in (mirror("b") / FOLDER).iterdir() if path.is_dir()] == []
    assert not build(mirror("b")).reused
    assert find_stage(mirror("c"), stage.stage_id) is not None


def test_a_machine_without_a_stage_prunes_it_for_all(mirror, url):
    stage_id = build(mirror("a")).stage_id
    b = mirror("b")
    assert prune_stage(b, stage_id, ["encoder"]) == 25600
    assert sorted(name.split("/", 2)[2] for name in list_remote(url, FOLDER)) == ["progress.json", "stage.json"]
    assert open_stage(b, stage_id, "encoder") is None
    assert not (b / FOLDER / stage_id).exists()
    assert (open_stage(b, stage_id) / "progress.json").exists()
    # Who needs what was pruned builds it again, for all.
    assert not build_stage(b, "pretrain", KEY, _fill_encoder, needs="encoder").reused
    assert open_stage(mirror("c"), stage_id, "encoder") is not None


def _fill_encoder(folder):
    (folder / "encoder").mkdir()
    (folder / "encoder" / "weights").write_text("again")
    return {"tokens": 7}


def test_a_machine_prunes_its_own_copy_too(mirror):
    stage = build(mirror("a"))
    prune_stage(mirror("a"), stage.stage_id, ["encoder"])
    assert not (stage.path / "encoder" / "weights").exists()
    assert open_stage(mirror("a"), stage.stage_id, "encoder") is None


# --- drivers


def hold(url, cache, lease, ready):
    os.environ["RAYLAB_CACHE"] = cache
    with claim_job(open_results(url), "j", lease):
        ready.set()
        time.sleep(60)


def start_holding(url, cache, lease):
    ready = processes.Event()
    first = processes.Process(target=hold, args=(url, str(cache), lease, ready))
    first.start()
    assert ready.wait(30)
    return first


@pytest.mark.slow
def test_a_second_driver_is_refused_until_the_first_is_dead(mirror, url, tmp_path):
    first, b = start_holding(url, tmp_path / "a", 2.0), mirror("b")
    try:
        with pytest.raises(JobError, match=f"being run by process {first.pid} on"), claim_job(b, "j", 2.0):
            pass
        request_stop(b, "j", now=True)
        assert read_stop(mirror("a"), "j") == "now"
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    since, told = time.monotonic(), []
    with claim_job(b, "j", 2.0, told.append) as token:
        assert told == [
            f"process {first.pid} on {socket.gethostname()} was running j: 2 s to see whether it still does"
        ]
        assert time.monotonic() - since > 2.0  # it watched for as long
        assert read_token(mirror("c"), "j") == token
        assert read_stop(mirror("c"), "j") is None
    since = time.monotonic()
    with claim_job(mirror("c"), "j", 60.0):  # it ended in order: nobody waits
        assert time.monotonic() - since < 10


def test_a_driver_that_stood_still_is_told_that_another_goes_on(mirror, url, tmp_path):
    """Stopped, as with its machine, for longer than the lease; woken, its trials and it write no more."""
    lease = 1.5
    with claim_job(mirror("a"), "j", lease) as token:
        other = "0123456789abcdef"
        driver._write(mirror("b"), "j", ".driver", {"token": other, "pid": 1, "host": "elsewhere", "count": 0})
        end = time.monotonic() + 30
        while not has_lost(token):
            assert time.monotonic() < end
            time.sleep(0.05)
    assert read_token(mirror("b"), "j") == other


def test_of_two_drivers_at_once_one_goes_on(mirror, monkeypatch):
    """The other wrote its name between this one's look and its write, or after."""
    results, write = mirror("a"), driver._write

    def also_write(folder, name, file, content):
        write(folder, name, file, content)
        write(folder, name, file, content | {"token": "other"})

    monkeypatch.setattr(driver, "_write", also_write)
    with pytest.raises(JobError, match="is being run by process"), claim_job(results, "j", 0.3):
        pass
    assert read_token(results, "j") == "other"


# --- whole jobs


@pytest.fixture(scope="module")
def job(make_job):
    """Two arms, one of them in three rungs."""
    return make_job("mlm", {"name": "far", "pretrain.rungs": 3, "search": {"space": SPACE}})


def run(job, results):
    return run_job(job, results, SweepProgress(Console(quiet=True)), here=True)


@pytest.fixture(scope="module")
def unbroken(job, read_values, tmp_path_factory):
    """The values of a run in a folder that nothing broke."""
    results = tmp_path_factory.mktemp("unbroken")
    assert run(job, results).states == {"complete": 2}
    return read_values(results)


def call(*arguments, cache, check=0):
    environment = {**os.environ, "RAYLAB_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "raylab.cli", *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == check, done.stderr
    return done


@pytest.mark.slow
def test_the_commands_at_a_url_give_what_they_give_in_a_folder(job, url, unbroken, mirror, read_values, tmp_path):
    file, cache = tmp_path / "job.yaml", tmp_path / "b"
    file.write_text(dump_yaml(job))
    done = call("run", str(file), "--here", "--results", url, cache=tmp_path / "a")
    assert f"tables: {url}/far" in done.stdout
    there = list_remote(url)
    assert {"far/job.yaml", "far/log.txt", "far/.disk.json", "far/.driver"} <= there.keys()
    (row,) = json.loads(call("status", "--results", url, "--format", "json", cache=cache).stdout)
    assert (row["complete"], row["arms"]) == (2, 2)
    asked = call("query", "select count(*) as n from scores", "--results", url, "--format", "json", cache=cache)
    assert json.loads(asked.stdout)[0]["n"] > 0
    assert "2/2" in call("logs", "far", "--results", url, cache=cache).stdout
    assert "far is not running" in call("stop", "far", "--results", url, cache=cache, check=2).stderr
    results = mirror("b")
    assert read_values(results) == unbroken
    # The report, too: its job file is at no path, so the command to run a trial again is of the one in the page.
    page = Path(call("report", "far", "--results", url, "--output", str(tmp_path / "told"), cache=cache).stdout.strip())
    assert "raylab run far.yaml --results again" in page.read_text()
    # Another machine has nothing to do, and makes no stage anew.
    call("resume", "far", "--here", "--results", url, cache=tmp_path / "c")
    assert list_remote(url, FOLDER) == {name: at for name, at in there.items() if name.startswith(FOLDER)}
    test_scores = call("unseal", "far", "--results", url, "--reason", "test", cache=tmp_path / "d").stdout
    assert "far, test" in test_scores
    pull(results)
    assert open_tables(results).execute("select count(*) from unseals").fetchone()[0] >= 2


def break_off(job, url, cache):
    """A run in a process of its own that is killed once the second of three rungs is written."""
    os.environ["RAYLAB_CACHE"] = cache
    sweep.decide = lambda spec, rung: rung < 2 or os.kill(os.getpid(), signal.SIGKILL)
    run(job, open_results(url))


@pytest.mark.slow
def test_a_job_whose_machine_is_gone_goes_on_elsewhere_from_its_last_rung(
    job, url, mirror, unbroken, read_values, tmp_path, monkeypatch
):
    process = processes.Process(target=break_off, args=(job, url, str(tmp_path / "a")))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    before = list_remote(url, f"{FOLDER}/pretrain-")
    before = {name: at for name, at in before.items() if name.endswith("progress.json")}
    assert len(before) == 3
    results = mirror("b")
    pull(results)
    (row,) = [row for row in list_trials(results, "far") if row["status"] == "running"]
    assert row["rung"] == 2
    monkeypatch.setattr(driver, "LEASE_SECONDS", 1.0)
    assert run(load_job(find_job(results, "far")), results).states == {"complete": 1}
    assert read_values(results) == unbroken
    after = list_remote(url, f"{FOLDER}/pretrain-")
    assert {name: after[name] for name in before} == before
    assert sum(name.endswith("progress.json") for name in after) == 4


def test_a_trial_runs_on_a_machine_that_has_nothing(job, mirror, url):
    """Its spec names the URL; there it finds its corpus, tokens and tokenizer, and here what it made."""
    from raylab.runs.workers import pack_spec, unpack_spec

    a = mirror("a")
    spec = make_spec(prepare(job, a), {"pretrain.objective": "mlm"}, 0, "fixed")
    packed = pack_spec(spec)
    assert json.loads(packed)["results"] == url
    b = mirror("b")
    there = unpack_spec(packed)
    assert Path(there.results) == b
    row = run_trial(there)
    assert read_trial(a, "far", spec.trial_id) is None
    pull_trial(a, "far", spec.trial_id)
    assert read_trial(a, "far", spec.trial_id)["target_values"] == json.dumps(row["target_values"])
    stages = [row["stage_id"] for row in read_rows(a, "far", "stages", spec.trial_id)]
    assert stages
    assert all(find_stage(a, stage_id) for stage_id in stages)
    # An arm that goes on from that trial's encoder: its path is that of the machine it runs on.
    on = job.model_copy(update={"encoder": job.encoder.model_validate({"trial": spec.trial_id})})
    spec = make_spec(prepare(on, a), {"pretrain.objective": "none"}, 0, "fixed")
    assert Path(spec.encoder_path).is_relative_to(a)
    packed = pack_spec(spec)
    c = mirror("c")
    there = unpack_spec(packed)
    assert Path(there.encoder_path).is_relative_to(c)
    assert run_trial(there)["status"] == "complete"


def test_a_trial_that_outlives_its_driver_writes_nothing(job, mirror):
    a = mirror("a")
    with claim_job(a, "far", 0.3) as token:
        spec = make_spec(prepare(job, a), {"pretrain.objective": "mlm"}, 0, "fixed")
        spec = spec.model_copy(update={"driver": token})
    with claim_job(mirror("b"), "far", 0.3), pytest.raises(SupersededError):
        run_trial(spec)
    with claim_job(mirror("b"), "far", 0.3) as token:
        assert run_trial(spec.model_copy(update={"driver": token}))["status"] == "complete"


def test_a_folder_of_its_own_is_never_asked_for_elsewhere(tmp_path, monkeypatch):
    """What a URL needs costs a folder one look for its note."""
    build(tmp_path)
    monkeypatch.setattr(storage, "_connect", lambda url: pytest.fail("a folder was taken for a mirror"))
    write_scores(tmp_path, "t0", [1.0])
    pull(tmp_path)
    build(tmp_path)
    with claim_job(tmp_path, "j"):
        assert not (tmp_path / storage.NOTE).exists()


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A Ray cluster of two nodes of one CPU, each with a cache of its own, as has the driver."""
    for name, value in sweep.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAYLAB_CACHE", str(tmp_path / "driver"))
    cluster = Cluster()
    for index in range(2):
        cluster.add_node(num_cpus=1, num_gpus=0, env_vars={"RAYLAB_CACHE": str(tmp_path / f"node{index}")})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield [tmp_path / "node0", tmp_path / "node1"]
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("url", "workers"), [("file", 1), ("s3", 2)], indirect=["url"])
def test_nodes_that_share_no_folder_run_a_job(workers, nodes, make_job, url, read_values, tmp_path):
    """Trials on both nodes, then trials of a worker on each: as in a folder."""
    changes = {"name": "nodes", "resources": {"workers": workers, "gpus_per_worker": 0}}
    if workers == 1:
        changes["search"] = {"space": {"pretrain.learning_rate": {"choices": [1e-3, 2e-3]}}, "seeds": [0, 1]}
    else:  # large enough a cell that both train it, each from its own copy of the encoder and of the hidden states
        changes["evaluate"] = {"shots": ["full"], "frozen_layers": ["1"], "fine_tune": {"steps": 50}}
    job = make_job("mlm", changes)
    results = open_results(url)
    count = 4 if workers == 1 else 1
    progress = SweepProgress(Console(quiet=True))
    assert run_job(job, results, progress).states == {"complete": count}
    used = [node for node in nodes if list(node.glob(f"*/{FOLDER}/pretrain-*/stage.json"))]
    assert len(used) >= workers  # one worker's trials may all have found room on one node
    assert not list((results / FOLDER).glob("pretrain-*")), "the driver needs no checkpoint"
    assert not [name for name in list_remote(url) if name.startswith(".train-")]
    if workers == 2:
        assert all(list(node.glob(f"*/{FOLDER}/activations-*/stage.json")) for node in nodes)
    else:
        here = tmp_path / "here"
        assert run(job, here).states == {"complete": count}
        assert read_values(results) == read_values(here)
