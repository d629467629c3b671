"""Kills a sweep again and again, resumes it, and compares its tables with those of an unbroken run.

    python benchmarks/chaos.py --kills 20

A grid of four objectives on two seeds runs once unbroken, then in another results folder under SIGKILLs of the driver
alone, of the driver with all its children, of a trial's process, and of the raylet, at random times over what is left
of the run. A job that ends before all kills are used is compared, and one on other seeds goes on. What a kill orphans
is left alone: the next driver has to cope with it. Only processes started here are touched. The last line is one JSON
object: `lost`, `twice` and `different` must be 0; attempts, error, device, memory and times are not compared.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from job import list_family
from tiny import make_job, start_raylab, write_job, write_tiny_notes

from raylab.job.specs import Job
from raylab.results.tables import OF_A_RUN, list_names, read_pieces

KINDS = ("driver", "driver_and_children", "trial", "raylet")
MARKS = {"trial": b"ray::ImplicitFunc", "raylet": b"raylet/raylet"}
# A driver needs up to about 40 s to see that its raylet is gone; one that takes longer than this hangs.
PATIENCE_SECONDS = 120
MOST_RESUMES = 10  # without a kill, before a job counts as one that can't be finished
# What promise 1 leaves out.
UNLIKE = {
    "attempts", "error", "device", "peak_memory_bytes", "wall_seconds", "gpu_seconds", "saved_seconds", "started_at",
    "updated_at", "reused", "train_seconds",
}  # fmt: skip
KEYS = {
    "trials": ("trial_id",),
    "scores": ("trial_id", "rung", "task", "split", "shots", "frozen_layers", "probe", "draw", "metric", "class"),
    "confusions": (
        "trial_id",
        "rung",
        "task",
        "split",
        "shots",
        "frozen_layers",
        "probe",
        "draw",
        "class",
        "predicted",
    ),
    "geometry": ("trial_id", "rung", "task", "split", "metric", "parameter"),
    "curves": ("trial_id", "step", "metric"),
    "stages": ("trial_id", "stage_id"),
}
Rows = dict[tuple[Any, ...], list[dict[str, Any]]]


class Family:
    """A process and all that ever descended from it, also what a parent's death has left to others."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.seen: dict[int, str] = {}
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.look()
            self.ended.wait(0.2)

    def look(self) -> None:
        """Notes who is there now, with the time of their start: numbers are given anew."""
        for pid in list_family(self.pid):
            if pid not in self.seen and (born := read_birth(pid)):
                self.seen[pid] = born

    def living(self) -> list[int]:
        """Those still alive."""
        return [pid for pid, born in list(self.seen.items()) if read_birth(pid) == born]

    def find(self, mark: bytes) -> list[int]:
        """Those alive whose command line holds `mark`."""
        return [pid for pid in self.living() if mark in read_command(pid)]

    def kill(self, pids: list[int]) -> int:
        """SIGKILL; how many were still there."""
        hit = 0
        for pid in pids:
            if read_birth(pid) == self.seen.get(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hit += 1
        return hit


def read_birth(pid: int) -> str:
    """When a process began, in ticks; empty where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def read_command(pid: int) -> bytes:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def make_grid(notes: Path, name: str, seeds: list[int], num_tokens: int) -> Job:
    """Four objectives, DeCLUTR with one or two anchors, on two seeds: ten trials, three rungs each."""
    space = {
        "pretrain.objective": {"choices": ["none", "mlm", "declutr", "metadata"]},
        "pretrain.declutr.num_anchors": {"choices": [1, 2], "when": {"pretrain.objective": "declutr"}},
    }
    changes = {
        "name": name,
        "pretrain.objective": "none",
        "pretrain.num_tokens": num_tokens,
        "pretrain.declutr": {"num_anchors": 2, "num_positives": 2, "max_span": 24, "min_span": 8},
        "pretrain.metadata": {"field": "category"},
        "search": {"space": space, "seeds": seeds, "targets": [{"task": "severity"}]},
    }
    return make_job(notes, changes)


class Chaos:
    """Runs jobs, unbroken and broken, in one folder, and counts."""

    def __init__(self, folder: Path, seed: int, kills: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.kills = kills
        self.done: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.families: list[Family] = []
        self.log = (folder / "log").open("w")
        self.started = time.monotonic()

    def start(self, *arguments: str) -> subprocess.Popen[Any]:
        """A raylab command under watch."""
        process = start_raylab(*arguments, scratch=self.folder / "t", stdout=self.log, stderr=self.log)
        self.families.append(Family(process.pid))
        return process

    def tell(self, text: str) -> None:
        """A line for whoever waits."""
        seconds = time.monotonic() - self.started
        print(f"[{seconds:5.0f} s, {sum(self.done.values())}/{self.kills}] {text}", file=sys.stderr, flush=True)

    def run_unbroken(self, job: Job) -> tuple[Path, float, float]:
        """Results folder, seconds until the first trial began, and seconds of the whole (0: it ran before)."""
        path, results = self.folder / f"{job.name}.yaml", self.folder / "unbroken"
        started, first = time.monotonic(), 0.0
        if (results / job.name).is_dir():
            return results, 0.0, 0.0
        process = self.start("run", str(path), "--results", str(results))
        while process.poll() is None:
            if not first and list(results.glob(f"{job.name}/trials/[!b.]*.parquet")):
                first = time.monotonic() - started
            time.sleep(0.1)
        self.families[-1].ended.set()
        if process.returncode != 0:
            raise SystemExit(f"the unbroken run ended with {process.returncode}: {self.read_log()}")
        seconds = time.monotonic() - started
        self.tell(f"{job.name}: unbroken in {seconds:.0f} s, its first trial after {first:.0f} s")
        return results, first, seconds

    def run_broken(self, job: Job, start_seconds: float, seconds: float) -> Path:
        """Runs a job to its end while there are kills left; returns its results folder."""
        results, idle = self.folder / "broken", 0
        command = ["run", str(self.folder / f"{job.name}.yaml")]
        while True:
            complete, built = read_complete(results, job.name), read_built(results)
            process = self.start(*command, "--results", str(results))
            hits = self.disturb(process, job, results, start_seconds, seconds)
            self.families[-1].look()
            self.families[-1].ended.set()
            self.check_untouched(results, job.name, complete, built)
            if process.returncode == 0:
                return results
            idle = 0 if hits else idle + 1
            if idle == MOST_RESUMES:
                self.notes.append(f"{job.name} can't be finished: {self.read_log()}")
                return results
            # What the driver has not written yet can only be run again, not resumed.
            kept = (results / job.name / "job.yaml").is_file()
            command = ["resume", job.name] if kept else ["run", str(self.folder / f"{job.name}.yaml")]
            self.counts["resumes"] += kept

    def disturb(self, process: subprocess.Popen[Any], job: Job, results: Path, first: float, seconds: float) -> int:
        """Kills what comes next until the driver ends; returns how many kills hit something."""
        hits = 0
        while process.poll() is None and sum(self.done.values()) < self.kills:
            kind = KINDS[int(self.rng.integers(len(KINDS)))]
            left = 1 - len(read_complete(results, job.name)) / (len(job.search.seeds) * 5 + 4)
            if kind in MARKS:  # from when there is one
                while process.poll() is None and not self.families[-1].find(MARKS[kind]):
                    time.sleep(0.05)
                delay = self.rng.uniform(0, (seconds - first) * left)
            else:
                delay = self.rng.uniform(0, first + (seconds - first) * left)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            if process.poll() is None and self.hit(kind, process):
                hits += 1
                self.done[kind] += 1
                self.tell(f"{job.name}: killed {kind} after {delay:.1f} s, {left:.0%} of the trials left")
                if kind != "trial":
                    self.await_end(process)
        if process.poll() is None:
            self.await_end(process, 10 * seconds + PATIENCE_SECONDS)
        return hits

    def hit(self, kind: str, process: subprocess.Popen[Any]) -> int:
        """Kills the driver, all, a trial's process or the raylet; returns how many were there to be killed."""
        family = self.families[-1]
        family.look()
        if kind == "driver":
            return family.kill([process.pid])
        if kind == "driver_and_children":
            return family.kill([process.pid, *family.living()])
        found = family.find(MARKS[kind])
        return family.kill([found[int(self.rng.integers(len(found)))]]) if found else 0

    def await_end(self, process: subprocess.Popen[Any], patience: float = PATIENCE_SECONDS) -> None:
        """Waits for a driver's end; one that hangs is noted and killed."""
        started = time.monotonic()
        try:
            process.wait(patience)
            self.counts["longest_wait"] = max(self.counts["longest_wait"], round(time.monotonic() - started))
        except subprocess.TimeoutExpired:
            self.counts["hung"] += 1
            self.notes.append(f"a driver hung for {patience:.0f} s")
            self.families[-1].kill([process.pid])
            process.wait()

    def check_untouched(self, results: Path, job: str, complete: dict[str, Any], built: dict[str, float]) -> None:
        """Counts trials that were complete before a command and written by it, and stages built over."""
        after = read_complete(results, job)
        again = [trial_id for trial_id, row in complete.items() if after.get(trial_id) != row]
        over = [stage for stage, changed in built.items() if read_built(results).get(stage) != changed]
        self.counts["twice"] += len(again) + len(over)
        self.notes += [f"{job}: {trial_id} was complete and was run again" for trial_id in again]
        self.notes += [f"stage {stage} was there and was built again" for stage in over]

    def compare(self, job: str, unbroken: Path, broken: Path) -> None:
        """Counts rows lost, held twice and different."""
        for table in KEYS:
            wanted, found = read_table(unbroken, job, table), read_table(broken, job, table)
            lost, more = wanted.keys() - found.keys(), found.keys() - wanted.keys()
            both = wanted.keys() & found.keys()
            twice = [key for key in found if len(found[key]) > 1]
            unlike = [key for key in both if plain(wanted[key][0]) != plain(found[key][0])]
            self.counts.update(lost=len(lost), twice=len(twice), different=len(unlike) + len(more))
            columns = {
                name
                for key in unlike
                for name, value in plain(wanted[key][0]).items()
                if plain(found[key][0])[name] != value
            }
            for what, keys in (("lost", lost), ("twice", twice), ("different", unlike), ("more", more)):
                if keys:
                    trials = sorted({str(key[0]) for key in keys})[:4]
                    self.notes.append(f"{job}.{table}: {len(keys)} rows {what}, of {trials} {sorted(columns)}")
        built = Counter(key[1] for key, rows in read_table(broken, job, "stages").items() if not rows[0]["reused"])
        self.counts["twice"] += sum(count > 1 for count in built.values())
        self.notes += [f"{job}: stage {stage} built {n} times" for stage, n in built.items() if n > 1]

    def read_log(self) -> str:
        """The last lines that raylab printed."""
        self.log.flush()
        return " | ".join((self.folder / "log").read_text().splitlines()[-5:])

    def close(self) -> None:
        """Ends what is still alive of all that was started here."""
        for family in self.families:
            family.ended.set()
            family.kill(family.living())
        self.log.close()


def read_table(results: Path, job: str, table: str) -> Rows:
    """Key -> rows of a job's table."""
    rows: Rows = {}
    for name in list_names(results, job, table):
        found = read_pieces(results, job, table, name)
        for row in [] if found is None else found.to_pylist():
            rows.setdefault(tuple(row[key] for key in KEYS[table]), []).append(row)
    return rows


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row must be that of an unbroken run."""
    waited = {"value"} if row.get("metric") in OF_A_RUN else set()
    return {name: value for name, value in row.items() if name not in UNLIKE | waited}


def read_complete(results: Path, job: str) -> dict[str, Any]:
    """Complete trials and baselines, with their attempts and last change."""
    rows = read_table(results, job, "trials").items()
    return {key[0]: (r[0]["attempts"], r[0]["updated_at"]) for key, r in rows if r[0]["status"] == "complete"}


def read_built(results: Path) -> dict[str, float]:
    """When each stage that is there was built: what of a checkpoint is pruned later leaves `stage.json` rewritten."""
    built = {}
    for path in results.glob("_stages/[!.]*/stage.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            # Of two builds, no two take the same time to the last digit.
            built[path.parent.name] = json.loads(path.read_text())["wall_seconds"]
    return built


@contextlib.contextmanager
def open_chaos(seed: int, kills: int, keep: bool) -> Iterator[Chaos]:
    """A folder and what runs in it, ended whatever happens."""
    folder = tempfile.mkdtemp(prefix="rl")
    chaos = Chaos(Path(folder), seed, kills)
    try:
        yield chaos
    finally:
        chaos.close()
        if keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            subprocess.run(["rm", "-rf", folder], check=False)


def main() -> None:
    """Runs, kills, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=60_000, help="pre-training budget of a trial: how long it runs")
    parser.add_argument("--keep", action="store_true", help="leave the folder of the runs")
    options = parser.parse_args()
    started = time.monotonic()
    with open_chaos(options.seed, options.kills, options.keep) as chaos:
        notes, variants, first, seconds = write_tiny_notes(chaos.folder / "notes"), 0, 0.0, 0.0
        while sum(chaos.done.values()) < options.kills:
            variants += 1
            job = make_grid(notes, f"chaos{variants}", [2 * variants - 2, 2 * variants - 1], options.tokens)
            write_job(job, chaos.folder / f"{job.name}.yaml")
            if not seconds:  # the first unbroken run says how long a run takes
                _, first, seconds = chaos.run_unbroken(job)
            before = sum(chaos.done.values())
            broken = chaos.run_broken(job, first, seconds)
            if sum(chaos.done.values()) > before:
                chaos.compare(job.name, chaos.run_unbroken(job)[0], broken)
        figures = {
            "kills": sum(chaos.done.values()),
            "kills_by_kind": {kind: chaos.done[kind] for kind in KINDS},
            **{name: chaos.counts[name] for name in ("lost", "twice", "different", "resumes", "hung")},
            "longest_wait_seconds": chaos.counts["longest_wait"],
            "jobs": variants,
            "notes": chaos.notes,
            "seconds": round(time.monotonic() - started),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
