import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylab.base.noise import derive_seed
from raylab.training.batches import Units
from raylab.training.steps import AHEAD, BEHIND, BLOCK, Place, choose_units, deal, iterate_steps, list_seen


def take(units, num, place=Place(0, 0), batch_tokens=1024):  # noqa: B008
    return list(itertools.islice(iterate_steps(units, batch_tokens, 5, place), num))


def same_step(first, second):
    alike = all(np.array_equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    return alike and first.after == second.after


def make_units(num, cost):
    """Units of any costs, of which nothing can be built."""
    return Units(num, 1, 100, np.arange(num), cost, lambda epochs, units: None, None)


@st.composite
def many_units(draw):
    """Units whose costs follow a seed, one kind of size after another, and the tokens of a step."""
    num, seed = draw(st.sampled_from([1, 2, 7, 40, 300])), draw(st.integers(0, 99))
    smallest, largest = sorted((draw(st.integers(2, 60)), draw(st.integers(2, 300))))
    sizes = np.random.default_rng(seed).integers(smallest, largest + 1, (5, num))
    return make_units(num, lambda epoch, units: sizes[epoch % 5, units]), draw(st.sampled_from([50, 300, 2000]))


@settings(deadline=None, max_examples=40)
@given(many_units())
def test_steps_of_any_units(given):
    """Never above the tokens but for a single unit, each unit once an epoch, none postponed without bound, from any
    place on the same, and the place small."""
    units, batch_tokens = given
    steps = take(units, 60, batch_tokens=batch_tokens)
    when = {}
    for index, step in enumerate(steps):
        assert step.num_tokens == step.costs.sum()
        assert step.num_tokens <= batch_tokens or len(step.units) == 1
        for epoch, unit, cost in zip(step.epochs.tolist(), step.units.tolist(), step.costs.tolist(), strict=True):
            assert (epoch, unit) not in when
            when[epoch, unit] = index
            assert cost == units.cost(epoch, unit)
        # In no step are more than BEHIND + 1 units taken that lie behind one that waits.
        assert len(step.after.ahead) <= (AHEAD + BEHIND) * (BEHIND + 1)
    last = steps[-1].after
    seen = {}
    for epoch in range(last.epoch + 1 + AHEAD + BEHIND):
        order = np.random.default_rng(derive_seed(5, "order", epoch)).permutation(units.num)
        for position, unit in enumerate(order.tolist()):
            place = epoch * units.num + position
            if (epoch, unit) in when:
                seen[place] = when[epoch, unit]
            else:
                # All that lies before the place has been taken.
                assert place >= last.epoch * units.num + last.position
    begun = len(steps)
    for place in sorted(seen, reverse=True):
        # The first step that took this unit or one behind it in the order.
        begun = min(begun, seen[place])
        assert seen[place] - begun <= AHEAD + BEHIND
    for index in (0, 13, 50):
        again = take(units, 20, steps[index].after, batch_tokens=batch_tokens)
        assert all(same_step(ours, theirs) for ours, theirs in zip(again, steps[index + 1 :], strict=False))
        rows = [unit for epoch, unit in when if when[epoch, unit] <= index]
        assert set(list_seen(units.num, 5, steps[index].after)) == set(rows)


def test_steps_are_full():
    """As they come, units would leave half of one free: 1 in 100."""
    sizes = np.random.default_rng(0).integers(20, 300, 3000)
    for batch_tokens in (4096, 16_384):
        fills = [
            step.num_tokens / batch_tokens
            for step in take(make_units(3000, lambda epoch, units: sizes[units]), 200, batch_tokens=batch_tokens)
        ]
        assert np.mean(fills) > 0.9995
        assert min(fills) > 0.998
    assert len(sizes) > BLOCK


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 200))
def test_a_step_is_filled_as_well_as_one_or_two_more_can(sizes, batch_tokens):
    costs = np.array(sizes)
    chosen = choose_units(costs, batch_tokens)
    count = int((np.cumsum(costs) <= batch_tokens).sum())
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen[0] == 0
    if not count:
        assert chosen.tolist() == [0]
        return
    best = 0
    prefix = int(costs[:count].sum())
    for left in [None, *range(max(count - BEHIND, 1), count)]:
        base = prefix - (costs[left] if left is not None else 0)
        extra = costs[count : count + AHEAD].tolist()
        sums = [0, *extra, *(a + b for a, b in itertools.combinations(extra, 2))]
        best = max(best, *(base + more for more in sums if base + more <= batch_tokens))
    assert costs[chosen].sum() == best
    assert set(range(count - BEHIND)) <= set(chosen.tolist())
    assert max(chosen) < count + AHEAD


def test_a_unit_larger_than_the_step_is_one_of_its_own():
    steps = take(make_units(7, lambda epoch, units: 2 + units), 30, batch_tokens=1)
    assert all(len(step.units) == 1 for step in steps)


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), max_size=80), st.integers(1, 6))
def test_shares_are_even(sizes, num):
    costs = np.array(sizes, dtype=np.int64)
    shares = deal(costs, num)
    assert len(shares) == num
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(costs)))
    assert all((np.diff(share) > 0).all() for share in shares)
    loads = [int(costs[share].sum()) for share in shares]
    # No worse than the largest first, each to whichever share has least.
    plain = [[0] for _ in range(num)]
    for cost in sorted(sizes, reverse=True):
        min(plain, key=sum).append(cost)
    fullest = max(plain, key=sum)
    assert max(loads) <= sum(fullest)
    # In that, the fullest was the least full before its last unit, which was no larger than the others in it.
    assert sum(fullest) <= (costs.sum() - fullest[-1]) / num + fullest[-1]
    most, least = shares[int(np.argmax(loads))], shares[int(np.argmin(loads))]
    gap = max(loads) - min(loads)
    for one, other in itertools.product(costs[most].tolist(), costs[least].tolist()):
        assert abs(gap - 2 * (one - other)) >= gap


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("units", [31, 32, 33])
def test_an_odd_number_of_like_units_is_shared_evenly(units, num):
    """Without swaps a share may have half a unit more than the mean."""
    for seed in range(20):
        costs = np.random.default_rng(seed).integers(1000, 2000, units * num // 2)
        loads = [int(costs[share].sum()) for share in deal(costs, num)]
        assert max(loads) - min(loads) <= 30
