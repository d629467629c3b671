"""Anchor and positive spans of DeCLUTR (Giorgi et al., arXiv 2006.03659, section 3.1), drawn from token counts alone.

Shapes: N documents, A anchors a document, P positives an anchor. Everything is in tokens of the document, without
special tokens; a span is [start, start + length).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylab.base.noise import uniforms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Spans(NamedTuple):
    """The spans of N documents, int64; anchors are in document order."""

    anchor_start: Ints  # [N, A]
    anchor_length: Ints  # [N, A]
    positive_start: Ints  # [N, A, P]
    positive_length: Ints  # [N, A, P]


def effective_spans(lengths: Ints, num_anchors: int, max_span: int) -> Ints:
    """The longest span [N] that each document of lengths[N] tokens has room for: min(max_span, n // (2 * num_anchors)).

    Twice the anchors, so that each anchor can have a positive of full length beside it.
    """
    return np.minimum(lengths // (2 * num_anchors), max_span)


def sample_spans(
    lengths: Ints,
    rows: Ints,
    seed: int,
    *,
    num_anchors: int,
    num_positives: int,
    max_span: int,
    min_span: int,
    sampling: str,
) -> Spans:
    """Draws anchors and positives for documents of lengths[N] tokens, each from (seed, rows[i], lengths[i]) alone.

    Anchor lengths follow Beta(4, 2), positive lengths Beta(2, 4), scaled to min_span up to the effective span (see
    `effective_spans`) and rounded down. `sampling` is a name in SAMPLING. A positive never overlaps another anchor of
    its document: with two or more, anchors start at least two effective spans apart.

    Raises ValueError for settings that cannot work, and if any document is too short for spans of min_span tokens.
    """
    _check_settings(num_anchors, num_positives, max_span, min_span, sampling)
    if lengths.ndim != 1 or lengths.shape != rows.shape:
        raise ValueError(f"lengths {lengths.shape} and rows {rows.shape} must be of one shape [N]")
    longest = effective_spans(lengths, num_anchors, max_span)
    num_short = int(np.count_nonzero(longest < min_span))
    if num_short:
        raise ValueError(
            f"{num_short} of {len(lengths)} documents have fewer than {2 * num_anchors * min_span} tokens, which "
            f"{num_anchors} anchors with min_span {min_span} need; leave them out or lower min_span or num_anchors"
        )
    # Per span 5 numbers for its length and one for its place; in each anchor's group the anchor comes first.
    draws = uniforms(seed, rows, num_anchors * (1 + num_positives) * 6)
    draws = draws.reshape(len(rows), num_anchors, 1 + num_positives, 6)
    places = draws[..., 5]
    # The k-th smallest of 5 uniforms is exactly Beta(k, 6 - k): the 4th Beta(4, 2), the 2nd Beta(2, 4). No inversion of
    # the Beta distribution, which would cost more than all the rest here.
    ordered = np.sort(draws[..., :5], axis=-1)
    room = (longest - min_span)[:, None]
    anchor_length = (ordered[:, :, 0, 3] * room).astype(np.int64) + min_span
    positive_length = (ordered[:, :, 1:, 1] * room[:, :, None]).astype(np.int64) + min_span
    place_anchors = _place_one_anchor if num_anchors == 1 else _place_anchors
    anchor_start = place_anchors(places[:, :, 0], anchor_length, longest, lengths)
    positive_start, positive_length = SAMPLING[sampling](
        places[:, :, 1:], anchor_start[:, :, None], anchor_length[:, :, None], positive_length, lengths[:, None, None]
    )
    return Spans(anchor_start, anchor_length, positive_start, positive_length)


def _check_settings(num_anchors: int, num_positives: int, max_span: int, min_span: int, sampling: str) -> None:
    """Raises one ValueError that lists every setting that cannot work."""
    problems = []
    for name, value in (("num_anchors", num_anchors), ("num_positives", num_positives), ("min_span", min_span)):
        if value < 1:
            problems.append(f"{name} is {value}; it must be at least 1")
    if max_span < min_span:
        problems.append(f"max_span is {max_span}; it must be at least min_span, {min_span}")
    if sampling not in SAMPLING:
        problems.append(f"sampling is {sampling!r}; it must be one of {', '.join(SAMPLING)}")
    if problems:
        raise ValueError("; ".join(problems))


def _pick(draws: Floats, low: Ints, high: Ints) -> Ints:
    """Uniform integers of [low, high], both ends included, from uniforms in [0, 1)."""
    return low + (draws * (high - low + 1)).astype(np.int64)


def _place_anchors(draws: Floats, length: Ints, longest: Ints, num_tokens: Ints) -> Ints:
    """Starts [N, A] of two or more anchors of length[N, A], at least 2 * longest apart, uniform up to rounding.

    Taking the forced distances out leaves sorted points on the free tokens; putting them back keeps them apart.
    """
    forced = 2 * longest[:, None] * np.arange(draws.shape[1])
    free = num_tokens[:, None] - forced[:, -1:] - length[:, -1:]
    return _pick(np.sort(draws, axis=1), np.zeros_like(free), free) + forced


def _place_one_anchor(draws: Floats, length: Ints, longest: Ints, num_tokens: Ints) -> Ints:
    """Starts [N, 1] of the only anchors, uniform where `longest` tokens are free before the anchor or after it.

    Those starts are [0, n - longest - length] and [longest, n - length]. In a short document a gap lies between the
    two, where neither side could hold an adjacent positive of full length.
    """
    num_first = num_tokens[:, None] - longest[:, None] - length + 1
    gap = np.maximum(longest[:, None] - num_first, 0)
    start = _pick(draws, np.zeros_like(length), num_tokens[:, None] - length - gap)
    return start + gap * (start >= num_first)


# The placements of positives. All take a uniform in [0, 1) per positive [N, A, P], the anchors' start and length
# [N, A, 1], the positives' length [N, A, P] and the documents' token counts [N, 1, 1]; they return start and length.


def _place_any(
    draws: Floats, anchor_start: Ints, anchor_length: Ints, length: Ints, num_tokens: Ints
) -> tuple[Ints, Ints]:
    """Anywhere from just before the anchor to just after it: overlapping, adjacent or inside. As in the paper."""
    low = np.maximum(anchor_start - length, 0)
    high = np.minimum(anchor_start + anchor_length, num_tokens - length)
    return _pick(draws, low, high), length


def _place_adjacent(
    draws: Floats, anchor_start: Ints, anchor_length: Ints, length: Ints, num_tokens: Ints
) -> tuple[Ints, Ints]:
    """Touching the anchor on either side, with equal chances if both fit. The anchors' places ensure that one does."""
    before = anchor_start - length
    after = anchor_start + anchor_length
    use_before = (before >= 0) & ((draws < 0.5) | (after + length > num_tokens))
    return np.where(use_before, before, after), length


def _place_subsuming(
    draws: Floats, anchor_start: Ints, anchor_length: Ints, length: Ints, num_tokens: Ints
) -> tuple[Ints, Ints]:
    """Inside the anchor; a positive longer than its anchor is cut to the anchor's length."""
    length = np.minimum(length, anchor_length)
    return _pick(draws, anchor_start, anchor_start + anchor_length - length), length


SAMPLING: dict[str, Callable[[Floats, Ints, Ints, Ints, Ints], tuple[Ints, Ints]]] = {
    "any": _place_any,
    "adjacent": _place_adjacent,
    "subsuming": _place_subsuming,
}
