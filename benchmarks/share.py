"""Small trials that share a GPU, or two cores: the throughput of 1, 2 and 4 at once, through `raylab run`.

    python benchmarks/share.py                # on a GPU 1, 2 and 4 trials at once; else 1 of two threads, 2 of one
    python benchmarks/share.py --at-once 1 8

The same trials run at every setting, but for their seeds: DeCLUTR of a 6 x 384 encoder on synthetic notes, evaluated
on next to nothing. `tokens_per_second` is the sum over trials while as many as asked for were training, each beyond its
first points (where it compiles and warms up): every trial's curve tells how long each of its points took, and the time
at which its checkpoint was written when the last one was. `wall_tokens_per_second` is all tokens over the seconds of
the whole command: processes that start, corpus, evaluation and tables are in it. The last line is one JSON object.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import start_raylab, write_job

from raylab.job.jobs import check_job
from raylab.job.specs import Job
from raylab.results.tables import list_trials, read_rows
from raylab.store.stages import FOLDER, read_info

ENCODER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SPANS = {"num_anchors": 2, "num_positives": 2, "max_span": 128, "min_span": 32, "short_documents": "shrink"}
# Points of a trial's curve that are left out: its first.
WARM_UP = 5


class Load(NamedTuple):
    """How large the trials are: tokens of each, tokens a step, number of trials, notes and the longest in words."""

    tokens: int
    step: int
    trials: int
    notes: int
    words: int


LOADS = {"cuda": Load(12_000_000, 24_000, 4, 1500, 1500), "cpu": Load(30_000, 2048, 2, 200, 400)}


def make_shared(notes: Path, at_once: int, load: Load, resources: dict[str, Any]) -> Job:
    """A job of some trials on seeds of their own, so that no two settings share a pre-training."""
    table = {"path": str(notes), "text": "text", "group": "patient"}
    rates = {"pretrain.learning_rate": {"choices": [1e-4]}}
    return check_job(
        {
            "name": f"share{at_once}",
            "corpus": {
                "documents": table,
                "tasks": {"severity": {**table, "label": "severity"}},
                "split": {"train": 0.8, "validation": 0.1, "test": 0.1},
                "max_length": 256,
            },
            "encoder": {"config": ENCODER, "tokenizer": {"vocab_size": 8000}},
            "pretrain": {
                "objective": "declutr",
                "declutr": SPANS,
                "num_tokens": load.tokens,
                "batch_tokens": load.step,
                "learning_rate": 1e-4,
                "rungs": 1,
            },
            "evaluate": {
                "tasks": ["severity"],
                "shots": [2],
                "draws": 1,
                "probes": ["logistic"],
                "geometry": {"max_points": 100, "graph_points": 50},
                "retrieval": {"span": 16, "candidates": 8},
            },
            "search": {
                "space": rates,
                "design": "grid",
                "seeds": [100 * at_once + seed for seed in range(load.trials)],
            },
            "resources": {"max_concurrent_trials": at_once, **resources},
        }
    )


class Part(NamedTuple):
    """What a trial did between two points of its curve: seconds since 1970, and tokens a second."""

    trial: str
    start: float
    end: float
    rate: float
    warm: bool


def read_parts(results: Path, job: str, trial_id: str) -> list[Part]:
    """A trial's training over time, dated by its last checkpoint."""
    rows = [row for row in read_rows(results, job, "curves", trial_id) if row["metric"] == "train_tokens_per_second"]
    stages = [row for row in read_rows(results, job, "stages", trial_id) if row["kind"] == "pretrain"]
    last = max((results / FOLDER / row["stage_id"] for row in stages), key=lambda path: read_info(path)["tokens"])
    end, parts = (last / "stage.json").stat().st_mtime, []
    tokens = [0, *(row["tokens"] for row in rows)]
    for place in reversed(range(len(rows))):
        start = end - (tokens[place + 1] - tokens[place]) / rows[place]["value"]
        parts.append(Part(trial_id, start, end, rows[place]["value"], place >= min(WARM_UP, len(rows) // 4)))
        end = start
    return parts[::-1]


def sum_rates(parts: list[Part], at_once: int) -> tuple[float, float]:
    """Tokens a second of all trials, mean over the time in which `at_once` trained beyond warming up; that time."""
    edges = sorted({time for part in parts for time in (part.start, part.end)})
    tokens = seconds = 0.0
    for start, end in itertools.pairwise(edges):
        here = [part for part in parts if part.start <= start and end <= part.end]
        if len(here) == at_once and all(part.warm for part in here):
            seconds += end - start
            tokens += (end - start) * sum(part.rate for part in here)
    if not seconds:
        raise SystemExit(f"never did {at_once} trials train at once: they were too short; give more --tokens")
    return tokens / seconds, seconds


def measure(folder: Path, notes: Path, at_once: int, load: Load, resources: dict[str, Any]) -> dict[str, Any]:
    """Runs a job with so many trials at once."""
    job, results = make_shared(notes, at_once, load, resources), folder / "results"
    path = write_job(job, folder / f"{job.name}.yaml")
    log, began = folder / f"{job.name}.log", time.perf_counter()
    with log.open("w") as stream:
        command = start_raylab(
            "run", str(path), "--results", str(results), scratch=folder / "t", stdout=stream, stderr=stream
        )
        code = command.wait()
    wall = time.perf_counter() - began
    rows = [row for row in list_trials(results, job.name) if not row["arm"].startswith("baseline:")]
    if code or any(row["status"] != "complete" for row in rows):
        raise SystemExit(f"the run ended with {code}: {log.read_text()[-2000:]} {[row['error'] for row in rows]}")
    parts = [part for row in rows for part in read_parts(results, job.name, row["trial_id"])]
    rate, seconds = sum_rates(parts, at_once)
    points: dict[str, list[float]] = {}
    for row in rows:
        for point in read_rows(results, job.name, "curves", row["trial_id"]):
            points.setdefault(point["metric"], []).append(point["value"])
    return {
        "at_once": at_once,
        "resources": resources,
        "tokens_per_second": round(rate),
        "seconds_at_once": round(seconds, 1),
        "tokens_per_second_of_each": [
            round(statistics.median(part.rate for part in parts if part.trial == row["trial_id"] and part.warm))
            for row in rows
        ],
        "mfu_of_each": round(statistics.median(points["train_mfu"]), 4),
        "data_seconds": round(sum(points["train_data_seconds"]), 2),
        "peak_memory_gb_of_each": round(max(points["train_peak_memory_gb"]), 2),
        "wall_seconds": round(wall, 1),
        "wall_tokens_per_second": round(sum(row["num_tokens"] for row in rows) / wall),
        "trial_seconds": [round(row["wall_seconds"], 1) for row in rows],
        "device": rows[0]["device"],
    }


def main() -> None:
    """Measures and prints."""
    gpu = torch.cuda.is_available()
    load = LOADS["cuda" if gpu else "cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4] if gpu else [1, 2])
    parser.add_argument("--tokens", type=int, default=load.tokens, help="of each trial (default %(default)s)")
    parser.add_argument("--step", type=int, default=load.step, help="tokens a step (default %(default)s)")
    parser.add_argument("--trials", type=int, default=load.trials, help="at each setting (default %(default)s)")
    parser.add_argument("--compile", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--cpus", type=int, default=2, help="shared by the trials where there is no GPU")
    options = parser.parse_args()
    load = load._replace(tokens=options.tokens, step=options.step, trials=options.trials)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rl") as name:
        folder = Path(name)
        notes = folder / "notes"
        assert start_raylab("synth", str(notes), "--notes", str(load.notes), "--max-words", str(load.words),
                            scratch=folder / "t").wait() == 0  # fmt: skip
        for at_once in options.at_once:
            # On a GPU a trial has the same CPUs however many share it; without one, the CPUs are what is shared.
            there, sharing = (os.cpu_count() or 1, max(options.at_once)) if gpu else (options.cpus, at_once)
            resources = {"cpus_per_worker": max(1, there // sharing), "gpus_per_worker": 1 / at_once if gpu else 0}
            resources["compile"] = options.compile
            found.append(measure(folder, notes / "notes.parquet", at_once, load, resources))
            print(json.dumps(found[-1]), flush=True)
    base = found[0]["tokens_per_second"]
    figures = {
        "tokens_per_second": {run["at_once"]: run["tokens_per_second"] for run in found},
        "ratio": {run["at_once"]: round(run["tokens_per_second"] / base, 2) for run in found},
        "wall_ratio": {run["at_once"]: round(found[0]["wall_seconds"] / run["wall_seconds"], 2) for run in found},
        "encoder": ENCODER,
        "objective": "declutr",
        "load": load._asdict(),
        "runs": found,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
