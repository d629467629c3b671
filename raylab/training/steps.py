"""Steps: the order of the data, and units that fill a step up to a number of tokens. All of it NumPy, no state.

Every draw depends on the seed and the epoch alone, so a place in the data is a few numbers, and a step is the same
however many workers share it.
"""

import heapq
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from raylab.base.noise import derive_seed
from raylab.training.batches import Ints, Units

# A step is filled up with one or two of the units ahead, and may leave one of its last behind for them.
AHEAD, BEHIND = 32, 16
# Each two of the units ahead; the place after the last stands for none.
PAIRS = np.triu_indices(AHEAD + 1, 1)
# Units whose costs are found at once.
BLOCK = 256


class Place(NamedTuple):
    """Where the data stand: the next unit is the `position`-th of the epoch's order.

    `ahead` are the units after it that are taken already, each by its distance from it, on into the next epoch's order.
    """

    epoch: int
    position: int
    ahead: tuple[int, ...] = ()


class Step(NamedTuple):
    """The units of one optimiser step, the epoch that each is drawn in and its tokens, all int64 [U]; tokens in all."""

    units: Ints
    epochs: Ints
    costs: Ints
    num_tokens: int
    after: Place


def order_units(num: int, seed: int, epoch: int) -> Ints:
    """The order of an epoch's units: a permutation."""
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num)


def list_seen(num: int, seed: int, place: Place) -> Ints:
    """Which of `num` units were taken before `place`, each once."""
    if place.epoch:
        return np.arange(num)
    orders = np.concatenate([order_units(num, seed, epoch) for epoch in range(2 + max((0, *place.ahead)) // num)])
    return np.unique(orders[[*range(place.position), *(place.position + far for far in place.ahead)]])


def choose_units(costs: Ints, batch_tokens: int) -> Ints:
    """Places of the units that make up a step, from the costs of the next units in order: as they come while they fit.

    Where room is left, one or two of the AHEAD units after those fill it best, and one of the last BEHIND may stay
    behind for them. The first unit is always taken, so that none waits for more than AHEAD + BEHIND steps.
    """
    running = np.cumsum(costs)
    count = int(np.searchsorted(running, batch_tokens, side="right"))
    taken = np.arange(max(count, 1))
    if not count or running[count - 1] == batch_tokens:
        return taken
    ahead = costs[count : count + AHEAD]
    # Where fewer stand there, some that fit nowhere.
    extra = np.concatenate([ahead, np.full(AHEAD - len(ahead), batch_tokens + 1), [0]])
    sums = extra[PAIRS[0]] + extra[PAIRS[1]]
    order = np.argsort(sums, kind="stable")
    ordered = sums[order]
    behind = np.append(0, costs[max(count - BEHIND, 1) : count])
    room = batch_tokens - running[count - 1] + behind
    found = np.searchsorted(ordered, room, side="right") - 1
    gains = np.where(found >= 0, ordered[found], 0) - behind
    best = int(gains.argmax())
    if gains[best] <= 0:
        return taken
    # Of equal pairs the first, so that few units are passed over.
    pair = order[np.searchsorted(ordered, ordered[found[best]])]
    if best:
        taken = np.delete(taken, count - len(behind) + best)
    more = np.array([places[pair] for places in PAIRS])
    return np.concatenate([taken, count + more[more < AHEAD]])


def iterate_steps(units: Units, batch_tokens: int, seed: int, place: Place) -> Iterator[Step]:
    """Steps without end from `place` on, each filled up to `batch_tokens` and never beyond.

    Every unit is taken once an epoch, nearly in the epoch's order, a permutation from (seed, epoch): see
    `choose_units`. A step may run over the end of an epoch. A unit larger than `batch_tokens` is a step of its own.
    """
    order = lru_cache(2)(lambda epoch: order_units(units.num, seed, epoch))

    def read(start: int, num: int) -> Ints:
        """Units, epochs and costs, [3, num], from a place on that is counted over all epochs; of one epoch alone."""
        epoch, position = divmod(start, units.num)
        here = order(epoch)[position : position + num]
        return np.stack([here, np.full(len(here), epoch), units.cost(epoch, here)])

    start = place.epoch * units.num + place.position
    window, taken = read(start, BLOCK), np.array(place.ahead, dtype=np.int64)
    while True:
        free = np.ones(window.shape[1], dtype=bool)
        free[taken[taken < len(free)]] = False
        left = np.flatnonzero(free)
        # How far the window was read changes nothing: it must hold what fills a step, and AHEAD units more.
        if taken.max(initial=0) >= len(free) or window[2, left[:-AHEAD]].sum() <= batch_tokens:
            window = np.concatenate([window, read(start + len(free), max(BLOCK, len(free)))], 1)
            continue
        chosen = np.sort(left[choose_units(window[2, left], batch_tokens)])
        free[chosen] = False
        picked, first = window[:, chosen], int(free.argmax())
        window, taken, start = window[:, first:], np.flatnonzero(~free[first:]), start + first
        place = Place(*divmod(start, units.num), tuple(taken.tolist()))
        yield Step(picked[0], picked[1], picked[2], int(picked[2].sum()), place)


def deal(costs: Ints, num: int) -> list[Ints]:
    """Units of costs[U] dealt to `num` shares of like cost: the places of each share's units, in order.

    The largest first, each to the share that has least (LPT; Graham 1969, doi 10.1137/0117039). Where units are of
    like cost and their number is odd, that leaves half of one too many: the shares with most and least then swap units.
    """
    if num == 1:
        return [np.arange(len(costs))]
    shares = [(0, share) for share in range(num)]
    owners = np.empty(len(costs), dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    for unit, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        held, share = shares[0]
        owners[unit] = share
        heapq.heapreplace(shares, (held + cost, share))
    while (swap := _find_swap(costs, owners, num)) is not None:
        owners[swap] = owners[swap[::-1]]
    return [np.flatnonzero(owners == share) for share in range(num)]


def _find_swap(costs: Ints, owners: Ints, num: int) -> Ints | None:
    """The two units, of the shares with most and least, whose swap leaves these two most alike; None if none helps."""
    held = np.bincount(owners, costs, num).astype(np.int64)
    most, least = int(held.argmax()), int(held.argmin())
    gap = held[most] - held[least]
    given, taken = np.flatnonzero(owners == most), np.flatnonzero(owners == least)
    if not len(taken):
        return None
    taken = taken[np.argsort(costs[taken], kind="stable")]
    # To each unit of the one share those of the other that are next to half the gap smaller.
    near = np.searchsorted(costs[taken], costs[given] - gap / 2)
    near = np.stack([near - 1, near]).clip(0, len(taken) - 1)
    moved = costs[given] - costs[taken[near]]
    gains = np.minimum(moved, gap - moved)
    side, place = np.unravel_index(gains.argmax(), gains.shape)
    return np.array([given[place], taken[near[side, place]]]) if gains[side, place] > 0 else None
