"""What the engine costs: a trial's overhead over bare Ray Tune, and a driver's memory and `status` on many trials.

    python benchmarks/sweep.py                  # 200 trials, raylab and bare Ray Tune in turn
    python benchmarks/sweep.py --trials 2000    # a driver's growth, and `raylab status` afterwards

The trials of the first share one pre-training of three rungs, made before, and differ in a fine-tuning rate: each
loads the encoder at three rungs, scores it and writes its tables. The bare trainable loads and scores with the same
functions, reports three times and writes as many bytes. Both run on a Ray of two CPUs with actors reused. The last
line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bare import CPUS, RUNGS, run_bare
from tiny import make_job, start_raylab, write_job, write_tiny_notes

from raylab.job.specs import Job, TrialSpec

# Trials of a run that are left out of its steady state: processes start and import with the first.
WARM_UP = 20
GROWTH_FROM = 200


def make_fine_tuned(notes: Path, name: str, num_arms: int, objective: str) -> Job:
    """Arms that differ in the rate of one fine-tuning step: none trains an encoder of its own."""
    search: dict[str, Any] = {"targets": [{"task": "severity", "frozen_layers": "1"}]}
    if num_arms > 1:
        rates = {"low": 1e-5, "high": 1e-2, "log": True}
        space = {"evaluate.fine_tune.learning_rate": rates}
        search |= {"space": space, "design": "random", "num_arms": num_arms, "seeds": [0]}
    changes = {
        "name": name,
        "pretrain.objective": objective,
        "pretrain.rungs": RUNGS,
        "evaluate.frozen_layers": ["1"],
        "evaluate.draws": 1,
        "evaluate.fine_tune": {"steps": 1, "hidden_size": 16},
        "search": search,
        # The bare trials load the rungs' encoders after the first job has ended.
        "limits.checkpoints": "all",
    }
    return make_job(notes, changes)


def run_timed(job: Job, results: Path) -> list[float]:
    """Runs a job and returns when each of its trials ended, in seconds from the start, then the whole."""
    from rich.console import Console

    from raylab.runs.progress import SweepProgress
    from raylab.runs.sweep import run_job

    started, ends = time.perf_counter(), []

    class Watch(SweepProgress):
        """Notes the time of each end."""

        def finish_trial(self, *arguments: Any) -> None:
            ends.append(time.perf_counter() - started)
            super().finish_trial(*arguments)

    with open(os.devnull, "w") as nowhere:
        watch = Watch(Console(file=nowhere))
        states = run_job(job, results, watch).states
        watch.stop()
    assert states == {"complete": len(ends)}, states
    return [*ends, time.perf_counter() - started]


def steady_ms(ends: list[float]) -> float:
    """Milliseconds from one trial's end to the next, once both actors are at work; the last entry is the whole."""
    warm = min(WARM_UP, len(ends) // 4)
    return 1000 * (ends[-2] - ends[warm]) / (len(ends) - 2 - warm)


def time_decision(text: str, job: Job, results: Path) -> float:
    """Median milliseconds in which a trial judges, after its second rung, whether it goes on beside all the others."""
    from raylab.results.tables import list_trials
    from raylab.search.judge import decide

    search = job.search.model_copy(update={"early_stopping": "successive_halving"})
    settings = job.model_copy(update={"search": search})
    trial_id = [row["trial_id"] for row in list_trials(results, job.name) if row["phase"] == "search"][-1]
    changes = {"job": job.name, "trial_id": trial_id, "phase": "search", "settings": settings}
    spec = TrialSpec.model_validate_json(text).model_copy(update=changes)
    milliseconds = []
    for _ in range(3):
        started = time.perf_counter()
        decide(spec, 2)
        milliseconds.append(1000 * (time.perf_counter() - started))
    return statistics.median(milliseconds)


def measure_overhead(folder: Path, num_trials: int, repeats: int) -> dict[str, Any]:
    """A trial through raylab against a trial through Ray Tune alone."""
    from raylab.runs.sweep import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    # Ray's workers find these modules as this process does.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    import ray

    from raylab.job.settings import dump_spec
    from raylab.runs.preparation import make_spec, prepare

    notes, results = write_tiny_notes(folder / "notes"), folder / "results"
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        base = make_fine_tuned(notes, "base", 1, "mlm")
        run_timed(base, results)
        text = dump_spec(make_spec(prepare(base, results), {}, 0, "fixed"))
        engine: list[list[float]] = []
        bare: list[list[float]] = []
        num_bytes = 0
        for repeat in range(repeats):
            name = f"sweep{repeat}"
            engine.append(run_timed(make_fine_tuned(notes, name, num_trials, "mlm"), results))
            files = [path for path in results.glob(f"{name}/*/*.parquet") if "baseline" not in path.name]
            num_bytes = sum(path.stat().st_size for path in files) // num_trials
            bare.append(run_bare(text, folder / f"bare{repeat}", num_trials, num_bytes))
            for who, ends in (("raylab", engine[-1]), ("bare", bare[-1])):
                print(f"{who}: {ends[-1]:.1f} s, {steady_ms(ends):.0f} ms a trial once warm", file=sys.stderr)
    finally:
        ray.shutdown()
    decision = time_decision(text, make_fine_tuned(notes, "sweep0", num_trials, "mlm"), results)
    whole = [statistics.median(1000 * ends[-1] / num_trials for ends in runs) for runs in (engine, bare)]
    differences = [round(1000 * (a[-1] - b[-1]) / num_trials, 1) for a, b in zip(engine, bare, strict=True)]
    steady = [statistics.median(steady_ms(ends) for ends in runs) for runs in (engine, bare)]
    return {
        "overhead_ms": statistics.median(differences),
        "raylab_ms": round(whole[0], 1),
        "bare_ms": round(whole[1], 1),
        "overhead_is": "wall time of the whole sweep over its trials, raylab less the bare one after it; median",
        "overhead_ms_by_repeat": differences,
        "steady_overhead_ms": round(steady[0] - steady[1], 1),
        "steady_raylab_ms": round(steady[0], 1),
        "steady_bare_ms": round(steady[1], 1),
        "decision_ms": round(decision, 1),
        "trials": num_trials,
        "repeats": repeats,
        "bytes_a_trial": num_bytes,
        "cpus": CPUS,
    }


def read_resident(pid: int) -> float:
    """Megabytes of a process that are in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def time_command(command: Callable[[], subprocess.Popen[Any]], repeats: int = 5) -> float:
    """Median wall seconds of a whole process."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        process = command()
        assert process.wait() == 0
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_growth(folder: Path, num_trials: int) -> dict[str, Any]:
    """`raylab run` on many trials as cheap as real ones get: its driver's memory by trials done, then `status`."""
    notes, results = write_tiny_notes(folder / "notes"), folder / "results"
    job = write_job(make_fine_tuned(notes, "many", num_trials, "none"), folder / "many.yaml")
    one = write_job(make_fine_tuned(notes, "one", 1, "none"), folder / "one.yaml")
    quiet: dict[str, Any] = {"scratch": folder / "t", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert start_raylab("run", str(one), "--results", str(folder / "single"), "--here", **quiet).wait() == 0
    resident: list[tuple[int, float]] = []
    last, started = 0.0, time.perf_counter()
    process = start_raylab("run", str(job), "--results", str(results), **quiet)
    while process.poll() is None:
        time.sleep(0.5)
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            files = [path for path in results.glob("many/trials/*.parquet") if not path.name.startswith("baseline")]
            resident.append((len(files), read_resident(process.pid)))
            if resident[-1][0] < num_trials:
                last = time.perf_counter() - started
            if len(resident) % 60 == 0:
                print(f"{resident[-1][0]} trials, {resident[-1][1]:.0f} MB", file=sys.stderr)
    assert process.wait() == 0, "the run failed"
    seconds = time.perf_counter() - started
    assert resident[-1][0] == num_trials, resident[-1]
    early = min(GROWTH_FROM, num_trials // 2)
    status = time_command(lambda: start_raylab("status", "many", "--results", str(results), **quiet))
    start = time_command(lambda: start_raylab("status", "one", "--results", str(folder / "single"), **quiet))
    return {
        "trials": num_trials,
        "driver_growth_mb": round(
            max(size for _, size in resident) - next(size for number, size in resident if number >= early), 1
        ),
        "growth_from_trial": early,
        "driver_mb_at": {
            wanted: round(next(size for number, size in resident if number >= wanted), 1)
            for wanted in sorted({early, num_trials // 2, num_trials})
        },
        "run_seconds": round(seconds, 1),
        "after_last_trial_seconds": round(seconds - last, 1),
        "trial_ms": round(1000 * last / num_trials, 1),
        "status_seconds": round(status, 3),
        "status_of_one_trial_seconds": round(start, 3),
        "status_ms_a_trial": round(1000 * (status - start) / num_trials, 3),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="measure memory and status on so many trials instead")
    parser.add_argument("--sweep", type=int, default=200, help="trials of the comparison with Ray Tune")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rl") as name:
        folder = Path(name)
        if options.trials:
            figures = measure_growth(folder, options.trials)
        else:
            figures = measure_overhead(folder, options.sweep, options.repeats)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
