import itertools
import threading

import numpy as np
import pytest
import torch

from raylab.base.world import ALONE, World
from raylab.training.batches import Place, iterate_steps
from raylab.training.feed import feed, make_batch, move
from raylab.training.pretrain import make_units, open_data

SEED = 3


def steps_of(spec, place, num_tokens, world=ALONE, change=lambda units: units):
    data = open_data(spec)
    units = change(make_units(spec, data))
    return feed(
        units, data.categories, spec.settings.pretrain, SEED, place, num_tokens, world,
        lambda inputs: float(len(inputs.input_ids)),
    )  # fmt: skip


def flatten(value):
    if isinstance(value, tuple):
        return [part for item in value for part in flatten(item)]
    return [value]


@pytest.mark.parametrize("objective", ["declutr", "cross_entropy"])
def test_feed_is_the_steps_in_order(objective, make_spec):
    spec = make_spec(objective, {"pretrain.accumulation": 2, "pretrain.batch_tokens": 1500})
    data, place = open_data(spec), Place(1, 7)
    units = make_units(spec, data)
    fed = list(steps_of(spec, place, 9000))
    tokens = [one.step.num_tokens for one in fed]
    assert sum(tokens[:-1]) < 9000 <= sum(tokens)
    expected = itertools.islice(iterate_steps(units, 1500, SEED, place), len(fed))
    for one, step in zip(fed, expected, strict=True):
        assert np.array_equal(one.step.units, step.units)
        assert one.step.after == step.after
        assert one.waited >= 0
        inputs = [units.build(step.epochs[i::2], step.units[i::2]) for i in range(2)]
        rows = [
            len(part.rows) if data.categories is None else (data.categories[part.rows] >= 0).sum() for part in inputs
        ]
        pairs = zip(inputs, rows, strict=True)
        batches = [make_batch(part, data.categories, (int(num),)) for part, num in pairs]
        for ours, theirs in zip(flatten(tuple(one.batches)), flatten(tuple(batches)), strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert one.selected == sum(len(part.targets) for part in inputs)
        assert one.flops == step.num_tokens
        known = [0 if data.categories is None else int((data.categories[part.rows] >= 0).sum()) for part in inputs]
        assert one.categories == sum(known)


def test_workers_share_a_step(make_spec):
    spec = make_spec("mlm", {"pretrain.batch_tokens": 1500})
    alone = next(steps_of(spec, Place(0, 0), 1))
    pair = [next(steps_of(spec, Place(0, 0), 1, World(rank, 2, lambda value: value))) for rank in range(2)]
    assert sum(len(part.batches[0].input_ids) for part in pair) == len(alone.batches[0].input_ids)
    assert sum(part.selected for part in pair) == alone.selected
    counts = tuple(len(part.batches[0].categories) for part in pair)
    for rank, part in enumerate(pair):
        assert part.batches[0].gathered == counts
        whole = [ids.tolist() for ids in alone.batches[0].input_ids.split(alone.batches[0].layout.lengths.tolist())]
        ours = [ids.tolist() for ids in part.batches[0].input_ids.split(part.batches[0].layout.lengths.tolist())]
        assert ours == whole[rank::2]


def test_an_error_reaches_who_asks_and_no_thread_stays(make_spec):
    def break_at_third(units):
        calls = itertools.count()

        def build(epochs, chosen):
            if next(calls) == 2:
                raise ValueError("no more")
            return units.build(epochs, chosen)

        return units._replace(build=build)

    found = []
    with pytest.raises(ValueError, match="no more"):
        found.extend(steps_of(make_spec("mlm"), Place(0, 0), 10**6, change=break_at_third))
    half = steps_of(make_spec("mlm"), Place(0, 0), 10**6)
    next(half)
    half.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_nothing_is_built_beyond_the_budget(make_spec):
    built = []

    def count(units):
        return units._replace(build=lambda *which: built.append(1) or units.build(*which))

    assert len(list(steps_of(make_spec("mlm"), Place(0, 0), 3000, change=count))) == len(built) > 1
    before = len(built)
    assert list(steps_of(make_spec("mlm"), Place(0, 0), 0, change=count)) == []
    assert len(built) == before


def test_move_keeps_the_tuples(make_spec):
    batch = next(steps_of(make_spec("declutr"), Place(0, 0), 1)).batches[0]
    moved = move(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    for ours, theirs in zip(flatten(moved), flatten(batch), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.device.type, ours.shape, ours.dtype) == ("meta", theirs.shape, theirs.dtype)
        else:
            assert ours == theirs
