"""Compaction: every answer stays what it was, beside writers and readers, and wherever it is killed."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from raylab.base.mistakes import DamagedError, JobError

# What loads torch is imported where it is needed: processes that tests start import this file.
from raylab.results.compaction import compact_job, compact_results
from raylab.results.packs import choose_rows, list_loose, list_packs
from raylab.results.queries import open_tables, query, read_cell, summarise_jobs
from raylab.results.tables import (
    SCHEMAS,
    is_written,
    list_names,
    list_summaries,
    list_trials,
    read_rows,
    read_trial,
    table_path,
    write_rows,
)
from raylab.store.storage import PACKS

processes = multiprocessing.get_context("spawn")
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ROWS = 7


def write_trial(results: Path, number: int, version: int = 0, **columns: Any) -> str:
    """A trial's rows, each of which says its version."""
    trial_id = f"{number:012x}-0"
    scores = [{"rung": 1, "draw": draw, "metric": "m", "value": float(version)} for draw in range(ROWS)]
    write_rows(results, "j", "scores", trial_id, scores)
    row = {"arm": trial_id[:12], "seed": 0, "status": "complete", "phase": "fixed", "rung": 1, "num_rungs": 1}
    row |= {"started_at": START + timedelta(seconds=number), "updated_at": START, "num_steps": version}
    write_rows(results, "j", "trials", trial_id, [row | columns])
    return trial_id


def read_versions(results: Path) -> dict[str, int]:
    """Trial -> its version in `scores`; every trial once, of one version."""
    found = query(
        results,
        "select trial_id, min(value) as low, max(value) as high, count(*) as rows, count(distinct draw) as draws "
        "from scores where split is null group by all",
    ).to_pylist()
    for row in found:
        assert (row["low"], row["rows"], row["draws"]) == (row["high"], ROWS, ROWS), row
    return {row["trial_id"]: int(row["low"]) for row in found}


def read_all(results: Path) -> dict[str, Any]:
    """Whatever is told of a job's tables, by every way to read them."""
    from raylab.runs.trials import find_trial

    return {
        "tables": {table: query(results, f"from {table} order by all").to_pylist() for table in SCHEMAS},
        "trials": list(list_trials(results, "j")),
        "summaries": list_summaries(results, "j"),
        "status": summarise_jobs(results),
        "names": {table: list_names(results, "j", table) for table in SCHEMAS},
        "scores": [
            read_rows(results, "j", "scores", name, end) for name in ("a-0", f"{3:012x}-0") for end in ("", ".test")
        ],
        "one": [read_trial(results, "j", f"{number:012x}-0") for number in range(8)],
        "written": [is_written(results, "j", "confusions", f"{number:012x}-0") for number in range(8)],
        "found": find_trial(results, f"{2:012x}-0", "x"),
        "cell": read_cell(results, "j", "scores", {"metric": "m"}, split="test"),
    }  # fmt: skip


def fill(results: Path, count: int = 6) -> None:
    for number in range(count):
        trial_id = write_trial(results, number, error="it's ü" if number == 4 else None)
        write_rows(results, "j", "confusions", trial_id, [])
        write_rows(results, "j", "curves", trial_id, [{"step": 1, "metric": "loss", "value": float("nan")}] * number)
        write_rows(
            results, "j", "scores", trial_id, [{"rung": 1, "split": "test", "metric": "m", "value": 0.5}], ".test"
        )
    write_rows(
        results, "j", "trials", "baseline:majority-0", [{"arm": "baseline:majority", "seed": 0, "started_at": START}]
    )
    for second in range(3):
        record = {"at": START + timedelta(seconds=second), "by": "me", "reason": "why"}
        write_rows(results, "j", "unseals", f"{1:012x}-0", [record], f".2026010{second}T000000000001")


def test_packed_tables_give_the_same_answers(tmp_path: Path) -> None:
    fill(tmp_path)
    before = read_all(tmp_path)
    packed = compact_job(tmp_path, "j")
    assert packed == {"trials": 7, "scores": 12, "confusions": 6, "curves": 6, "unseals": 3}
    assert not list(tmp_path.glob("j/*/[!_.]*-*.parquet")) or not any(
        list_loose(tmp_path, "j", table) for table in SCHEMAS
    )
    assert {path.name.split("-")[0] for path in (tmp_path / "j" / PACKS).glob("*.parquet")} == set(packed)
    assert str(read_all(tmp_path)) == str(before)
    assert compact_job(tmp_path, "j") == {}


def test_what_is_written_later_counts_before_a_pack(tmp_path: Path) -> None:
    fill(tmp_path)
    compact_job(tmp_path, "j")
    write_trial(tmp_path, 3, version=1)
    write_rows(tmp_path, "j", "scores", f"{3:012x}-0", [{"rung": 1, "split": "test", "value": 0.9}], ".test")
    write_trial(tmp_path, 9, version=4)
    expected = read_all(tmp_path)
    assert expected["one"][3]["num_steps"] == 1
    assert expected["scores"][2][0]["value"] == 1.0
    assert [row["value"] for row in expected["scores"][3]] == [0.9]
    assert len(expected["tables"]["scores"]) == 7 * ROWS + 6
    assert compact_job(tmp_path, "j") == {"trials": 2, "scores": 3}
    assert str(read_all(tmp_path)) == str(expected)
    assert len(list_packs(tmp_path, "j", "scores")) == 1


def test_a_trial_that_runs_is_left_alone(tmp_path: Path) -> None:
    for number in range(4):
        write_trial(tmp_path, number, status="running" if number == 2 else "failed")
    assert compact_job(tmp_path, "j") == {"trials": 3, "scores": 3}
    assert [path.stem for path in list_loose(tmp_path, "j", "scores")] == [f"{2:012x}-0"]
    assert read_versions(tmp_path).keys() == {f"{number:012x}-0" for number in range(4)}


def test_few_files_stay_until_asked_for(tmp_path: Path) -> None:
    fill(tmp_path)
    assert compact_job(tmp_path, "j", least=100) == {}
    assert compact_job(tmp_path, "j", least=12) == {"scores": 12}
    assert compact_job(tmp_path, "j")["trials"] == 7


def test_columns_of_other_versions_are_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fill(tmp_path)
    path = table_path(tmp_path, "j", "trials", f"{1:012x}-0")
    rows = pq.read_table(path)
    names = [name for name in rows.column_names if name not in ("flops", "pretrain.rungs")]
    older = rows.select(names).append_column("pretrain.forgotten", pa.array(["yes"]))
    pq.write_table(older.append_column("a.number", pa.array([7])), path)
    ask = 'select trial_id, flops, "pretrain.rungs", "pretrain.forgotten", "a.number" from trials order by all'
    before = query(tmp_path, ask).to_pylist()
    assert [row["pretrain.forgotten"] for row in before].count("yes") == 1
    compact_job(tmp_path, "j")
    assert query(tmp_path, ask).to_pylist() == before
    write_trial(tmp_path, 5, version=1)
    compact_job(tmp_path, "j")
    assert query(tmp_path, ask).to_pylist() == before


def test_files_that_several_threads_read_are_all_there_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of three, one of them with a column of another version, and one file damaged at last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raylab.results import snapshot

    names = [write_trial(tmp_path, number, version=number) for number in range(20)]
    odd = table_path(tmp_path, "j", "scores", names[7])
    pq.write_table(pq.read_table(odd).append_column("more", pa.array([1] * ROWS)), odd)
    whole = snapshot.read_table(tmp_path, "scores", columns=["trial_id", "value"])
    monkeypatch.setattr(snapshot, "FILES_AT_ONCE", 3)
    monkeypatch.setattr(snapshot, "READERS", 4)
    pieces = snapshot.read_table(tmp_path, "scores", columns=["trial_id", "value"])
    assert pieces.to_pylist() == whole.to_pylist()
    assert pieces["trial_id"].to_pylist() == [name for name in names for _ in range(ROWS)]
    assert query(tmp_path, "select count(more) as n from scores").to_pylist() == [{"n": ROWS}]
    last = table_path(tmp_path, "j", "scores", names[-1])
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(JobError, match=f"{last} is damaged"):
        query(tmp_path, "select value from scores")


# --- damage


def test_a_damaged_file_is_not_packed_and_is_named(tmp_path: Path) -> None:
    from raylab.results.repair import repair_job

    fill(tmp_path)
    path = table_path(tmp_path, "j", "scores", f"{1:012x}-0")
    path.write_bytes(path.read_bytes()[:-40])
    assert compact_job(tmp_path, "j")["scores"] == 11
    with pytest.raises(JobError, match=f"{path} is damaged; 'raylab resume j' writes it again"):
        query(tmp_path, "select value from scores")
    assert repair_job(tmp_path, "j")[0] == f"scores: the file of {1:012x}-0 was damaged; it is made again"
    assert f"{1:012x}-0" not in read_versions(tmp_path)


@pytest.mark.parametrize("place", ["first", "index", "end"])
def test_a_damaged_pack_is_named_and_set_aside(tmp_path: Path, place: str) -> None:
    from raylab.results.repair import repair_job

    fill(tmp_path)
    compact_job(tmp_path, "j")
    (path,) = list_packs(tmp_path, "j", "scores")
    data = bytearray(path.read_bytes())
    at = {"first": 30, "index": data.rfind(b'"rows"') - 3, "end": len(data) - 3}[place]
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(JobError, match=f"{path} is damaged; 'raylab resume j' writes it again"):
        query(tmp_path, "from scores")
    with pytest.raises(DamagedError):
        read_rows(tmp_path, "j", "scores", f"{1:012x}-0")
    assert compact_job(tmp_path, "j") == {}
    write_trial(tmp_path, 2, version=5)
    notes = repair_job(tmp_path, "j")
    assert notes[0] == f"scores: the file of {path.stem} was damaged; it is made again"
    assert read_versions(tmp_path) == {f"{2:012x}-0": 5}
    assert read_trial(tmp_path, "j", f"{1:012x}-0")["status"] == "running"  # type: ignore[index]


# --- killed


def compact_until(results: Path, point: int) -> None:
    """Compacts, and is killed when it is about to open, rename or delete a file for the `point`-th time."""
    left = point

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove") and str(results) in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    compact_job(results, "j")


def raise_children(pipe: Any) -> None:
    """Forks a child for each point that comes in, and answers how it ended: starting Python anew takes a second."""
    while (task := pipe.recv()) is not None:
        child = os.fork()
        if not child:
            compact_until(*task)
            os._exit(0)
        pipe.send(os.waitpid(child, 0)[1])


def test_killed_before_any_file_is_touched_nothing_is_lost(tmp_path: Path) -> None:
    """At each of its steps, from files that a pack holds already, others, and ones written again."""
    pipe, other = processes.Pipe()
    parent = processes.Process(target=raise_children, args=(other,))
    parent.start()
    begun, expected, point = tmp_path / "begun", {}, 0
    for number in (0, 1, 2, 1, 3):
        version = len(expected)
        expected[write_trial(begun, number, version)] = version
        if number == 2:
            compact_job(begun, "j")
    try:
        while True:
            results = shutil.copytree(begun, tmp_path / str(point))
            pipe.send((results, point))
            assert pipe.poll(60)
            ended = pipe.recv()
            assert read_versions(results) == expected
            assert {row["trial_id"]: row["num_steps"] for row in list_trials(results, "j")} == expected
            assert {row["trial_id"] for row in list_summaries(results, "j")} == expected.keys()
            if ended == 0:
                break
            assert os.WTERMSIG(ended) == signal.SIGKILL
            if point % 4 == 0:  # the next one makes good what was left
                compact_job(results, "j")
                assert read_versions(results) == expected
                left = sorted(path.name.split("-")[0] for path in (results / "j" / PACKS).iterdir())
                assert left == [".lock", "scores", "trials"]
            point += 1
    finally:
        pipe.send(None)
        parent.join()
    assert point > 20


# --- beside writers and readers


def write_and_compact(results: Path, seconds: float, state: Any) -> None:
    """Writes, writes again and packs, beside a thread that packs too; `state` holds the last version of each trial."""
    end, rng = time.monotonic() + seconds, random.Random(0)
    ended = threading.Event()

    def pack() -> None:
        while not ended.is_set():
            compact_job(results, "j")

    thread = threading.Thread(target=pack)
    thread.start()
    version = 0
    while time.monotonic() < end:
        version += 1
        number = rng.randrange(len(state))
        write_trial(results, number, version)
        state[number] = version
    ended.set()
    thread.join()


def test_readers_see_every_trial_once_beside_a_writer_that_compacts(tmp_path: Path) -> None:
    state = processes.Array("q", [0] * 12, lock=False)
    for number in range(4):
        write_trial(tmp_path, number)
    child = processes.Process(target=write_and_compact, args=(tmp_path, 8.0, state))
    child.start()
    last: dict[str, int] = {}
    reads = 0
    while child.is_alive():
        floor = {f"{number:012x}-0": version for number, version in enumerate(state) if version}
        found = read_versions(tmp_path) if reads % 2 else {
            trial_id: int(rows[0]["value"])
            for number in range(12) if (rows := read_rows(tmp_path, "j", "scores", trial_id := f"{number:012x}-0"))
        }  # fmt: skip
        for trial_id, version in (last | floor).items():
            assert found[trial_id] >= version
        if reads % 5 == 0:
            known = {row["trial_id"] for row in list_summaries(tmp_path, "j")}
            assert known >= floor.keys()
            assert sum(summarise_jobs(tmp_path)[0][name] for name in ("complete", "running")) >= len(known)
        last, reads = last | found, reads + 1
    child.join()
    assert child.exitcode == 0
    assert reads > 10
    assert read_versions(tmp_path) == {
        f"{number:012x}-0": version for number, version in enumerate(state) if version or number < 4
    }
    assert max(int(path.stem.split("-")[1]) for path in list_packs(tmp_path, "j", "scores")) > 1


def test_a_file_written_while_it_is_packed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the pack's writing and the deletion, as the slowest compaction gives most time for."""
    from raylab.results import compaction

    for number in range(3):
        write_trial(tmp_path, number)
    write = compaction._write_pack

    def slow(results: Path, job: str, table: str, *rest: Any) -> None:
        write(results, job, table, *rest)
        if table == "scores":
            write_trial(results, 1, version=8)

    monkeypatch.setattr(compaction, "_write_pack", slow)
    compact_job(tmp_path, "j")
    assert [path.stem for path in list_loose(tmp_path, "j", "scores")] == [f"{1:012x}-0"]
    assert read_versions(tmp_path) == {f"{0:012x}-0": 0, f"{1:012x}-0": 8, f"{2:012x}-0": 0}


def test_two_packs_of_one_number_both_count(tmp_path: Path) -> None:
    """As two machines may write where nothing is locked."""
    write_trial(tmp_path, 0)
    write_trial(tmp_path, 1)
    compact_job(tmp_path, "j")
    for path in list((tmp_path / "j" / PACKS).glob("*.parquet")):
        path.rename(tmp_path / path.name)
    write_trial(tmp_path, 2, version=1)
    write_trial(tmp_path, 3, version=1)
    compact_job(tmp_path, "j")
    for path in tmp_path.glob("*.parquet"):
        path.rename(tmp_path / "j" / PACKS / path.name)
    assert len(list_packs(tmp_path, "j", "scores")) == 2
    assert [len(names) for _, names in choose_rows(tmp_path, "j", "scores", ())] == [2, 2]
    expected = {f"{number:012x}-0": number // 2 for number in range(4)}
    assert read_versions(tmp_path) == expected
    compact_job(tmp_path, "j")
    assert len(list_packs(tmp_path, "j", "scores")) == 1
    assert read_versions(tmp_path) == expected


def test_of_two_compactions_one_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    write_trial(tmp_path, 0)
    (tmp_path / "j" / PACKS).mkdir()
    with FileLock(tmp_path / "j" / PACKS / ".lock"), pytest.raises(JobError, match="compact: j is being compacted"):
        compact_job(tmp_path, "j")


def test_jobs_are_compacted_by_name_or_all(tmp_path: Path) -> None:
    for job in ("one", "two"):
        for number in range(2):
            write_rows(tmp_path, job, "curves", f"a-{number}", [{"step": number}])
        (tmp_path / job / "job.yaml").write_text(f"name: {job}\n")
    with pytest.raises(JobError, match="no job 'three'"):
        list(compact_results(tmp_path, "three"))
    assert list(compact_results(tmp_path, "two")) == [("two", {"curves": 2})]
    assert list(compact_results(tmp_path)) == [("one", {"curves": 2}), ("two", {})]


# --- a whole job


def test_a_compacted_job_goes_on_as_any_other(make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from raylab.results.ranking import list_cells, rank_arms
    from raylab.runs import sweep
    from raylab.runs.checkpoints import measure_disk
    from raylab.runs.progress import SweepProgress

    monkeypatch.setattr(sweep, "MANY", 2)

    def run(**changes: Any) -> Any:
        job = make_job("mlm", {"name": "packed", "search": {"seeds": [0, 1]}, **changes})
        return job, sweep.run_job(job, tmp_path, SweepProgress(Console(quiet=True)), here=True)

    def rank(job: Any) -> list[Any]:
        table, cell, mode = list_cells(job)[0]
        base = next(row["arm"] for row in list_trials(tmp_path, "packed") if not row["arm"].startswith("baseline"))
        return rank_arms(tmp_path, job, table, cell, mode, base)

    job, ended = run()
    assert ended.states == {"complete": 2}
    assert not any(list_loose(tmp_path, "packed", table) for table in ("trials", "scores", "stages"))
    assert measure_disk(tmp_path, "packed")["stages_bytes"] > 0
    ranked, updated = rank(job), [row["updated_at"] for row in list_trials(tmp_path, "packed")]
    assert [row.value.num_seeds for row in ranked] == [2] * len(ranked)
    run()
    assert [row["updated_at"] for row in list_trials(tmp_path, "packed")] == updated  # nothing ran again
    job, _ = run(**{"evaluate.shots": [2, 3]})
    assert {row["shots"] for row in query(tmp_path, "select distinct shots from scores").to_pylist()} == {2, 3}
    assert [(row.arm, row.value) for row in rank(job)] == [(row.arm, row.value) for row in ranked]
    with open_tables(tmp_path) as tables:
        ((rows, distinct),) = tables.execute(
            "select count(*), count(distinct (trial_id, rung, task, split, shots, probe, draw, metric, class)) "
            "from scores"
        ).fetchall()
    assert rows == distinct
