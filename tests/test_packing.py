import copy

import numpy as np
import pytest
import torch
from conftest import FAMILIES

from raylab.training.batches import pack_segments, pad_rows
from raylab.training.encoder import encode, load_encoder, pool
from raylab.training.packing import encode_packed, fits_kernel, lay_out, pool_segments

# Several buckets, one text of two tokens with special ones alone, and lengths alike.
LENGTHS = [3, 40, 17, 25, 40, 0, 39, 62, 62, 9, 3, 31]


@pytest.fixture(scope="module")
def texts(make_store, vocabulary):
    """The texts packed, with their layout; and padded, ids and mask as tensors."""
    store = make_store(LENGTHS)
    first, lengths = store.offsets[:-1], store.lengths
    ids, positions, offsets = pack_segments(store.values, first, lengths, vocabulary)
    rows = [store.values[a : a + n] for a, n in zip(first, lengths, strict=True)]
    packed = torch.from_numpy(ids), torch.from_numpy(positions), lay_out(offsets, kernel=False)
    return packed, tuple(torch.from_numpy(array) for array in pad_rows(rows, vocabulary))


def run_both(model, texts):
    """Hidden states of all tokens [N, D] and pooled ones [S, D], packed and padded; and weights of a made-up loss."""
    (ids, positions, layout), (padded, mask) = texts
    hidden = encode_packed(model, ids, positions, layout)
    other = encode(model, padded, mask)
    return (hidden, pool_segments(hidden, layout, len(ids))), (other[mask.bool()], pool(other, mask))


def gradients(model, hidden, pooled):
    generator = torch.Generator().manual_seed(3)
    loss = (hidden * torch.randn(hidden.shape, generator=generator)).sum()
    loss = loss + (pooled * torch.randn(pooled.shape, generator=generator)).pow(2).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family, encoder_folders, texts):
    model = load_encoder(str(encoder_folders[family]))[0].eval()
    # Larger weights than a new encoder's: attention that is far from even.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    before = model.config._attn_implementation
    packed, padded = run_both(model, texts)
    assert model.config._attn_implementation == before
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    (loss, ours), (other, theirs) = gradients(model, *packed), gradients(model, *padded)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(scale, 1), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_do_not_see_each_other(family, encoder_folders, texts):
    model = load_encoder(str(encoder_folders[family]))[0].eval()
    (ids, positions, layout), _ = texts
    changed = ids.clone()
    begin, end = layout.bounds.offsets[7:9].tolist()
    changed[begin + 1 : end - 1] = changed[begin + 1 : end - 1].flip(0)
    with torch.inference_mode():
        hidden, other = (encode_packed(model, x, positions, layout) for x in (ids, changed))
    same = (hidden == other).all(1)
    assert same[:begin].all()
    assert same[end:].all()
    assert not same[begin:end].any()


def test_windows_bound_what_a_token_sees(encoder_folders, texts):
    """ModernBERT's local layers: in a segment longer than the window, a far token changes nothing after one layer."""
    model = load_encoder(str(encoder_folders["modernbert"]))[0].eval()
    kinds = model.config.layer_types
    assert "sliding_attention" in kinds
    local = copy.deepcopy(model.base_model)
    local.layers = torch.nn.ModuleList([local.layers[kinds.index("sliding_attention")]])
    model.model = local
    window = model.config.sliding_window
    (ids, positions, layout), _ = texts
    begin, end = layout.bounds.offsets[7:9].tolist()
    changed = ids.clone()
    changed[begin] = 399 - changed[begin]
    with torch.inference_mode():
        hidden, other = (encode_packed(model, x, positions, layout) for x in (ids, changed))
    same = (hidden == other).all(1)
    assert not same[begin : begin + window + 1].any()
    assert same[begin + window + 1 : end].all()


def test_attention_has_no_dropout_and_the_rest_has(encoder_folders, texts):
    (ids, positions, layout), _ = texts
    model = load_encoder(str(encoder_folders["roberta"]))[0].train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.base_model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    first, second = (encode_packed(model, ids, positions, layout) for _ in range(2))
    assert torch.equal(first, second)
    model.base_model.embeddings.dropout.p = 0.5
    assert not torch.equal(first, encode_packed(model, ids, positions, layout))


def test_layout_of_any_lengths():
    rng = np.random.default_rng(0)
    for num in (1, 2, 7, 60):
        lengths = rng.integers(2, 200, num)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        layout = lay_out(offsets, kernel=False)
        assert layout.bounds.offsets.tolist() == offsets.tolist()
        assert layout.bounds.longest == lengths.max()
        padding = layout.bounds.padding
        slots = sum(bucket.num * bucket.width for bucket in padding.buckets)
        assert len(padding.slots) == slots == offsets[-1] + len(padding.empty)
        assert torch.equal(padding.slots[padding.tokens], torch.arange(offsets[-1]))
        assert sorted([*padding.tokens.tolist(), *padding.empty.tolist()]) == list(range(slots))
        assert slots <= offsets[-1] / 0.75 + 8 * num
        assert lay_out(offsets, kernel=True).bounds.padding is None


def test_kernels_are_for_gpus(encoder_folders):
    model = load_encoder(str(encoder_folders["roberta"]))[0]
    assert not fits_kernel(model, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_fixed_shape_changes_nothing(family, encoder_folders, texts):
    (ids, positions, layout), _ = texts
    model = load_encoder(str(encoder_folders[family]))[0].eval()
    plain = encode_packed(model, ids, positions, layout)
    offsets = layout.bounds.offsets.numpy().astype(np.int64)
    shapes = set()
    for room in (len(ids), len(ids) + 1, len(ids) + 300):
        closed = lay_out(offsets, kernel=False, room=room, longest=64)
        shapes.add(closed.bounds.offsets.shape)
        assert closed.bounds.offsets[-1] == room
        assert torch.equal(closed.lengths, layout.lengths)
        assert closed.bounds.offsets.diff().max() <= 64
        left = (0, room - len(ids))
        hidden = encode_packed(
            model, torch.nn.functional.pad(ids, left), torch.nn.functional.pad(positions, left), closed
        )
        assert len(hidden) == room
        torch.testing.assert_close(hidden[: len(ids)], plain, rtol=1e-5, atol=2e-5)
        pooled = pool_segments(hidden, closed, len(ids))
        torch.testing.assert_close(pooled, pool_segments(plain, layout, len(ids)), rtol=1e-5, atol=2e-5)
    assert shapes == {(17,), (33,)} or shapes == {(17,)}
