"""Queries over 1,000,000 scores of 10,000 trials in 20 jobs: over small files, over packs, and beside pandas.

    python benchmarks/query.py [--quick] [--reads 10000]

The files are what the writer of raylab writes. The leaderboard is the mean over draws, then over seeds, of one cell, by
arm, in order. `warm` asks an open connection again; `cold` opens a new one in a running process. pandas reads each file
with read_parquet. With `--reads`, so many queries are asked instead while another process writes trials, writes them
again and packs them: 10,000 take some seven minutes on two cores. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from raylab.results.compaction import compact_job, compact_results
from raylab.results.queries import open_views, query
from raylab.results.tables import write_rows

SEEDS = 10
TASKS = ("question_type", "semantic_type")
SHOTS = (8, 32)
METRICS = ("f1_macro", "accuracy", "roc_auc", "average_precision", "calibration_error")
DRAWS = 5
START = datetime(2026, 1, 1, tzinfo=UTC)
processes = multiprocessing.get_context("spawn")

LEADERBOARD = """
select arm, avg(value) as mean, count(*) as seeds from (
    select t.job, t.arm, t.seed, avg(s.value) as value
    from scores s join trials t using (job, trial_id)
    where t.status = 'complete' and t.phase = 'fixed' and s.rung = t.num_rungs
        and s.task = 'question_type' and s.split = 'validation' and s.shots = 8 and s.frozen_layers = 'all'
        and s.probe = 'logistic' and s.metric = 'f1_macro' and s.class is null
    group by all
) group by all order by mean desc, arm
"""


def write_trial(results: Path, job: str, trial_id: str, version: float = 0.0) -> None:
    """A trial's 100 scores and its row, as a trial writes them."""
    rng = np.random.default_rng(int(trial_id.replace("-", ""), 16))
    cell = {"rung": 4, "split": "validation", "frozen_layers": "all", "probe": "logistic", "selection": "fixed"}
    rows = [
        cell | {
            "task": task, "shots": shots, "metric": metric, "draw": draw, "value": version + float(rng.random()),
            "num_train": shots * 10, "num_eval": 812, "parameters_updated": 3_340, "train_seconds": float(rng.random()),
        }
        for task in TASKS for shots in SHOTS for metric in METRICS for draw in range(DRAWS)
    ]  # fmt: skip
    write_rows(results, job, "scores", trial_id, rows)
    arm, _, seed = trial_id.rpartition("-")
    row = {
        "arm": arm, "seed": int(seed), "phase": "fixed", "status": "complete", "rung": 4, "num_rungs": 4,
        "pretrain.objective": "mlm", "pretrain.learning_rate": 1e-4, "wall_seconds": 80.0, "measures": "0" * 12,
        "data_digest": "1" * 12, "started_at": START, "updated_at": START, "attempts": 1, "rung_values": [0.1] * 4,
    }  # fmt: skip
    write_rows(results, job, "trials", trial_id, [row])


def generate(results: Path, num_trials: int, num_jobs: int) -> None:
    """Writes all trials, spread evenly over jobs."""
    for number in range(num_trials):
        job = f"job{number % num_jobs:02d}"
        write_trial(results, job, f"{number // SEEDS:012x}-{number % SEEDS}")
    for number in range(num_jobs):
        (results / f"job{number:02d}" / "job.yaml").write_text(f"name: job{number:02d}\n")


def ask_pandas(results: Path) -> list[tuple[str, float]]:
    """The leaderboard as one would ask pandas for it."""
    import pandas as pd

    scores = pd.concat([pd.read_parquet(path) for path in sorted(results.glob("*/scores/*.parquet"))])
    trials = pd.concat([pd.read_parquet(path) for path in sorted(results.glob("*/trials/*.parquet"))])
    rows = scores.merge(trials, on=["job", "trial_id"], suffixes=("", "_trial"))
    rows = rows[
        (rows["status"] == "complete") & (rows["phase"] == "fixed") & (rows["rung"] == rows["num_rungs"])
        & (rows["task"] == "question_type") & (rows["split"] == "validation") & (rows["shots"] == 8)
        & (rows["frozen_layers"] == "all") & (rows["probe"] == "logistic") & (rows["metric"] == "f1_macro")
        & rows["class"].isna()
    ]  # fmt: skip
    seeds = rows.groupby(["job", "arm", "seed"])["value"].mean().reset_index()
    means = seeds.groupby("arm")["value"].mean().reset_index().sort_values(["value", "arm"], ascending=[False, True])
    return list(zip(means["arm"], means["value"], strict=True))


def measure(act: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds, and the last answer."""
    seconds, answer = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        answer = act()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), answer


def ask_in_child(results: Path, repeats: int) -> dict[str, Any]:
    """Seconds cold and warm of the leaderboard, and the most memory that this process took, in MB."""
    query(results, "select 1")  # the libraries are loaded
    cold, answer = measure(lambda: query(results, LEADERBOARD), repeats)
    connection = open_views(results, LEADERBOARD)
    warm, _ = measure(lambda: connection.sql(LEADERBOARD).fetchall(), 5 * repeats)
    view, _ = measure(
        lambda: query(results, "select arm, mean from arms where metric = 'f1_macro' and shots = 8 order by mean"), 1
    )
    rows = answer.to_pydict()
    return {
        "cold": cold, "warm": warm, "view": view, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "answer": list(zip(rows["arm"], rows["mean"], strict=True)),
    }  # fmt: skip


def in_child(act: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, so that memory and caches are its own."""
    with processes.Pool(1) as pool:
        return pool.apply(act, arguments)


def time_command(results: Path) -> float:
    """Median seconds of the whole command."""
    command = [sys.executable, "-m", "raylab.cli", "query", LEADERBOARD, "--results", str(results), "--format", "csv"]
    return measure(lambda: subprocess.run(command, check=True, capture_output=True), 3)[0]


def check_same(one: list[tuple[str, float]], other: list[tuple[str, float]]) -> None:
    """Ends the benchmark where two leaderboards differ."""
    assert len(one) == len(other) > 0
    assert dict(one).keys() == dict(other).keys()
    np.testing.assert_allclose([dict(one)[arm] for arm in dict(one)], [dict(other)[arm] for arm in dict(one)])


def compare(quick: bool) -> dict[str, Any]:
    """The figures over small files, over packs, and of pandas."""
    num_trials = 1_000 if quick else 10_000
    results = Path(tempfile.mkdtemp(prefix="query-"))
    try:
        started = time.perf_counter()
        generate(results, num_trials, 20)
        print(f"{2 * num_trials} files written in {time.perf_counter() - started:.0f} s", flush=True)
        small = in_child(ask_in_child, results, 3)
        print(f"small files: {small['cold']:.2f} s", flush=True)
        pandas_seconds, pandas_answer = in_child(measure, _Ask(results), 1)
        print(f"pandas: {pandas_seconds:.1f} s", flush=True)
        command_small = time_command(results)
        started = time.perf_counter()
        packed = sum(sum(tables.values()) for _, tables in compact_results(results))
        compaction = time.perf_counter() - started
        large = in_child(ask_in_child, results, 5)
        check_same(small["answer"], pandas_answer)
        check_same(large["answer"], pandas_answer)
        return {
            "scores": num_trials * 100, "trials": num_trials, "jobs": 20, "files": 2 * num_trials,
            "small_files_seconds": round(small["cold"], 3), "pandas_seconds": round(pandas_seconds, 2),
            "speedup_vs_pandas": round(pandas_seconds / small["cold"], 1),
            "compacted_cold_ms": round(1e3 * large["cold"], 1), "compacted_warm_ms": round(1e3 * large["warm"], 1),
            "view_arms_ms": round(1e3 * large["view"], 1),
            "command_seconds": round(time_command(results), 3), "command_small_files_seconds": round(command_small, 3),
            "compaction_seconds": round(compaction, 2), "files_packed": packed,
            "memory_small_files_mb": round(small["memory"]), "memory_compacted_mb": round(large["memory"]),
        }  # fmt: skip
    finally:
        shutil.rmtree(results, ignore_errors=True)


class _Ask:
    """`ask_pandas` of a folder, as it travels to a process."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def __call__(self) -> list[tuple[str, float]]:
        return ask_pandas(self.results)


def keep_writing(results: Path, versions: Any, ended: Any) -> None:
    """Writes trials, new ones and old ones again, and packs them, until told to end; notes each version written."""
    rng, count = random.Random(0), 0
    while not ended.is_set():
        count += 1
        number = rng.randrange(len(versions))
        write_trial(results, f"job{number % 2:02d}", f"{number // SEEDS:012x}-{number % SEEDS}", float(count))
        versions[number] = count
        if count % 10 == 0:
            compact_job(results, f"job{rng.randrange(2):02d}")


def read_beside_writer(reads: int) -> dict[str, Any]:
    """Queries against a sweep that is writing: errors, and trials that are torn, twice, missing or older than seen."""
    results = Path(tempfile.mkdtemp(prefix="query-"))
    versions, ended = processes.Array("q", [0] * 40, lock=False), processes.Event()
    generate(results, 4, 2)
    writer = processes.Process(target=keep_writing, args=(results, versions, ended))
    writer.start()
    ask = (
        "select trial_id, floor(min(value)) as low, floor(max(value)) as high, count(*) as rows, "
        "count(distinct (task, shots, metric, draw)) as cells from scores group by all"
    )
    errors, torn, packs, last, started = 0, 0, set(), {}, time.perf_counter()
    try:
        for number in range(reads):
            floor = {f"{n // SEEDS:012x}-{n % SEEDS}": version for n, version in enumerate(versions) if version}
            try:
                rows = query(results, ask).to_pylist()
            except Exception as error:
                errors += 1
                print(f"read {number}: {error}", flush=True)
                continue
            found = {row["trial_id"]: row["low"] for row in rows}
            whole = all(row["low"] == row["high"] and row["rows"] == row["cells"] == 100 for row in rows)
            newer = all(found.get(trial, -1) >= version for trial, version in {**last, **floor}.items())
            torn += not (whole and newer)
            last = found
            packs |= {path.name for path in results.glob("*/_packed/*.parquet")}
            if (number + 1) % 1000 == 0:
                print(f"{number + 1} reads: {errors} errors, {torn} torn", flush=True)
    finally:
        ended.set()
        writer.join()
    seconds = time.perf_counter() - started
    assert writer.exitcode == 0
    shutil.rmtree(results, ignore_errors=True)
    return {
        "reads": reads, "errors": errors, "torn": torn, "writes": max(versions), "packs_seen": len(packs),
        "reads_per_second": round(reads / seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 files")
    parser.add_argument("--reads", type=int, help="so many queries beside a process that writes and packs")
    options = parser.parse_args()
    print(json.dumps(compare(options.quick) if options.reads is None else read_beside_writer(options.reads)))


if __name__ == "__main__":
    main()
