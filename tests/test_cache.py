"""Gradient caching by itself: dropout, and memory. That chunks change nothing, test_objectives shows of whole steps."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from raylab.base.noise import derive_seed
from raylab.training import projection
from raylab.training.cache import cache_gradients
from raylab.training.dropout import replace_dropout, seed_dropout
from raylab.training.feed import Part, make_batch
from raylab.training.loop import _backward, load_training
from raylab.training.objectives import Totals, contrast_rows, loss_weights, pick_rows
from raylab.training.pretrain import make_units, open_data, start_rung

CONTRASTIVE = ("declutr", "supervised_contrastive")


@pytest.fixture(params=CONTRASTIVE)
def case(request, make_spec):
    """A learner with dropout; `make(num)`: 48 units of it in chunks, and the counts of its losses."""
    spec = make_spec(request.param, {"encoder.config.dropout": 0.3})
    data = open_data(spec)
    learner = load_training(spec, data, start_rung(spec, data).path, resume=False).learner
    units = make_units(spec, data)
    epochs = np.repeat([0, 1], 24)
    chosen = np.concatenate([np.arange(24)] * 2)

    def make(num):
        inputs = [units.build(*parts) for parts in zip(np.split(epochs, num), np.split(chosen, num), strict=True)]
        rows = sum(len(part.rows) for part in inputs)
        chunks = tuple(make_batch(part, data.categories, (rows,)) for part in inputs)
        selected, known = (sum(len(getattr(chunk, name)) for chunk in chunks) for name in ("targets", "known"))
        return chunks, Totals(torch.tensor(float(selected)), torch.tensor(float(known)), 1, 1)

    learner.train()
    return learner, make


def read_gradients(learner):
    found = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad()
    return found


def differ(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.parametrize("hashed", [False, True])
def test_both_passes_of_a_chunk_have_the_same_dropout(hashed, case, monkeypatch):
    """The gradients are those of one graph of all chunks, each with the dropout of its seed."""
    learner, make = case
    if hashed:  # as where an encoder is compiled, but for the compiling
        monkeypatch.setattr(projection, "_compare_compiled", projection._compare_fused)
        for module in learner.encoder.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, name, nn.Dropout(child.p))
        learner.dropout = replace_dropout(learner.encoder.base_model)
        assert len(learner.dropout)
    chunks, totals = make(4)
    weights = {name: torch.tensor(weight) for name, weight in loss_weights(learner.pretrain).items()}
    losses = _backward(learner, learner, (Part(chunks, True),), totals, weights, 9)
    cached = read_gradients(learner)

    def compute(seeds):
        rows, mlm = [], []
        for chunk, seed in zip(chunks, seeds, strict=True):
            seed_dropout(learner.dropout, seed)
            rows.append(pick_rows(learner, chunk))
            seed_dropout(learner.dropout, seed)
            mlm.append(learner(chunk, totals, torch.zeros(()))["mlm"])
        labels = torch.cat([chunk.categories[chunk.known] for chunk in chunks])
        loss = contrast_rows(learner, torch.cat(rows), labels, chunks[0].gathered, totals)
        (loss + sum(mlm)).backward()
        return float(loss.detach()), read_gradients(learner)

    loss, gradients = compute([derive_seed(9, 0, chunk) for chunk in range(4)])
    assert float(losses[f"{learner.pretrain.objective}_loss"]) == pytest.approx(loss, rel=1e-5)
    assert differ(cached, gradients) < 1e-5 * max(float(value.abs().max()) for value in gradients.values())
    assert differ(cached, compute([1, 2, 3, 4])[1]) > 1e-3


def test_the_cache_is_the_gradient_of_the_loss_at_the_rows(case):
    learner, make = case
    learner.eval()
    chunks, totals = make(3)
    (whole,), _ = make(1)
    cache = cache_gradients(learner, chunks, totals, [0, 0, 0])
    rows = pick_rows(learner, whole).detach()
    labels = whole.categories[whole.known]
    loss = contrast_rows(learner, rows, labels, whole.gathered, totals)
    torch.testing.assert_close(cache.loss, loss, rtol=1e-5, atol=1e-6)
    gradients = torch.cat(cache.gradients)
    assert gradients.shape == rows.shape
    for row, column in ((0, 0), (5, 3), (len(rows) - 1, 15)):
        sides = []
        for step in (1e-2, -1e-2):
            moved = rows.double()
            moved[row, column] += step
            sides.append(contrast_rows(learner, moved.float(), labels, whole.gathered, totals).double())
        slope = float((sides[0] - sides[1]) / 2e-2)
        assert float(gradients[row, column]) == pytest.approx(slope, rel=0.05, abs=2e-3)


def measure_peak(work):
    """The most bytes that graphs hold at once for their backward passes."""
    held, most, seen = 0, 0, set()

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def free(pointer, size):
        nonlocal held
        held -= size
        seen.discard(pointer)

    def pack(tensor):
        nonlocal held, most
        kept, pointer, size = Held(tensor), tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if pointer not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(pointer)
            held += size
            most = max(most, held)
            weakref.finalize(kept, free, pointer, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        work()
    assert most > 0
    return most


def test_memory_follows_the_chunk(case):
    learner, make = case
    weights = {name: torch.tensor(weight) for name, weight in loss_weights(learner.pretrain).items()}
    peaks = {}
    for num in (1, 4, 8):
        chunks, totals = make(num)
        parts = (Part(chunks, num > 1),)
        peaks[num] = measure_peak(
            lambda parts=parts, totals=totals: _backward(learner, learner, parts, totals, weights, 0)
        )
        learner.zero_grad()
    assert peaks[4] < 0.33 * peaks[1]
    assert peaks[8] < 0.20 * peaks[1]
