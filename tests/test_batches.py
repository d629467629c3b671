import itertools

import numpy as np
import pytest

from raylab.base.mistakes import InfeasibleError
from raylab.base.noise import derive_seed
from raylab.job.blocks import Declutr
from raylab.job.settings import OBJECTIVE_BLOCKS
from raylab.training.batches import (
    LONGEST_TEXT,
    UNITS,
    cut_pieces,
    describe_spans,
    keep_documents,
    pack_segments,
    pad_rows,
    piece_units,
    slice_piece,
    span_units,
)
from raylab.training.masks import mask_tokens
from raylab.training.spans import sample_spans
from raylab.training.steps import Place, iterate_steps

CASES = {
    "truncate": ("mlm", {}),
    "windows": ("mlm", {"corpus.long_documents": "windows"}),
    "declutr": ("declutr", {}),
    "shrink": ("declutr", {"pretrain.declutr.short_documents": "shrink", "pretrain.declutr.num_positives": 3}),
}


@pytest.fixture(scope="module")
def store(make_store):
    """120 texts of 20 to 300 tokens: fewer than a block of the window."""
    return make_store(np.random.default_rng(1).integers(20, 300, 120), seed=1)


ROWS = np.arange(3, 117)


@pytest.fixture(params=CASES)
def units(request, store, vocabulary, make_job):
    objective, changes = CASES[request.param]
    job = make_job(objective, changes)
    return UNITS[objective](store, ROWS, vocabulary, job.corpus, job.pretrain, 5)


def take(units, num, place=Place(0, 0), seed=5, batch_tokens=1024):  # noqa: B008
    return list(itertools.islice(iterate_steps(units, batch_tokens, seed, place), num))


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_objective_has_units():
    assert set(UNITS) == set(OBJECTIVE_BLOCKS) - {"none"}


def test_steps_resume_from_any_place(units):
    whole = take(units, 120)
    assert whole[-1].after.epoch >= 2
    for index in range(0, 110, 7):
        for ours, theirs in zip(take(units, 10, whole[index].after), whole[index + 1 : index + 11], strict=True):
            assert same(ours[:-1], theirs[:-1])
            assert ours.after == theirs.after


def test_each_epoch_visits_every_unit_once(units):
    steps = take(units, 120)
    assert all((np.diff(step.epochs) >= 0).all() for step in steps)
    visited, epochs = (np.concatenate([getattr(step, name) for step in steps]) for name in ("units", "epochs"))
    orders = [visited[epochs == epoch] for epoch in range(steps[-1].after.epoch)]
    assert len(orders) >= 2
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(units.num))
    assert not np.array_equal(orders[0], orders[1])
    other = np.concatenate([step.units for step in take(units, 40, seed=6)])[: units.num]
    assert not np.array_equal(other, orders[0])


def test_step_tokens_are_those_of_the_inputs(units):
    for step in take(units, 60):
        inputs = units.build(step.epochs, step.units)
        assert len(inputs.input_ids) == len(inputs.positions) == inputs.offsets[-1] == step.num_tokens
        costs = [int(units.cost(int(e), np.array([u]))[0]) for e, u in zip(step.epochs, step.units, strict=True)]
        assert costs == step.costs.tolist()
        assert sum(costs) == step.num_tokens <= 1024


def test_masks_are_dynamic_and_fixed(units):
    chosen = np.arange(8)
    first, again, other = (units.build(np.full(8, epoch), chosen) for epoch in (0, 0, 1))
    assert same(first, again)
    texts = np.searchsorted(first.offsets, first.selected, side="right") - 1
    assert set(texts) == set(range(len(first.rows)))
    if len(first.rows) == len(first.offsets) - 1:
        assert np.array_equal(first.offsets, other.offsets)
    assert not np.array_equal(first.selected, other.selected)


def test_masks_follow_the_seed(store, vocabulary, make_job):
    job = make_job()
    first, other = (
        piece_units(store, ROWS, vocabulary, job.corpus, job.pretrain, seed).build(np.zeros(8, int), np.arange(8))
        for seed in (5, 6)
    )
    assert not np.array_equal(first.selected, other.selected)
    assert np.array_equal(first.rows, other.rows)


def segments_of(inputs, values=None):
    """The tokens of each segment, or other values a token."""
    return np.split(inputs.input_ids if values is None else values, inputs.offsets[1:-1])


def split_by_unit(inputs, num, num_positives):
    """The inputs of each of `num` units: lists of arrays."""
    per = len(inputs.rows) // num
    chosen = np.zeros(len(inputs.input_ids), bool)
    chosen[inputs.selected] = True
    wanted = np.zeros(len(inputs.input_ids), int)
    wanted[inputs.selected] = inputs.targets
    columns = list(zip(*(segments_of(inputs, v) for v in (None, inputs.positions, chosen, wanted)), strict=True))
    parts = []
    for unit in range(num):
        here = range(unit * per, unit * per + per)
        part = [inputs.rows[list(here)]]
        for i in here:
            part += columns[i]
            if len(inputs.offsets) - 1 > len(inputs.rows):
                first = len(inputs.rows) + i * num_positives
                part += [ids for ids, *_ in columns[first : first + num_positives]]
        parts.append(part)
    return parts


def test_inputs_of_a_unit_ignore_the_batch(units, request):
    positives = 3 if "shrink" in request.node.name else 2
    epochs, chosen = np.array([0, 0, 0, 1, 1, 1]), np.array([4, 9, 17, 2, 9, 30])
    together = split_by_unit(units.build(epochs, chosen), 6, positives)
    for index, part in enumerate(together):
        alone = split_by_unit(units.build(epochs[[index]], chosen[[index]]), 1, positives)[0]
        assert same(part, alone)
    for share in range(2):  # as two workers take it
        dealt = split_by_unit(units.build(epochs[share::2], chosen[share::2]), 3, positives)
        for part, alone in zip(together[share::2], dealt, strict=True):
            assert same(part, alone)


def test_masked_tokens_and_targets(units, vocabulary):
    inputs = units.build(np.zeros(units.num, int), np.arange(units.num))
    ids, offsets = inputs.input_ids, inputs.offsets
    assert (ids[offsets[:-1]] == vocabulary.prefix_id).all()
    assert (ids[offsets[1:] - 1] == vocabulary.suffix_id).all()
    assert all(np.array_equal(part, np.arange(len(part))) for part in segments_of(inputs, inputs.positions))
    assert not np.isin(inputs.selected, [offsets[:-1], offsets[1:] - 1]).any()
    texts = offsets[len(inputs.rows)]
    assert (np.diff(inputs.selected) > 0).all()
    assert inputs.selected[-1] < texts
    assert len(inputs.targets) == len(inputs.selected)
    assert not np.isin(inputs.targets, vocabulary.special_ids).any()
    # The few that stay as they were aside, a selected token shows as the mask or a random one.
    shown = ids[inputs.selected]
    assert np.mean(shown == vocabulary.mask_id) == pytest.approx(0.8, abs=0.05)
    assert np.mean(shown == inputs.targets) == pytest.approx(0.1, abs=0.04)
    assert len(shown) / (texts - 2 * len(inputs.rows)) == pytest.approx(0.15, abs=0.02)


def unmask(inputs):
    """The segments' tokens as they were before some were masked."""
    ids = inputs.input_ids.copy()
    ids[inputs.selected] = inputs.targets
    return segments_of(inputs, ids)


def test_pieces_hold_the_texts(store, vocabulary, make_job):
    for long_documents in ("truncate", "windows"):
        job = make_job(changes={"corpus.long_documents": long_documents})
        units = piece_units(store, ROWS, vocabulary, job.corpus, job.pretrain, 5)
        inputs = units.build(np.zeros(units.num, int), np.arange(units.num))
        assert np.diff(inputs.offsets).max() == 64
        pieces = unmask(inputs)
        for row in ROWS:
            text = store.values[store.offsets[row] : store.offsets[row + 1]]
            here = np.flatnonzero(inputs.rows == row)
            tokens = np.concatenate([pieces[i][1:-1] for i in here])
            assert np.array_equal(tokens, text if long_documents == "windows" else text[:62])
        assert np.array_equal(inputs.rows, units.row)


def test_cut_pieces_counts_special_tokens():
    lengths = np.array([0, 5, 14, 15, 28, 29])
    pieces = cut_pieces(lengths, np.array([5, 0, 4, 2, 3]), 16, "windows")
    assert pieces.owner.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]
    assert pieces.row.tolist() == [5, 5, 5, 0, 4, 4, 2, 3, 3]
    assert pieces.start.tolist() == [0, 14, 28, 0, 0, 14, 0, 0, 14]
    assert pieces.length.tolist() == [14, 14, 1, 0, 14, 14, 14, 14, 1]
    cut = cut_pieces(lengths, np.array([5, 0, 4, 2, 3]), 16, "truncate")
    assert cut.length.tolist() == [14, 0, 14, 14, 14]
    assert cut.start.tolist() == [0] * 5


def test_pad_rows(vocabulary):
    ids, mask = pad_rows([np.array([7, 8], np.int32), np.array([], np.int32), np.array([9], np.int32)], vocabulary)
    assert ids.tolist() == [[0, 7, 8, 2], [0, 2, 1, 1], [0, 9, 2, 1]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_pack_segments(vocabulary):
    values = np.array([7, 8, 9], np.int32)
    ids, positions, offsets = pack_segments(values, np.array([0, 3, 2]), np.array([2, 0, 1]), vocabulary)
    assert ids.tolist() == [0, 7, 8, 2, 0, 2, 0, 9, 2]
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert offsets.tolist() == [0, 4, 6, 9]


def test_texts_are_masked_as_if_padded(store, vocabulary, make_job):
    """The masks are those of `mask_tokens`, epoch by epoch."""
    job = make_job(changes={"corpus.long_documents": "windows"})
    units = piece_units(store, ROWS, vocabulary, job.corpus, job.pretrain, 5)
    epochs, chosen = np.repeat([2, 3], 40), np.arange(80)
    inputs = units.build(epochs, chosen)
    masked, pieces = segments_of(inputs), unmask(inputs)
    lengths = store.lengths[ROWS]
    cut = cut_pieces(store.lengths, ROWS, 64, "windows")
    assert (lengths > 62).any()
    for epoch in (2, 3):
        here = np.flatnonzero(epochs == epoch)
        ids, mask = pad_rows([slice_piece(store, cut, i) for i in here], vocabulary)
        expected, selected = mask_tokens(
            ids, (mask > 0) & ~np.isin(ids, vocabulary.special_ids), cut.row[here] * LONGEST_TEXT + cut.start[here],
            derive_seed(5, "masks", epoch), fraction=0.15, mask_token_id=vocabulary.mask_id,
            vocab_size=vocabulary.size, special_ids=vocabulary.special_ids,
        )  # fmt: skip
        assert np.array_equal(np.concatenate([masked[i] for i in here]), expected[mask > 0])
        assert np.array_equal(np.concatenate([pieces[i] for i in here]), ids[mask > 0])
        wanted = np.isin(np.searchsorted(inputs.offsets, inputs.selected, side="right") - 1, here)
        assert np.array_equal(inputs.targets[wanted], ids[selected])


@pytest.mark.parametrize("sampling", ["any", "adjacent", "subsuming"])
def test_anchors_and_positives_are_the_tokens_of_their_spans(sampling, store, vocabulary, make_job):
    job = make_job("declutr", {"pretrain.declutr.sampling": sampling, "pretrain.declutr.num_positives": 3})
    declutr = job.pretrain.declutr
    units = span_units(store, ROWS, vocabulary, job.corpus, job.pretrain, 5)
    assert (store.lengths[units.row] >= 2 * 2 * 24).all()
    epochs, chosen = np.repeat([0, 1], 20), np.concatenate([np.arange(20), np.arange(5, 25)])
    inputs = units.build(epochs, chosen)
    ids, anchor, positive = unmask(inputs), 0, len(inputs.rows)
    for epoch, unit in zip(epochs, chosen, strict=True):
        row = units.row[unit]
        text = store.values[store.offsets[row] : store.offsets[row + 1]]
        spans = sample_spans(
            store.lengths[[row]], np.array([row]), derive_seed(5, "spans", int(epoch)),
            **declutr.model_dump(include={"num_anchors", "num_positives", "max_span", "min_span", "sampling"}),
        )  # fmt: skip
        for a in range(2):
            begin, length = spans.anchor_start[0, a], spans.anchor_length[0, a]
            assert 8 <= length <= 24
            expected = [0, *text[begin : begin + length], 2]
            assert ids[anchor].tolist() == expected
            assert inputs.rows[anchor] == row
            anchor += 1
            for p in range(3):
                begin, length = spans.positive_start[0, a, p], spans.positive_length[0, a, p]
                expected = [0, *text[begin : begin + length], 2]
                assert ids[positive].tolist() == expected
                positive += 1
    assert (anchor, positive) == (len(inputs.rows), len(ids))


LENGTHS = np.array([3, 39, 40, 79, 80, 159, 160, 161])


@pytest.mark.parametrize(
    ("rules", "floor"),
    [
        ({"short_documents": "drop"}, 160),
        ({"short_documents": "shrink"}, 40),
        ({"short_documents": "drop", "min_document_length": 161}, 161),
        ({"short_documents": "shrink", "min_document_length": 79}, 79),
        ({"short_documents": "drop", "num_anchors": 1}, 80),
        ({"short_documents": "shrink", "min_span": 20}, 80),
    ],
)
def test_keep_documents(rules, floor):
    declutr = Declutr(**{"num_anchors": 2, "max_span": 40, "min_span": 10, **rules})
    assert np.array_equal(keep_documents(LENGTHS, declutr), floor <= LENGTHS)
    described = describe_spans(LENGTHS, declutr)
    kept = LENGTHS[floor <= LENGTHS]
    spans = np.minimum(kept // (2 * declutr.num_anchors), 40)
    assert described == {
        "documents": len(kept),
        "share": len(kept) / 8,
        "shrunk": int((kept < 2 * declutr.num_anchors * 40).sum()),
        "median_max_span": float(np.median(spans)),
        "mean_max_span": float(spans.mean()),
    }


def test_infeasible_spans():
    refuse = Declutr(num_anchors=2, max_span=40, min_span=10, short_documents="refuse")
    with pytest.raises(InfeasibleError, match="6 of 8 documents have under 160 tokens"):
        keep_documents(LENGTHS, refuse)
    assert keep_documents(LENGTHS[6:], refuse).all()
    for rule in ("drop", "shrink"):
        with pytest.raises(InfeasibleError, match="no document has"):
            keep_documents(np.array([5, 9]), Declutr(max_span=40, min_span=10, short_documents=rule))
    nothing = describe_spans(np.array([5, 9]), Declutr(max_span=40, min_span=10))
    assert nothing == {"documents": 0, "share": 0.0, "shrunk": 0, "median_max_span": 0.0, "mean_max_span": 0.0}
