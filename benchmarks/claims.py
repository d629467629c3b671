"""False claims: sweeps in which no arm is better, through raylab's own search and comparisons; nothing is trained.

Run `python benchmarks/claims.py`: some minutes on one core, most of them TPE's. The last line is one JSON object. In
each world a sweep claims something where any comparison of its family names a better arm; the bar is 0.05 of them.

pair: two arms. draws: they differ by seed (SD 0.7) and by draw (SD 1.5), each seed with draws of its own, as
in raylab's jobs. folds: the same, but the draws are the same for every seed, as folds are, and said to be: the arm that
suits these folds wins on every seed. common: the same, and not said. base: nine arms against the base arm. search: TPE
asks for 64 arms of pure noise, the best five are confirmed with the base arm on nine fresh seeds.

Key `planted`, the other side: factorials of four settings with three main effects and an interaction in them, on twelve
seeds. Sweeps that name all four, and sweeps that name something else: that too is a false claim, with the same bar.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from raylab.base.identity import name_arm
from raylab.job.jobs import check_job
from raylab.job.settings import list_settings, with_settings
from raylab.job.specs import Job
from raylab.search.search import Search
from raylab.statistics.comparisons import Comparison, compare_arms
from raylab.statistics.effects import compute_effects, list_contrasts

SEEDS, DRAWS = 9, 5
SEED_SD, DRAW_SD = 0.7, 1.5
TABLE = {"path": "not_read.parquet", "text": "text"}
JOB = {
    "name": "noise",
    "corpus": {"documents": TABLE, "tasks": {"task": {**TABLE, "label": "label"}}, "max_length": 256},
    "encoder": {"config": {}, "tokenizer": {}},
    "pretrain": {"objective": "mlm", "num_tokens": 10_000_000, "batch_tokens": 16_384},
}
SPACE = {
    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "pretrain.mlm.mask_fraction": {"low": 0.05, "high": 0.5},
}
Arms = dict[str, dict[int, dict[int, float]]]
# Settings that are on -> what that adds. With b, a does 0.4 more: over all arms, b adds 0.2.
PLANTED = {"a": 0.3, "c": -0.3, "ab": 0.4}
THERE = {"a", "b", "c", "ab"}
PLANTED_SEEDS, PLANTED_DRAWS = 12, 3


def make_arms(
    rng: np.random.Generator, num: int, *, shared: bool = False, by_seed: float = SEED_SD, by_draw: float = DRAW_SD
) -> Arms:
    """Arms of equal mean: what a seed does to all, what it does to each arm, what a draw does to each, and noise."""
    values = rng.normal(0, 1, (1, SEEDS, 1)) + rng.normal(0, by_seed, (num, SEEDS, 1))
    values = (
        values + rng.normal(0, by_draw, (num, 1 if shared else SEEDS, DRAWS)) + rng.normal(0, 0.3, (num, SEEDS, DRAWS))
    )
    return {f"arm{arm}": {seed: dict(enumerate(map(float, draws))) for seed, draws in enumerate(seeds)}
            for arm, seeds in enumerate(values)}  # fmt: skip


def compare(
    arms: Arms, pairs: list[tuple[str, str]], draws: Literal["nested", "shared"] = "nested"
) -> list[Comparison]:
    return compare_arms(arms, pairs, draws=draws)


def run_pair(rng: np.random.Generator) -> list[Comparison]:
    return compare(make_arms(rng, 2, by_draw=0.0), [("arm0", "arm1")])


def run_draws(rng: np.random.Generator) -> list[Comparison]:
    return compare(make_arms(rng, 2), [("arm0", "arm1")])


def run_folds(rng: np.random.Generator) -> list[Comparison]:
    return compare(make_arms(rng, 2, shared=True), [("arm0", "arm1")], "shared")


def run_common(rng: np.random.Generator) -> list[Comparison]:
    return compare(make_arms(rng, 2, shared=True), [("arm0", "arm1")])


def run_base(rng: np.random.Generator) -> list[Comparison]:
    arms = make_arms(rng, 10)
    return compare(arms, [(arm, "arm0") for arm in arms if arm != "arm0"])


def run_search(rng: np.random.Generator, num_arms: int = 64, folder: Path | None = None) -> list[Comparison]:
    """A whole search on noise: every value of an arm on a seed is that of chance."""
    search = {
        "space": SPACE, "design": "tpe", "num_arms": num_arms, "sampler_seed": int(rng.integers(2**31)), "seeds": [0],
        "targets": [{"task": "task"}], "confirm": {"top": 5, "seeds": list(range(1, SEEDS + 1))},
    }  # fmt: skip
    job = check_job({**JOB, "search": search})
    confirmed: Arms = {}
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return run_search_in(job, rng, confirmed, Path(made))
    return run_search_in(job, rng, confirmed, folder)


def run_search_in(job: Job, rng: np.random.Generator, confirmed: Arms, results: Path) -> list[Comparison]:
    def name_point(values: dict[str, Any]) -> str:
        settings = list_settings(with_settings(job, values))
        return name_arm(settings, data_digest="", encoder_digest="", searched=job.search.space)

    searched, base = Search(job, results, name_point), name_point({})
    while True:
        try:
            request = searched.next_request()
        except StopIteration:
            break
        assert request is not None
        draws = rng.normal(0, SEED_SD) + rng.normal(0, DRAW_SD, DRAWS)
        if request.phase == "confirm":
            confirmed.setdefault(request.arm, {})[request.seed] = dict(enumerate(map(float, draws)))
        row = {"status": "complete", "rung": 1, "target_values": [float(draws.mean())]}
        searched.finish(f"{request.arm}-{request.seed}", row)
    assert base in confirmed
    return compare(confirmed, [(arm, base) for arm in confirmed if arm != base])


WORLDS: dict[str, Callable[[np.random.Generator], list[Comparison]]] = {
    "pair": run_pair,
    "draws": run_draws,
    "folds": run_folds,
    "common": run_common,
    "base": run_base,
    "search": run_search,
}


def count_claims(world: str, num: int, seed: int = 0) -> dict[str, Any]:
    """How many of `num` sweeps of a world claim something; with the upper end of the rate's 95 % interval."""
    claims = 0
    for index in range(num):
        rng = np.random.default_rng([seed, list(WORLDS).index(world), index])
        claims += any(row.better is not None for row in WORLDS[world](rng))
    interval = stats.binomtest(claims, num).proportion_ci(0.95)
    return {"sweeps": num, "claims": claims, "rate": claims / num, "rate_below": float(interval.high)}


def run_planted(rng: np.random.Generator) -> set[str]:
    """The effects that are shown in a factorial of settings a to d, by the settings' names: 'a', 'ab'."""
    levels = {"".join(map(str, point)): dict(zip("abcd", point, strict=True))
              for point in itertools.product((0, 1), repeat=4)}  # fmt: skip
    seeds, scores = rng.normal(0, 0.2, (PLANTED_SEEDS, 1)), {}
    for arm, own in levels.items():
        mean = sum(size * all(own[name] for name in names) for names, size in PLANTED.items())
        noise = rng.normal(0, 0.05, (PLANTED_SEEDS, 1)) + rng.normal(0, 0.1, (PLANTED_SEEDS, PLANTED_DRAWS))
        scores[arm] = {seed: dict(enumerate(map(float, draws))) for seed, draws in enumerate(mean + seeds + noise)}
    effects = compute_effects(scores, list_contrasts(levels, {name: [0, 1] for name in "abcd"}))
    shown = [effect.contrast for effect in effects if effect.comparison.better is not None]
    return {c.change.setting + (c.by.setting if c.by else "") for c in shown}


def count_planted(num: int, seed: int = 0) -> dict[str, Any]:
    """Of `num` sweeps with planted effects, how many name them all, and how many name something else."""
    named = [run_planted(np.random.default_rng([seed, len(WORLDS), index])) for index in range(num)]
    others = sum(not shown <= THERE for shown in named)
    interval = stats.binomtest(others, num).proportion_ci(0.95)
    return {"sweeps": num, "all_named": sum(shown >= THERE for shown in named), "something_else": others,
            "rate": others / num, "rate_below": float(interval.high)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=2000, help="sweeps a world (default %(default)s)")
    parser.add_argument("--planted", type=int, default=1000, help="with planted effects, or 0 (default %(default)s)")
    parser.add_argument("--searches", type=int, default=2000, help="of the world 'search' (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    options = parser.parse_args()
    if options.sweeps < 1 or options.searches < 1 or options.planted < 0:
        parser.error("--sweeps and --searches must be at least 1, --planted at least 0")
    found = {}
    for world in options.worlds:
        found[world] = count_claims(world, options.searches if world == "search" else options.sweeps, options.seed)
        print(f"{world}: {found[world]['claims']} of {found[world]['sweeps']} sweeps claim something", flush=True)
    printed: dict[str, Any] = {"seeds": SEEDS, "draws": DRAWS, "bar": 0.05, "worlds": found}
    if options.planted:
        printed["planted"] = count_planted(options.planted, options.seed)
        all_named, others = (printed["planted"][key] for key in ("all_named", "something_else"))
        told = f"planted: {all_named} of {options.planted} sweeps name all effects that are there"
        print(f"{told}, {others} something else", flush=True)
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
