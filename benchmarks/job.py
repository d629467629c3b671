"""Runs a job as a user would and prints its time, its memory and what it found.

    python benchmarks/job.py jobs/quickstart.yaml
    python benchmarks/job.py jobs/medquad_cpu.yaml --data DIR

The job starts from an empty results folder. Memory is the sum over all its processes of the proportional set size,
sampled each second. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from raylab.job.jobs import load_job
from raylab.results.queries import open_tables
from raylab.results.ranking import list_cells, rank_arms, summarise_heldout
from raylab.runs.preparation import name_point, prepare


def list_family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(folder.name))
    family, front = {pid}, [pid]
    while front:
        children = parents.get(front.pop(), [])
        family.update(children)
        front += children
    return family


def read_memory(pids: set[int]) -> int:
    """Bytes of the processes together; memory that some share counts once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def run_measured(command: list[str]) -> tuple[float, int, int]:
    """Wall seconds, peak bytes of all processes, and exit code."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], read_memory(list_family(process.pid)))
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    watcher.join()
    return seconds, peak[0], code


def main() -> None:
    """Runs the job and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--data", type=Path, help="a folder that holds the corpus files, by name")
    options = parser.parse_args()
    job = load_job(options.job, data=options.data)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        command = [sys.executable, "-m", "raylab.cli", "run", str(options.job), "--results", folder]
        command += ["--data", str(options.data)] if options.data else []
        seconds, memory, code = run_measured(command)
        figures: dict[str, object] = {
            "job": job.name,
            "exit_code": code,
            "wall_seconds": round(seconds, 1),
            "peak_memory_gb": round(memory / 1e9, 2),
        }
        states = open_tables(results, "trials").execute(
            "select status, count(*) from trials where arm not like 'baseline:%' group by 1 order by 1"
        )
        figures["trials"] = dict(states.fetchall())
        base, _ = name_point(prepare(job, results), {})
        labels: dict[str, str] = {}
        for table, cell, mode in list_cells(job):
            name = "/".join(str(value) for value in cell.values() if value is not None)
            for row in rank_arms(results, job, table, cell, mode, base):
                labels[row.arm] = row.label
                found: dict[str, object] = {"mean": round(row.value.mean, 4), "seeds": row.value.num_seeds}
                if row.difference:
                    ends = (row.difference.mean, row.difference.low, row.difference.high)
                    found["difference"] = [round(value, 4) for value in ends]
                figures[f"{name}: {row.label}"] = found
        figures["heldout"] = {
            labels.get(arm, arm): {name: round(value.mean, 4) for name, value in measures.items()}
            for arm, measures in summarise_heldout(results, job).items()
            if arm in labels
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
