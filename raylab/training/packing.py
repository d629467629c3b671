"""Encoders on packed segments: all tokens in one row, and no token sees another segment's or any padding.

Transformers' attention interface takes the attention over, so that the models of all families run unchanged. Packed
attention has no dropout, on any device: variable-length kernels offer none. All other dropout stays.

Shapes: N tokens, S segments, D hidden size, H heads of size d, M slots of a padded copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from raylab.training.batches import Ints
from raylab.training.encoder import first_position

PACKED = "raylab_packed"
# Segments of this share of a bucket's longest or more are padded to it, and so are those a few tokens shorter.
LIKE_LENGTH, NEAR_LENGTH = 0.75, 8
# Segments of a row of fixed shape: fewer are filled up.
LEAST_SEGMENTS = 16


class Bucket(NamedTuple):
    """Segments of like length in a padded copy: their number, the longest, which slots are real (None: all)."""

    num: int
    width: int
    real: Tensor | None


class Padding(NamedTuple):
    """Where packed tokens go in a padded copy, bucket by bucket.

    slots int64 [M], the token that each slot holds (those left over: the first); tokens int64 [N], each token's slot;
    empty int64, the slots left over.
    """

    slots: Tensor
    tokens: Tensor
    empty: Tensor
    buckets: tuple[Bucket, ...]


class Bounds(NamedTuple):
    """What attention knows of a packed row: the segments' offsets int32 [S + 1] and the longest that one may be;
    `padding` where no kernel takes segments of any length."""

    offsets: Tensor
    longest: int
    padding: Padding | None


class Layout(NamedTuple):
    """The segments of a packed row: their lengths int64 [S], and the bounds for attention.

    A row with room left over is closed by segments of padding, which `lengths` leaves out and no other segment sees.
    """

    bounds: Bounds
    lengths: Tensor


def fits_kernel(model: nn.Module, device: torch.device) -> bool:
    """Whether the variable-length kernel can run an encoder: bf16 on GPUs since Ampere, heads of 8, 16, ... 256."""
    config: Any = model.config
    size = config.hidden_size // config.num_attention_heads
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return able and size % 8 == 0 and size <= 256


def lay_out(offsets: Ints, *, kernel: bool, room: int | None = None, longest: int | None = None) -> Layout:
    """The layout of segments with offsets [S + 1], on the CPU; `kernel`: for the variable-length kernel.

    With `room`, of a row of so many tokens whose segments have at most `longest`: rows of one room then have one shape,
    as code compiled for it needs, since segments without a token fill up to a power of two.
    """
    lengths = np.diff(offsets)
    found = longest or int(lengths.max())
    closed = offsets if room is None else _close(offsets, room, found)
    bounds = Bounds(torch.from_numpy(closed.astype(np.int32)), found, None if kernel else _pad(closed, np.diff(closed)))
    return Layout(bounds, torch.from_numpy(lengths))


def _close(offsets: Ints, room: int, longest: int) -> Ints:
    """Offsets that go on to the end of a row of `room` tokens, [2^k + 1]."""
    rest = np.arange(int(offsets[-1]) + longest, room, longest)
    closed = np.concatenate([offsets, rest, [room] if offsets[-1] < room else []]).astype(np.int64)
    segments = 1 << (max(len(closed) - 1, LEAST_SEGMENTS) - 1).bit_length()
    return np.pad(closed, (0, segments + 1 - len(closed)), constant_values=room)


def _pad(offsets: Ints, lengths: Ints) -> Padding:
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    slots, tokens, empty, buckets = [], np.empty(offsets[-1], dtype=np.int64), [], []
    start = base = 0
    num = int(np.count_nonzero(lengths))  # behind them those without a token
    while start < num:
        width = int(ordered[start])
        least = max(1.0, min(LIKE_LENGTH * width, width - NEAR_LENGTH))
        stop = int(np.searchsorted(-ordered, -least, side="right"))
        here = order[start:stop]
        grid = np.arange(width)
        real = grid < lengths[here, None]
        held = np.where(real, offsets[here, None] + grid, 0).ravel()
        filled = np.flatnonzero(real)
        tokens[held[filled]] = base + filled
        slots.append(held)
        empty.append(base + np.flatnonzero(~real))
        buckets.append(Bucket(len(here), width, None if real.all() else torch.from_numpy(real)))
        start, base = stop, base + real.size
    held_by, left_over = (torch.from_numpy(np.concatenate(parts)) for parts in (slots, empty))
    return Padding(held_by, torch.from_numpy(tokens), left_over, tuple(buckets))


class _Spread(torch.autograd.Function):
    """Tokens [N, ...] to slots [M, ...]. Both ways are plain gathers: fast, and in one order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return rows.index_select(0, padding.slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Nothing depends on the slots left over: their gradients are dropped.
        return gradients[0].index_select(0, ctx.padding.tokens), None


class _Collect(torch.autograd.Function):
    """Slots [M, ...] to tokens [N, ...]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return rows.index_select(0, padding.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        padding: Padding = ctx.padding
        return gradients[0].index_select(0, padding.slots).index_fill_(0, padding.empty, 0.0), None


def _attend_padded(rows: list[Tensor], padding: Padding, scaling: float | None, window: int | None) -> Tensor:
    """Attention within segments by padding those of like length: three [N, H, d] -> [N, H, d]."""
    sizes = [bucket.num * bucket.width for bucket in padding.buckets]
    spread: list[Any] = [_Spread.apply(part, padding).split(sizes) for part in rows]
    outputs = []
    for bucket, *parts in zip(padding.buckets, *spread, strict=True):
        query, key, value = (part.unflatten(0, (bucket.num, bucket.width)).transpose(1, 2) for part in parts)
        real = bucket.real
        seen = None if real is None else real[:, None, None, :]
        if window is not None and window < bucket.width - 1:
            place = torch.arange(bucket.width, device=query.device)
            near = (place[:, None] - place).abs() <= window
            # Slots left over look anywhere: one that saw nothing would be not a number.
            seen = near if real is None else (real[:, None, None, :] & near) | ~real[:, None, :, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    collected: Tensor = _Collect.apply(torch.cat(outputs), padding)
    return collected


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Bounds,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: three [1, H, N, d] -> [1, N, H, d], within the segments of `packed`.

    `sliding_window` is one more than the distance that a token sees (ModernBERT).
    """
    # Not `part[0]`, whose gradient would be a copy.
    rows = [part.squeeze(0).transpose(0, 1) for part in (query, key, value)]
    window = None if sliding_window is None else sliding_window - 1
    if packed.padding is not None:
        return _attend_padded(rows, packed.padding, scaling, window).unsqueeze(0), None
    sides = (-1, -1) if window is None else (window, window)
    ends = (packed.offsets, packed.offsets, packed.longest, packed.longest)
    attended: Any = varlen_attn(rows[0], rows[1], rows[2], *ends, scale=scaling, window_size=sides)
    return attended.unsqueeze(0), None


# Without a function for masks under the same name, transformers makes none.
AttentionInterface.register(PACKED, attend_packed)


@contextmanager
def _pack_attention(config: Any) -> Iterator[None]:
    """Padded passes of the same encoder, before and after, keep their attention."""
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def encode_packed(model: nn.Module, input_ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Hidden states of the last layer of packed segments: ids and places in their segments, both [N] -> [N, D]."""
    config: Any = model.config
    with _pack_attention(config):
        hidden: Tensor = model.base_model(  # type: ignore[operator]
            input_ids=input_ids[None], position_ids=positions[None] + first_position(config), packed=layout.bounds
        ).last_hidden_state
    return hidden.squeeze(0)


def pool_segments(hidden: Tensor, layout: Layout, num_tokens: int) -> Tensor:
    """Mean over each segment's tokens, special ones included: [N or more, D] -> float32 [S, D]; N is `num_tokens`."""
    # Lengths are right by construction: to check them a GPU would have to wait.
    return torch.segment_reduce(hidden[:num_tokens].float(), "mean", lengths=layout.lengths, axis=0, unsafe=True)
