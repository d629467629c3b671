"""What sharing stages saves: two jobs at once on one results folder, against every trial trained from scratch.

    python benchmarks/reuse.py

Each job is a grid of 4 pre-trainings (learning rates), 3 tasks and 2 numbers of shots on 3 seeds: 72 trials; two of
its pre-trainings are the other job's too. Two `raylab run` processes share the results folder. Then some trials, one
of each kind of the grid, run from scratch: nothing but the tokens is there, as many at a time as there are CPUs, in
processes that are already warm; their mean stands for all. The last line is one JSON object.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny import TASKS, make_job, start_raylab, write_job, write_tiny_notes

from raylab.job.settings import dump_spec
from raylab.job.specs import Job, TrialSpec
from raylab.results.queries import open_tables
from raylab.runs.preparation import make_spec, prepare
from raylab.store.stages import FOLDER

RATES = {"first": (1e-3, 2e-3, 3e-3, 4e-3), "second": (3e-3, 4e-3, 5e-3, 6e-3)}
SHOTS = (2, 8)
SEEDS = (0, 1, 2)
RUNGS = 2
INPUTS = ("corpus-", "tokenizer-", "tokens-")


def make_grid(notes: Path, name: str, num_tokens: int) -> Job:
    """A job's arms: pre-trainings x tasks x shots."""
    space = {
        "pretrain.learning_rate": {"choices": list(RATES[name])},
        "evaluate.tasks": {"choices": list(TASKS)},
        "evaluate.shots": {"choices": list(SHOTS)},
    }
    changes = {
        "name": name,
        "pretrain.num_tokens": num_tokens,
        "pretrain.rungs": RUNGS,
        "search": {"space": space, "seeds": list(SEEDS)},
        # Two jobs at once: two trials at a time, as from scratch.
        "resources.max_concurrent_trials": 1,
    }
    return make_job(notes, changes)


def run_together(jobs: dict[str, Path], folder: Path) -> float:
    """Wall seconds of two `raylab run` on one results folder."""
    started = time.perf_counter()
    with (folder / "log").open("w") as log:
        processes = [
            start_raylab("run", str(path), "--results", str(folder / "results"), scratch=folder / name[0],
                         stdout=log, stderr=log)
            for name, path in jobs.items()
        ]  # fmt: skip
        codes = [process.wait() for process in processes]
    assert codes == [0, 0], (folder / "log").read_text()[-2000:]
    return time.perf_counter() - started


def count_stages(results: Path) -> dict[str, Any]:
    """Pre-trainings needed and built, by the `stages` table and by the folder; a start and a rung are one each."""
    distinct_rates = set(itertools.chain(*RATES.values()))
    connection = open_tables(results, "stages trials")
    rows = connection.execute(
        "select stage_id, count(*) filter (not reused), count(distinct job) from stages where kind = 'pretrain' "
        "group by stage_id"
    ).fetchall()
    trials = connection.execute(
        "select count(*), count(*) filter (status = 'complete') from trials where arm not like 'baseline:%'"
    ).fetchone()
    assert trials is not None
    return {
        "trials": trials[0],
        "trials_complete": trials[1],
        "pretrainings_needed": len(distinct_rates) * len(SEEDS) * RUNGS + len(SEEDS),
        "pretrainings_built": sum(built for _, built, _ in rows),
        "pretrainings_on_disk": len(list((results / FOLDER).glob("pretrain-*"))),
        "built_twice": sum(built > 1 for _, built, _ in rows),
        "used_by_both_jobs": sum(jobs > 1 for _, _, jobs in rows),
    }


def warm_up(text: str, folder: str, ready: Any) -> None:
    """What a worker process does once: imports, and a first trial; then it waits for the others."""
    run_scratch(text, folder, "warm")
    ready.wait()


def run_scratch(text: str, inputs: str, name: str) -> None:
    """A trial in a results folder that holds the corpus and its tokens alone."""
    from raylab.runs.trial import run_trial, set_threads

    set_threads(1)
    spec = TrialSpec.model_validate_json(text)
    own = Path(inputs) / f"{name}-{os.getpid()}"
    (own / FOLDER).mkdir(parents=True)
    for stage in Path(spec.results, FOLDER).iterdir():
        if stage.name.startswith(INPUTS):
            (own / FOLDER / stage.name).symlink_to(stage)
    row = run_trial(spec.model_copy(update={"results": str(own)}))
    assert row["status"] == "complete", row["error"]
    shutil.rmtree(own)


def time_scratch(jobs: dict[str, Job], folder: Path, sample: int) -> tuple[float, int]:
    """Wall seconds of some trials from scratch, two at a time, and their number."""
    specs = []
    for name, job in jobs.items():
        preparation = prepare(job, folder / "results")
        grid = itertools.product(RATES[name], TASKS, SHOTS, SEEDS)
        specs += [
            dump_spec(
                make_spec(
                    preparation,
                    {"pretrain.learning_rate": rate, "evaluate.tasks": task, "evaluate.shots": shots},
                    seed,
                    "fixed",
                )
            )
            for rate, task, shots, seed in grid
        ]
    step = max(1, len(specs) // sample)
    # A step that shares no factor with the grid's sides takes every task, shots and seed in turn.
    chosen = [specs[index * (step | 1) % len(specs)] for index in range(sample)]
    workers = min(2, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    with context.Pool(workers, warm_up, (specs[0], str(folder), ready)) as pool:
        ready.wait()
        started = time.perf_counter()
        pool.starmap(run_scratch, [(spec, str(folder), str(i)) for i, spec in enumerate(chosen)], chunksize=1)
        return time.perf_counter() - started, len(chosen)


def main() -> None:
    """Runs both ways and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="budget of a pre-training")
    parser.add_argument("--sample", type=int, default=12, help="trials run from scratch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rl") as name:
        folder = Path(name)
        notes = write_tiny_notes(folder / "notes")
        jobs = {which: make_grid(notes, which, options.tokens) for which in RATES}
        seconds = run_together({w: write_job(job, folder / f"{w}.yaml") for w, job in jobs.items()}, folder)
        counts = count_stages(folder / "results")
        print(f"both jobs together: {seconds:.0f} s", file=sys.stderr)
        scratch, sampled = time_scratch(jobs, folder, options.sample)
        whole = scratch / sampled * counts["trials"]
        figures = {
            **counts,
            "speedup": round(whole / seconds, 2),
            "seconds": round(seconds, 1),
            "scratch_seconds": round(whole, 1),
            "scratch_is": f"{sampled} trials from scratch in {scratch:.1f} s, two at a time, times trials / {sampled}; "
            "without the start of Ray and Python, which `seconds` holds twice",
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
