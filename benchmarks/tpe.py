"""TPE against random search through raylab's own search, on surfaces whose best value is known; nothing is trained.

Run `python benchmarks/tpe.py`: under three minutes on one core. The last line is JSON. Each seed of the sampler is one
pair: both designs ask for the same number of arms. A regret is what the best arm found lacks to the surface's best, 0.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from raylab.base.identity import name_arm
from raylab.job.jobs import check_job
from raylab.job.settings import list_settings, with_settings
from raylab.job.specs import Job
from raylab.search.search import Search

SPACE = {
    "pretrain.objective": ["mlm", "declutr", "metadata"],
    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "pretrain.declutr.max_span": {"low": 16, "high": 254},
    "pretrain.declutr.num_anchors": {"low": 1, "high": 4},
    "pretrain.declutr.num_positives": {"low": 1, "high": 4},
    "pretrain.declutr.temperature": {"low": 0.005, "high": 1.0, "log": True},
    "pretrain.declutr.sampling": ["any", "adjacent", "subsuming"],
    "pretrain.metadata.weight": {"low": 0.01, "high": 1.0, "log": True},
}
TABLE = {"path": "not_read.parquet", "text": "text"}
JOB = {
    "name": "surface",
    "corpus": {"documents": TABLE, "tasks": {"task": {**TABLE, "label": "label"}}, "max_length": 256},
    "encoder": {"config": {}, "tokenizer": {}},
    "pretrain": {"num_tokens": 10_000_000, "batch_tokens": 16_384, "metadata": {"field": "source"}},
}
Point = dict[str, Any]


def decades(value: float, best: float) -> float:
    return math.log10(value / best)


def measure_declutr(values: Point) -> float:
    """Best in DeCLUTR, each setting on its own: 0 at 1e-3, spans of 96, 2 anchors, 3 positives, 0.05, adjacent."""
    found = -0.05 * decades(values["pretrain.learning_rate"], 1e-3) ** 2
    if values["pretrain.objective"] != "declutr":
        return found - {"mlm": 0.10, "metadata": 0.08}[values["pretrain.objective"]]
    return (
        found
        - 0.05 * (math.log2(values["pretrain.declutr.max_span"] / 96) / 2) ** 2
        - 0.02 * abs(values["pretrain.declutr.num_anchors"] - 2)
        - 0.01 * abs(values["pretrain.declutr.num_positives"] - 3)
        - 0.10 * decades(values["pretrain.declutr.temperature"], 0.05) ** 2
        - {"any": 0.02, "adjacent": 0.0, "subsuming": 0.03}[values["pretrain.declutr.sampling"]]
    )


def measure_ridge(values: Point) -> float:
    """Best in DeCLUTR, settings that depend on each other: the rate on the temperature, the spans on the anchors."""
    if values["pretrain.objective"] != "declutr":
        return -0.12 - 0.03 * abs(decades(values["pretrain.learning_rate"], 1e-4))
    rate = decades(values["pretrain.learning_rate"], 3e-4)
    temperature = decades(values["pretrain.declutr.temperature"], 0.05)
    spans = values["pretrain.declutr.max_span"] * values["pretrain.declutr.num_anchors"] / 192
    return (
        -0.10 * (rate - temperature) ** 2
        - 0.02 * temperature**2
        - 0.05 * math.log2(spans) ** 2
        - 0.01 * (values["pretrain.declutr.num_anchors"] != 2)
    )


def measure_metadata(values: Point) -> float:
    """Best in metadata, narrow; DeCLUTR is better on average and never within 0.05 of it."""
    rate = decades(values["pretrain.learning_rate"], 2e-4)
    if values["pretrain.objective"] == "metadata":
        return max(-0.3, -0.2 * rate**2 - 0.3 * decades(values["pretrain.metadata.weight"], 0.2) ** 2)
    if values["pretrain.objective"] == "mlm":
        return -0.10 - 0.02 * rate**2
    return -0.05 - 0.01 * rate**2 - 0.01 * decades(values["pretrain.declutr.temperature"], 0.05) ** 2


SURFACES: dict[str, Callable[[Point], float]] = {
    "declutr": measure_declutr,
    "ridge": measure_ridge,
    "metadata": measure_metadata,
}


def make_job(design: str, seed: int, num_arms: int) -> Job:
    search = {"space": SPACE, "design": design, "num_arms": num_arms, "sampler_seed": seed}
    return check_job({**JOB, "search": {**search, "targets": [{"task": "task"}]}})


def find_best(job: Job, measure: Callable[[Point], float], results: Path) -> float:
    """The best value among a search's arms, run one after another."""

    def name_point(values: Point) -> str:
        settings = list_settings(with_settings(job, values))
        return name_arm(settings, data_digest="", encoder_digest="", searched=job.search.space)

    search, best = Search(job, results, name_point), -math.inf
    while True:
        try:
            request = search.next_request()
        except StopIteration:
            return best
        value = measure(request.values)
        best = max(best, value)
        row = {"status": "complete", "rung": 1, "target_values": [value]}
        search.finish(f"{request.arm}-{request.seed}", row)


def compare(found: dict[str, list[float]]) -> dict[str, Any]:
    """Means, and the paired difference of TPE to random search over the sampler's seeds."""
    gain = np.array(found["tpe"]) - np.array(found["random"])
    interval = stats.ttest_1samp(gain, 0.0).confidence_interval(0.95)
    return {
        "best": {design: float(np.mean(values)) for design, values in found.items()},
        "regret": {design: float(-np.mean(values)) for design, values in found.items()},
        "gain": float(gain.mean()),
        "gain_interval": [float(interval.low), float(interval.high)],
        "t_test_p": float(stats.ttest_rel(found["tpe"], found["random"]).pvalue),
        "wilcoxon_p": float(stats.wilcoxon(found["tpe"], found["random"]).pvalue),
        "seeds_won": int((gain > 0).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=int, default=60, help="arms a search (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the sampler (default %(default)s)")
    options = parser.parse_args()
    if options.arms < 1 or options.seeds < 2:
        parser.error("--arms must be at least 1 and --seeds at least 2")
    surfaces = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in SURFACES.items():
            found = {
                design: [
                    find_best(make_job(design, seed, options.arms), measure, Path(folder))
                    for seed in range(options.seeds)
                ]
                for design in ("tpe", "random")
            }
            surfaces[name] = compare(found)
            regret = surfaces[name]["regret"]
            print(f"{name}: regret {regret['tpe']:.4f} with tpe, {regret['random']:.4f} with random")
    print(json.dumps({"arms": options.arms, "seeds": options.seeds, "surfaces": surfaces}))


if __name__ == "__main__":
    main()
