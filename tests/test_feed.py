import itertools
import threading

import numpy as np
import pytest
import torch

from raylab.base.world import ALONE, World
from raylab.training.feed import deal_chunks, feed, make_batch, move
from raylab.training.pretrain import make_units, open_data
from raylab.training.steps import Place, deal, iterate_steps

SEED = 3


def steps_of(spec, place, num_tokens, world=ALONE, change=lambda units: units, chunk_tokens=None):
    data = open_data(spec)
    units = change(make_units(spec, data))
    return feed(
        units, data.categories, spec.settings.pretrain, SEED, place, num_tokens, world,
        lambda inputs: float(len(inputs.input_ids)), chunk_tokens=chunk_tokens,
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
        inputs = [units.build(step.epochs[part], step.units[part]) for part in deal(step.costs, 2)]
        rows = [
            len(part.rows) if data.categories is None else (data.categories[part.rows] >= 0).sum() for part in inputs
        ]
        pairs = zip(inputs, rows, strict=True)
        batches = [make_batch(part, data.categories, (int(num),)) for part, num in pairs]
        parts = tuple(((batch,), False) for batch in batches)
        for ours, theirs in zip(flatten(one.parts), flatten(parts), strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert one.counts[0] == sum(len(part.targets) for part in inputs)
        assert one.flops == step.num_tokens
        known = [0 if data.categories is None else int((data.categories[part.rows] >= 0).sum()) for part in inputs]
        assert one.counts[1] == sum(known)
        assert one.negatives == (None if objective == "cross_entropy" else pytest.approx(count_negatives(batches)))


def count_negatives(batches):
    """Points that are neither a point nor its partner, mean over the points of all parts: two points an anchor."""
    sizes = [2 * len(batch.categories) for batch in batches]
    return sum(size * (size - 2) for size in sizes) / sum(sizes)


def test_negatives_of_supervised_contrast_have_another_category(make_spec):
    spec = make_spec("supervised_contrastive", {"pretrain.accumulation": 2, "pretrain.batch_tokens": 1500})
    for fed in itertools.islice(steps_of(spec, Place(0, 0), 9000), 4):
        labels = [part.chunks[0].categories.tolist() for part in fed.parts]
        others = [sum(a != b for b in part if b >= 0) for part in labels for a in part if a >= 0]
        assert len(labels) == 2
        assert fed.negatives == pytest.approx(np.mean(others))
        assert fed.negatives > 1


def segments_of(batch):
    return [ids.tolist() for ids in batch.input_ids.split(batch.layout.lengths.tolist())]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("objective", ["mlm", "declutr"])
def test_workers_share_a_part_by_tokens(objective, size, make_spec):
    """The same texts in each part for any number of workers, and each knows the rows of all."""
    spec = make_spec(objective, {"pretrain.batch_tokens": 6000, "pretrain.accumulation": 2})
    alone = next(steps_of(spec, Place(0, 0), 1))
    fed = [next(steps_of(spec, Place(0, 0), 1, World(rank, size, lambda value: value))) for rank in range(size)]
    assert sum(one.counts for one in fed).tolist() == alone.counts.tolist()
    assert sum(one.flops for one in fed) == alone.flops == alone.step.num_tokens
    for part, whole in enumerate(alone.parts):
        assert len(whole.chunks[0].input_ids) == pytest.approx(3000, rel=0.05)
        shares = [one.parts[part].chunks[0] for one in fed]
        assert all(share.gathered == tuple(len(share.categories) for share in shares) for share in shares)
        together = sorted(segment for share in shares for segment in segments_of(share))
        assert together == sorted(segments_of(whole.chunks[0]))
        tokens = [len(share.input_ids) for share in shares]
        assert max(tokens) < 1.25 * min(tokens)
        assert {one.negatives for one in fed} == {alone.negatives}


@pytest.mark.parametrize("objective", ["mlm", "declutr", "supervised_contrastive"])
def test_fewer_units_than_shares(objective, make_spec):
    """Parts without a unit are left out; a worker without one has an empty text that counts nowhere."""
    spec = make_spec(objective, {"pretrain.batch_tokens": 240, "pretrain.accumulation": 8})
    fed = [next(steps_of(spec, Place(0, 0), 1, World(rank, 4, lambda value: value))) for rank in range(4)]
    units = len(fed[0].step.units)
    assert units < 8
    assert all(len(one.parts) == units for one in fed)
    batches = [[part.chunks[0] for part in one.parts] for one in fed]
    per = 2 if objective == "declutr" else 1
    for part in zip(*batches, strict=True):
        assert sorted(len(batch.categories) for batch in part) == [0, 0, 0, per]
        idle = [batch for batch in part if not len(batch.categories)]
        assert all(segments_of(batch) == [[0, 2]] and not len(batch.targets) for batch in idle)
    assert sum(one.flops for one in fed) == fed[0].step.num_tokens


@pytest.mark.parametrize("objective", ["cross_entropy", "declutr"])
def test_chunks_are_the_units_of_a_share(objective, make_spec):
    changes = {"pretrain.batch_tokens": 1500, "pretrain.accumulation": 2}
    spec = make_spec(objective, changes)
    for rank in range(2):
        world = World(rank, 2, lambda value: value)
        whole, cut = (next(steps_of(spec, Place(0, 3), 1, world, chunk_tokens=most)) for most in (None, 250))
        assert (whole.counts.tolist(), whole.flops) == (cut.counts.tolist(), cut.flops)
        for part, chunked in zip(whole.parts, cut.parts, strict=True):
            assert (part.chunked, chunked.chunked) == (False, True)
            assert len(chunked.chunks) > 1
            assert all(len(chunk.input_ids) <= 250 for chunk in chunked.chunks)
            together = sorted(segment for chunk in chunked.chunks for segment in segments_of(chunk))
            assert together == sorted(segments_of(part.chunks[0]))
            assert {chunk.gathered for chunk in chunked.chunks} == {part.chunks[0].gathered}


def test_no_chunk_is_larger_than_the_largest_unit_must_be():
    costs = np.array([30, 30, 50, 20, 40, 10])
    for most, num in ((1, 4), (60, 3), (90, 2), (10_000, 1), (None, 1)):
        chunks = deal_chunks(costs, most)
        assert sorted(np.concatenate(chunks).tolist()) == list(range(6))
        assert len(chunks) == num
        assert all(costs[chunk].sum() <= max(most or 10**9, 50) for chunk in chunks)
    assert [len(chunk) for chunk in deal_chunks(costs[:0], 5)] == [0]


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
    batch = next(steps_of(make_spec("declutr"), Place(0, 0), 1)).parts[0].chunks[0]
    moved = move(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    for ours, theirs in zip(flatten(moved), flatten(batch), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.device.type, ours.shape, ours.dtype) == ("meta", theirs.shape, theirs.dtype)
        else:
            assert ours == theirs
