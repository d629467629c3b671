"""Stages: built once whoever asks, whole or not there, named by what decides their result."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from raylab.base.world import World
from raylab.store import stages
from raylab.store.stages import (
    FOLDER,
    VERSIONS,
    Stage,
    build_stage,
    list_stages,
    name_stage,
    open_stage,
    peek_key,
    read_info,
)

KEY = {"texts": "abc", "size": 3}
# spawn: a fork of a process that has threads, as pytest has after other tests, may crash.
processes = multiprocessing.get_context("spawn")


def build(results: Path, log: Path | None = None, seconds: float = 0.0, key: dict[str, Any] = KEY) -> Stage:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "first").write_text("1")
        if log is not None:
            with log.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (folder / "second").write_text("2")
        return {"rows": 7}

    return build_stage(results, "tokens", key, fill)


def test_a_stage_is_built_once_and_found_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    built, found = build(tmp_path, log), build(tmp_path, log)
    assert not built.reused
    assert built.wall_seconds > 0
    assert found == built._replace(reused=True, wall_seconds=0.0, saved_seconds=built.wall_seconds)
    assert len(log.read_text().splitlines()) == 1
    assert open_stage(tmp_path, built.stage_id) == built.path
    assert read_info(built.path) == {"rows": 7}
    assert json.loads((built.path / "stage.json").read_text())["key"] == KEY
    assert sorted(file.name for file in built.path.iterdir()) == ["first", "second", "stage.json"]


def test_a_stage_tells_what_decided_it_and_is_listed_by_kind(tmp_path: Path) -> None:
    for kind, number in (("corpus", 1), ("corpus", 2), ("embed", 3)):
        build_stage(tmp_path, kind, {"number": number}, lambda folder: {})
    names = list_stages(tmp_path, "corpus")
    assert names == sorted(name_stage("corpus", {"number": number}) for number in (1, 2))
    assert {peek_key(tmp_path, name)["number"] for name in names} == {1, 2}  # type: ignore[index]
    assert peek_key(tmp_path, "corpus-none") is None
    assert list_stages(tmp_path / "elsewhere", "corpus") == []


def test_the_id_is_the_kind_the_key_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name_stage(kind, KEY) for kind in VERSIONS}
    assert len(names) == len(VERSIONS)
    assert name_stage("tokens", KEY) == name_stage("tokens", dict(reversed(KEY.items())))
    assert name_stage("tokens", KEY | {"size": 4}) not in names
    monkeypatch.setitem(stages.VERSIONS, "tokens", VERSIONS["tokens"] + 1)
    assert name_stage("tokens", KEY) not in names
    assert name_stage("embed", KEY) in names


def test_a_raised_version_builds_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build(tmp_path)
    monkeypatch.setitem(stages.VERSIONS, "tokens", VERSIONS["tokens"] + 1)
    new = build(tmp_path)
    assert not new.reused
    assert new.stage_id != old.stage_id
    assert open_stage(tmp_path, old.stage_id) == old.path


def test_an_error_leaves_nothing_that_counts_as_built(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "stale").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build_stage(tmp_path, "tokens", KEY, fail)
    assert open_stage(tmp_path, name_stage("tokens", KEY)) is None
    stage = build(tmp_path)
    assert not stage.reused
    assert not (stage.path / "stale").exists()
    assert not list((tmp_path / FOLDER).glob(".building-*"))


def test_a_killed_builder_leaves_nothing_and_its_lock_goes_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = processes.Process(target=build, args=(tmp_path, log, 60.0))
    child.start()
    wait_for(log.exists)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert open_stage(tmp_path, name_stage("tokens", KEY)) is None
    assert list((tmp_path / FOLDER).glob(".building-*/first"))
    stage = build(tmp_path, log)
    assert not stage.reused
    assert (stage.path / "second").read_text() == "2"
    assert not list((tmp_path / FOLDER).glob(".building-*"))


def test_a_folder_without_its_note_is_not_a_stage(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / name_stage("tokens", KEY)
    folder.mkdir(parents=True)
    (folder / "leftover").write_text("?")
    assert open_stage(tmp_path, folder.name) is None
    assert not build(tmp_path).reused
    assert not (folder / "leftover").exists()


def ask(results: Path, gate: Any, answers: Any) -> None:
    gate.wait()
    stage = build(results, results / "log", 0.3)
    answers.put((stage.stage_id, stage.reused, (stage.path / "second").read_text(), stage.info))


def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    answers = processes.Queue()
    gate = processes.Barrier(4)
    children = [processes.Process(target=ask, args=(tmp_path, gate, answers)) for _ in range(4)]
    for child in children:
        child.start()
    found = [answers.get(timeout=30) for _ in children]
    for child in children:
        child.join()
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert sorted(reused for _, reused, _, _ in found) == [False, True, True, True]
    assert {(stage_id, text, info["rows"]) for stage_id, _, text, info in found} == {
        (name_stage("tokens", KEY), "2", 7)
    }


def build_many(results: Path) -> None:
    for number in range(60):
        build(results, seconds=0.002, key={"number": number})


def test_a_reader_sees_only_whole_stages(tmp_path: Path) -> None:
    child = processes.Process(target=build_many, args=(tmp_path,))
    child.start()
    seen: set[str] = set()
    while child.is_alive():
        for number in range(60):
            stage_id = name_stage("tokens", {"number": number})
            path = open_stage(tmp_path, stage_id)
            if path is not None:
                seen.add(stage_id)
                assert read_info(path) == {"rows": 7}
                assert {file.name for file in path.iterdir()} == {"first", "second", "stage.json"}
    child.join()
    assert child.exitcode == 0
    assert seen


def test_only_the_first_worker_moves_the_folder(tmp_path: Path) -> None:
    """The second worker builds along, in the same scratch folder, and writes nothing by itself."""
    said: list[Any] = []

    def fill(folder: Path) -> dict[str, Any]:
        if not second.rank:
            (folder / "file").write_text("1")
        return {"rows": 7}

    second = World(0, 2, lambda value: said.append(value) or value)
    first = build_stage(tmp_path, "pretrain", KEY, fill, second)
    replies = iter(said)
    second = World(1, 2, lambda value: next(replies))
    other = build_stage(tmp_path / "nowhere", "pretrain", KEY, fill, second)
    assert (first.reused, other.reused) == (False, False)
    assert not (tmp_path / "nowhere").exists()


def wait_for(ready: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)
