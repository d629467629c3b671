"""The report of a search of 500 trials: seconds, bytes, and what a browser says of it.

    python benchmarks/report.py [--trials 500] [--keep DIR]      # needs playwright and Debian's chromium

Two trials are run, one of each objective; the others are their rows under other settings and seeds, with noise and an
effect of the settings, written as raylab writes them: 400 searched arms, and 10 confirmed ones on 10 seeds. The command
is timed whole, as a process of its own, three times. The last line is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tiny import make_job, write_tiny_notes

from raylab.job.jobs import dump_yaml
from raylab.job.settings import list_settings, with_settings
from raylab.job.specs import Job
from raylab.results.tables import SCHEMAS, plain_value, read_rows, write_rows
from raylab.runs.hygiene import check_corpus, keep_hygiene
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.trial import run_trial

CONFIRMED = 10
SEEDS = tuple(range(1, 11))
REPEATS = 3
TABLES = ("scores", "confusions", "geometry", "curves", "stages")
SPANS = (16, 20, 24, 28, 32)
ANCHORS = (1, 2, 3)


def make_search(notes: Path, num_arms: int) -> Job:
    """A search over objective, spans, anchors and rates; a grid of shots and freeze depths is scored."""
    return make_job(
        notes,
        {
            "name": "search",
            "pretrain.objective": "mlm",
            "pretrain.declutr": {"max_span": 32, "min_span": 8, "num_anchors": 1, "short_documents": "shrink"},
            "evaluate.tasks": ["condition", "severity"],
            "evaluate.shots": [1, 4, 16],
            "evaluate.draws": 5,
            "evaluate.frozen_layers": ["all", "1", "none"],
            "evaluate.fine_tune": {"steps": 3},
            "search": {
                "space": {
                    "pretrain.objective": ["mlm", "declutr"],
                    "pretrain.declutr.max_span": list(SPANS),
                    "pretrain.declutr.num_anchors": list(ANCHORS),
                    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
                },
                "design": "tpe", "num_arms": num_arms, "seeds": [0], "early_stopping": "none",
                "targets": [{"task": "severity", "shots": 16}],
                "confirm": {"top": CONFIRMED - 1, "seeds": list(SEEDS)},
            },
        },
    )  # fmt: skip


def draw_point(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """Settings of a searched arm; the first is the base arm."""
    rate = float(10 ** rng.uniform(-5, -3))
    if number == 0:
        return {}
    if rng.random() < 0.3:
        return {"pretrain.objective": "mlm", "pretrain.learning_rate": rate}
    return {
        "pretrain.objective": "declutr", "pretrain.declutr.max_span": int(rng.choice(SPANS)),
        "pretrain.declutr.num_anchors": int(rng.choice(ANCHORS)), "pretrain.learning_rate": rate,
    }  # fmt: skip


def effect(point: dict[str, Any]) -> float:
    """What the settings add to a score."""
    gain = 0.1 * (point.get("pretrain.objective") == "declutr")
    gain += 0.004 * (point.get("pretrain.declutr.max_span", 16) - 16)
    return gain - 0.03 * abs(np.log10(point.get("pretrain.learning_rate", 1e-3)) + 3.5)


def generate(job: Job, results: Path, num_arms: int) -> int:
    """Runs the two trials, writes all; gives the number of trials."""
    (results / job.name).mkdir(parents=True)
    (results / job.name / "job.yaml").write_text(dump_yaml(job))
    preparation = prepare(job, results)
    base = make_spec(preparation, {}, 0, "search")
    keep_hygiene(results, job.name, list(check_corpus(preparation, base)))
    made: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for objective in ("mlm", "declutr"):
        spec = make_spec(preparation, {"pretrain.objective": objective}, 0, "search")
        row = run_trial(spec)
        assert row["status"] == "complete", row["error"]
        made[objective] = {name: read_rows(results, job.name, name, spec.trial_id) for name in ("trials", *TABLES)}
        for name in made[objective]:
            shutil.rmtree(results / job.name / name)
    rng = np.random.default_rng(0)
    points = [draw_point(rng, number) for number in range(num_arms)]
    best = sorted(range(1, num_arms), key=lambda number: -effect(points[number]))[: CONFIRMED - 1]
    trials = [(number, 0, "search") for number in range(num_arms)]
    trials += [(number, seed, "confirm") for number in (0, *best) for seed in SEEDS]
    for number, seed, phase in trials:
        write_trial(job, results, points[number], number, seed, phase, made, rng)
    return len(trials)


def write_trial(
    job: Job, results: Path, point: dict[str, Any], number: int, seed: int, phase: str, made: Any, rng: Any
) -> None:
    """A trial's rows: those of the trial that was run with its objective, moved by its effect and noise."""
    source = made[point.get("pretrain.objective", "mlm")]
    arm, moved = f"{number + 1:012x}", effect(point) + float(rng.normal(0, 0.02))
    settings = {name: plain_value(value) for name, value in list_settings(with_settings(job, point)).items()}
    [row] = source["trials"]
    value = [0.5 + moved]
    row = row | settings | {"arm": arm, "seed": seed, "phase": phase, "target_values": value}
    row |= {"num_documents": int(5_000 / (1 + point.get("pretrain.declutr.max_span", 16) / 16))}
    for name in TABLES:
        rows = source[name]
        if name in ("scores", "geometry", "curves"):
            noise = rng.normal(0, 0.01, len(rows))
            rows = [
                r | {"value": None if r["value"] is None else r["value"] + moved * (name == "scores") + float(e)}
                for r, e in zip(rows, noise, strict=True)
            ]
        write_rows(results, job.name, name, f"{arm}-{seed}", [_own(name, r) for r in rows])
    write_rows(results, job.name, "trials", f"{arm}-{seed}", [_own("trials", row)])


def _own(table: str, row: dict[str, Any]) -> dict[str, Any]:
    names = set(SCHEMAS[table].names) - {"job", "trial_id"}
    return {name: value for name, value in row.items() if name in names}


def look(page: Path) -> dict[str, Any]:
    """What Chromium says of a page: messages of its console, figures, and how many of them are drawn."""
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        view = browser.new_page()
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.goto(page.absolute().as_uri())
        widths = view.evaluate("[...document.images].map(image => image.naturalWidth)")
        browser.close()
    return {"console_messages": len(said), "figures": len(widths), "figures_drawn": sum(width > 0 for width in widths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="a new folder that keeps the results and the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        num_arms = options.trials - CONFIRMED * len(SEEDS)
        job = make_search(write_tiny_notes(folder, 400), num_arms)
        num_trials = generate(job, folder / "results", num_arms)
        command = [sys.executable, "-m", "raylab.cli", "report", job.name, "--results", str(folder / "results")]
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            subprocess.run([*command, "--output", str(folder / "report")], check=True)
            seconds.append(time.perf_counter() - started)
        page = folder / "report" / "report.html"
        found = look(page)
        page_size = page.stat().st_size
        whole = sum(path.stat().st_size for path in page.parent.rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                "trials": num_trials, "seconds": round(statistics.median(seconds), 2),
                "repeats": [round(value, 2) for value in seconds], "page_mb": round(page_size / 1e6, 2),
                "folder_mb": round(whole / 1e6, 2), **found,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
