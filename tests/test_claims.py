"""False claims, of a smaller version of benchmarks/claims.py: in worlds where no arm is better, few sweeps claim it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "claims.py"


@pytest.fixture(scope="module")
def claims():
    found = importlib.util.spec_from_file_location("claims", PATH)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("world", ["pair", "draws", "folds", "common", "base"])
def test_at_most_one_sweep_in_twenty_claims_something(claims, world):
    num = 100 if world == "base" else 300
    found = claims.count_claims(world, num)
    assert found["claims"] <= stats.binom.ppf(0.99, num, 0.05)


def test_seeds_as_the_unit_would_claim_falsely_where_folds_are_shared(claims):
    """What the world of folds guards against: the test of seeds alone rejects in far more than 5 %."""
    rows = [claims.run_folds(np.random.default_rng(case))[0] for case in range(100)]
    assert np.mean([row.p <= 0.05 for row in rows]) > 0.25
    assert np.mean([row.better is not None for row in rows]) <= 0.1


def test_a_difference_that_is_there_is_claimed_in_most_sweeps(claims):
    """The other side: each seed's own draws cost no more power than the t-test of the seeds."""
    named = []
    for case in range(100):
        arms = claims.make_arms(np.random.default_rng(case), 2)
        arms["arm0"] = {s: {d: v + 2.0 for d, v in draws.items()} for s, draws in arms["arm0"].items()}
        named.append(claims.compare(arms, [("arm0", "arm1")])[0].better)
    assert named.count("b") == 0
    assert named.count("a") >= 80


def test_a_search_of_noise_finds_no_better_arm(claims):
    """Ten searches with their confirmations: at 5 % the chance of more than two claims is one in a hundred."""
    found = [claims.run_search(np.random.default_rng(case), num_arms=16) for case in range(10)]
    assert all(3 <= len(rows) <= 5 for rows in found)
    assert all(rows[0].num_seeds == claims.SEEDS for rows in found)
    assert sum(any(row.better is not None for row in rows) for rows in found) <= 2


def test_planted_effects_are_named_and_few_sweeps_name_something_else(claims):
    found = claims.count_planted(60)
    assert found["all_named"] == found["sweeps"] == 60
    assert found["something_else"] <= stats.binom.ppf(0.99, 60, 0.05)
