"""Paired comparisons against SciPy, statsmodels, pingouin and formulas of their own, on random cases."""

import math
import warnings

import numpy as np
import pingouin
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from raylab.base.mistakes import JobError
from raylab.statistics.comparisons import (
    RESAMPLES,
    SAMPLED_FLIPS,
    adjust_holm,
    compare_arms,
    compute_bounds,
    compute_detectable,
    compute_power,
    compute_superiority,
    count_least_seeds,
    estimate_seeds,
    find_smallest_p,
    flip_signs,
    pair_draws,
)
from raylab.statistics.variances import fit_crossed, fit_nested, vary_together

CASES = range(100)


def make_rows(rng, num_seeds=9, num_draws=5, by_seed=0.7, by_draw=0.0, noise=1.0, mean=0.0):
    """Seed -> draw -> difference, with a term of seeds, one of draws that all seeds share, and noise."""
    values = mean + rng.normal(0, by_seed, (num_seeds, 1)) + rng.normal(0, by_draw, num_draws)
    values = values + rng.normal(0, noise, (num_seeds, num_draws))
    return {seed: dict(enumerate(row)) for seed, row in enumerate(values)}


def compare(differences, **options):
    """One comparison of an arm with these differences to one of zeros."""
    a = {seed: {0: value} for seed, value in enumerate(differences)}
    [row] = compare_arms({"a": a, "b": {seed: {0: 0.0} for seed in a}}, [("a", "b")], **options)
    return row


@pytest.mark.parametrize("case", CASES)
def test_the_sign_flip_test_is_scipys(case):
    rng = np.random.default_rng(case)
    x, y = rng.normal(0.3, 1, (2, rng.integers(2, 11)))
    if case % 3 == 0:  # ties, and differences of 0
        x, y = np.round(x), np.round(y)
    expected = stats.permutation_test(
        (x, y), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    ).pvalue  # fmt: skip
    assert flip_signs(x - y) == (pytest.approx(min(1.0, expected)), True)


def test_many_seeds_are_flipped_at_random_and_the_same_way_again():
    rng = np.random.default_rng(0)
    for mean in (0.0, 0.4):
        differences = rng.normal(mean, 1, 30)
        p, exact = flip_signs(differences)
        assert not exact
        assert flip_signs(differences)[0] == p
        # For so many seeds the t-test is a good approximation of it.
        assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert flip_signs(np.ones(25))[0] == pytest.approx(1 / (1 + SAMPLED_FLIPS))


@pytest.mark.parametrize("num", range(1, 21))
def test_the_smallest_p_is_that_of_equal_signs(num):
    assert flip_signs(np.arange(1.0, num + 1))[0] == pytest.approx(find_smallest_p(num))


def test_the_seeds_that_a_design_needs():
    """3 seeds never give a p under 0.25; nine comparisons need 9 seeds, all pairs of ten arms 11, one pair 6."""
    assert find_smallest_p(3) == 0.25
    assert [count_least_seeds(num) for num in (1, 9, 45)] == [6, 9, 11]
    for num in range(1, 200):
        least = count_least_seeds(num)
        assert find_smallest_p(least) <= 0.05 / num < find_smallest_p(least - 1)


@pytest.mark.parametrize("case", CASES)
def test_the_t_interval_is_that_of_scipy_and_pingouin(case):
    rng = np.random.default_rng(case)
    x, y = rng.normal(0.2, 1, (2, rng.integers(3, 20)))
    low, high, name = compute_bounds(x - y)
    test = stats.ttest_rel(x, y)
    assert name == "t"
    assert (low, high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    pinged = pingouin.ttest(x, y, paired=True)
    interval = next(pinged[name].iloc[0] for name in ("CI95", "CI95%") if name in pinged)
    assert list(interval) == pytest.approx([low, high], abs=0.006)


# Shapes of differences: symmetric, skewed, of heavy tails, with ties.
SHAPES = [
    lambda rng, num: rng.normal(0.2, 1, num),
    lambda rng, num: rng.exponential(1, num) - 0.5,
    lambda rng, num: rng.standard_t(3, num),
    lambda rng, num: np.round(rng.gamma(2, 1, num), 1) - 1,
]


def compute_bca(differences, means):
    """Where Efron's interval (1987) ends among the means of resamples, as shares of them below; ties count half."""
    mean, num = differences.mean(), len(differences)
    bias = stats.norm.ppf(((means < mean).mean() + (means <= mean).mean()) / 2)
    left_out = (differences.sum() - differences) / (num - 1)
    apart = left_out.mean() - left_out
    bend = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    ends = [bias + (bias + z) / (1 - bend * (bias + z)) for z in stats.norm.ppf([0.025, 0.975])]
    return stats.norm.cdf(ends)


@pytest.mark.parametrize("case", CASES)
def test_the_bca_interval_is_that_of_the_formula(case):
    """On the same resamples to the last digits; among others, which are of chance too, at the same shares."""
    rng = np.random.default_rng(case)
    differences = SHAPES[case % 4](rng, int(rng.integers(20, 60)))
    num = len(differences)
    low, high, name = compute_bounds(differences)
    assert name == "BCa"
    same = differences[np.random.default_rng(0).integers(0, num, (RESAMPLES, num))].mean(1)
    assert [low, high] == pytest.approx(list(np.quantile(same, compute_bca(differences, same))), rel=1e-9)
    others = differences[rng.integers(0, num, (40_000, num))].mean(1)
    reached = [((others < end).mean() + (others <= end).mean()) / 2 for end in (low, high)]
    assert reached == pytest.approx(list(compute_bca(differences, others)), abs=0.012)
    assert compute_bounds(differences)[:2] == (low, high)


def test_an_interval_of_equal_differences_is_a_point():
    for num in (5, 25):
        assert compute_bounds(np.full(num, 0.5)) == (0.5, 0.5, "t")
    assert np.isnan(compute_bounds(np.array([0.5]))[:2]).all()


@pytest.mark.parametrize("case", CASES)
def test_holm_is_that_of_statsmodels_and_pingouin(case):
    rng = np.random.default_rng(case)
    p = rng.uniform(0, 0.2, rng.integers(1, 12))
    p[rng.integers(len(p))] = p[0]
    assert adjust_holm(list(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert adjust_holm(list(p)) == pytest.approx(list(pingouin.multicomp(p, method="holm")[1]))


def test_holm_counts_comparisons_that_have_no_p():
    assert adjust_holm([0.01, math.nan, 0.02]) == pytest.approx([0.03, math.nan, 0.04], nan_ok=True)


def test_superiority_is_the_share_of_seeds_won_with_ties_halved():
    assert compute_superiority(np.array([1.0, 2.0, 0.0, -1.0])) == 0.625
    better = {0: {0: 0.1}, 1: {0: 0.2}, 2: {0: 0.9}}
    other = {0: {0: 0.2}, 1: {0: 0.3}, 2: {0: 0.8}}
    [row] = compare_arms({"a": better, "b": other}, [("a", "b")], mode="min")
    assert row.superiority == pytest.approx(2 / 3)


@pytest.mark.parametrize("case", CASES)
def test_power_and_seeds_are_those_of_statsmodels(case):
    rng = np.random.default_rng(case)
    effect, num, family = rng.uniform(0.2, 2.5), int(rng.integers(5, 40)), int(rng.integers(1, 10))
    alpha = 0.05 / family
    expected = TTestPower().power(effect, num, alpha)
    # statsmodels' is NaN where it nears 1.
    assert compute_power(effect, num, alpha) == pytest.approx(1.0 if math.isnan(expected) else expected, abs=1e-5)
    exact = TTestPower().solve_power(effect, alpha=alpha, power=0.8)
    assert estimate_seeds(effect * 3, 3.0, family) == max(math.ceil(exact - 1e-6), count_least_seeds(family))
    enough = count_least_seeds(family) + num
    reached = compute_detectable(3.0, enough, family)
    assert TTestPower().power(reached / 3.0, enough, alpha) == pytest.approx(0.8, abs=1e-4)


def test_seeds_that_nothing_would_decide():
    assert estimate_seeds(1e-6, 1.0) is None
    assert estimate_seeds(0.0, 0.0) is None
    assert estimate_seeds(0.1, 0.0) == 6
    assert math.isnan(compute_detectable(1.0, 5))


@pytest.mark.parametrize("case", CASES)
def test_the_mixed_model_is_that_of_statsmodels(case):
    """REML of a seed term and draws within it, also where seeds have different numbers of draws."""
    rng = np.random.default_rng(case)
    sizes = rng.integers(1, 6, rng.integers(6, 15)) if case % 2 else np.full(rng.integers(6, 15), 5)
    sizes[:2] = 3
    groups = [rng.normal(0.3 + rng.normal(0, 1.0), 0.7, size) for size in sizes]
    found = fit_nested(groups)
    y, seed = np.concatenate(groups), np.repeat(np.arange(len(groups)), sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = MixedLM(y, np.ones((len(y), 1)), seed).fit(reml=True)
    assert found.mean == pytest.approx(fitted.fe_params[0], abs=1e-3)
    assert found.sd_seed == pytest.approx(math.sqrt(fitted.cov_re[0, 0]), rel=1e-2, abs=1e-3)
    assert found.sd_draw == pytest.approx(math.sqrt(fitted.scale), rel=1e-2)
    error = (found.high - found.low) / 2 / stats.t.ppf(0.975, len(groups) - 1)
    assert error == pytest.approx(fitted.bse_fe[0], rel=3e-2)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean) / error, len(groups) - 1))


@pytest.mark.parametrize("case", range(20))
def test_in_a_balanced_design_the_mixed_model_is_the_t_test_of_seeds(case):
    rows = make_rows(np.random.default_rng(case), by_seed=2.0)
    found = fit_nested([list(values.values()) for values in rows.values()])
    means = np.array([np.mean(list(values.values())) for values in rows.values()])
    assert (found.mean, found.low, found.high) == pytest.approx((means.mean(), *compute_bounds(means)[:2]), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_crossed_seeds_and_draws_are_those_of_an_analysis_of_variance(case):
    import pandas as pd

    rng = np.random.default_rng(case)
    by_seed, by_draw = rng.uniform(0, 2, 2)
    rows = make_rows(rng, int(rng.integers(3, 10)), int(rng.integers(2, 6)), by_seed, by_draw)
    frame = pd.DataFrame([(s, d, v) for s, draws in rows.items() for d, v in draws.items()], columns=["s", "d", "y"])
    table = anova_lm(ols("y ~ C(s) + C(d)", frame).fit())
    squares, df = table["sum_sq"] / table["df"], table["df"]
    seeds, draws, rest = (squares[name] for name in ("C(s)", "C(d)", "Residual"))
    total = seeds + draws - rest
    freedom = total**2 / sum(squares[name] ** 2 / df[name] for name in squares.index)
    larger = max((seeds, df["C(s)"]), (draws, df["C(d)"]))
    if total < larger[0]:
        total = larger[0]
        freedom = total**2 / sum(squares[name] ** 2 / df[name] for name in squares.index)
    freedom = min(freedom, larger[1])
    half = stats.t.ppf(0.975, freedom) * math.sqrt(total / len(frame))
    found = fit_crossed(rows)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (frame.y.mean(), frame.y.mean() - half, frame.y.mean() + half)
    )
    assert found.p == pytest.approx(2 * stats.t.sf(abs(frame.y.mean()) / math.sqrt(total / len(frame)), freedom))
    assert vary_together(rows) == (table.loc["C(d)", "PR(>F)"] < 0.001)


def test_only_shared_seeds_and_draws_count_and_draws_are_averaged():
    a = {0: {0: 0.5, 1: 0.7}, 1: {0: 0.6, 1: 0.5}, 2: {0: 0.9}, 3: {5: 0.1}}
    b = {0: {0: 0.4, 1: 0.4}, 1: {0: 0.4, 1: 0.4, 2: 9.0}, 7: {0: 0.1}, 3: {6: 0.1}}
    assert pair_draws(a, b).keys() == {0, 1}
    [row] = compare_arms({"a": a, "b": b}, [("a", "b")])
    test = stats.ttest_1samp([0.2, 0.15], 0.0)
    assert (row.num_seeds, row.num_draws, row.difference) == (2, 2, pytest.approx(0.175))
    assert (row.low, row.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    with pytest.raises(JobError, match="a and b share no seed"):
        compare_arms({"a": {0: {0: 1.0}}, "b": {1: {0: 1.0}}}, [("a", "b")])


def test_a_claim_needs_enough_seeds_and_names_the_better_arm():
    assert compare([0.1, 0.11, 0.12, 0.1, 0.11]).better is None
    assert compare([0.1, 0.11, 0.12, 0.1, 0.11, 0.12]).better == "a"
    assert compare([-0.1, -0.11, -0.12, -0.1, -0.11, -0.12]).better == "b"
    assert compare([-0.1, -0.11, -0.12, -0.1, -0.11, -0.12], mode="min").better == "a"
    alone = compare([0.1, 0.11, 0.12, 0.1, 0.11, 0.12], num_comparisons=2)
    assert alone.better is None
    assert alone.p_holm == pytest.approx(2 * alone.p)
    one = compare([0.3])
    assert (one.better, one.num_seeds) == (None, 1)
    assert math.isnan(one.p)


def test_an_arm_that_suits_the_shared_draws_has_shown_nothing_for_others():
    """Draws that are the same for all seeds: folds on two of which an arm is much better, on each seed."""
    a = {seed: {0: 2.0 + 0.01 * seed, 1: 1.0, 2: -0.4, 3: -0.6} for seed in range(9)}
    b = {seed: dict.fromkeys(range(4), 0.0) for seed in a}
    for draws in ("shared", "nested"):
        [row] = compare_arms({"a": a, "b": b}, [("a", "b")], draws=draws)
        assert row.p < 0.01
        assert row.p_draws > 0.05
        assert row.seeds_needed is None
        assert row.better is None
        assert row.low < 0 < row.high
    # The same draws, each seed's own: in another order on each.
    own = {seed: {(draw + seed) % 4: value for draw, value in values.items()} for seed, values in a.items()}
    [row] = compare_arms({"a": own, "b": b}, [("a", "b")])
    assert (row.p_draws, row.better) == (None, "a")
