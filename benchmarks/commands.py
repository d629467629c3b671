"""Wall time of `raylab status` and `raylab query`, as whole processes, beside Python starting and importing DuckDB.

    python benchmarks/commands.py RESULTS

Medians over repeats, taken in turn. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HEAVY = ("torch", "ray", "sklearn", "transformers", "optuna", "pandas")


def measure(commands: dict[str, list[str]], repeats: int) -> dict[str, float]:
    """Median seconds of each command."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def list_heavy(arguments: list[str]) -> list[str]:
    """The heavy packages that a command imports."""
    code = (
        "import sys\nfrom raylab.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    names: list[str] = json.loads(found.stderr.splitlines()[-1].replace("'", '"'))
    return names


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a results folder with a job in it")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    raylab = str(Path(sys.executable).with_name("raylab"))
    place = ["--results", str(options.results)]
    status, query = ["status", *place], ["query", "select count(*) from scores", *place]
    medians = measure(
        {
            "status": [raylab, *status],
            "query": [raylab, *query],
            "python_duckdb": [sys.executable, "-c", "import duckdb"],
        },
        options.repeats,
    )
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} s")
    print(
        json.dumps(
            {
                "status_seconds": round(medians["status"], 3),
                "query_seconds": round(medians["query"], 3),
                "status_ratio": round(medians["status"] / medians["python_duckdb"], 2),
                "query_ratio": round(medians["query"] / medians["python_duckdb"], 2),
                "heavy_imports": sorted({*list_heavy(status), *list_heavy(query)}),
            }
        )
    )


if __name__ == "__main__":
    main()
