"""Masks for masked language modelling (Devlin et al., arXiv 1810.04805, section 3.1), the same in any batch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raylab.base.noise import ragged_uniforms, uniforms

MASK_SHARE = 0.8  # of the chosen tokens: become the mask token
RANDOM_SHARE = 0.1  # become a random token; the rest stay, but are predicted too


def mask_tokens(
    input_ids: NDArray[np.int64],
    maskable: NDArray[np.bool_],
    rows: NDArray[np.int64],
    seed: int,
    *,
    fraction: float,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns masked copies of input_ids[B, T] and which tokens were chosen, bool [B, T]: those that a model predicts.

    Each token where maskable[B, T] is true is chosen independently with probability `fraction`. Of the chosen, 80%
    become the mask token, 10% a random one, uniform over [0, vocab_size) without special_ids, and 10% stay. Row b's
    result depends on seed, rows[b] and its own tokens by position: not on padding on the right nor on the other rows.
    Two sequences of one document need two seeds.

    Raises ValueError for a fraction outside [0, 1], shapes that differ, or no token that is not special.
    """
    if input_ids.ndim != 2 or maskable.shape != input_ids.shape or rows.shape != input_ids.shape[:1]:
        raise ValueError(
            f"input_ids {input_ids.shape} and maskable {maskable.shape} must be [B, T] and rows {rows.shape} [B]"
        )
    special = _check(fraction, vocab_size, special_ids)
    draws = uniforms(seed, rows, input_ids.shape[1])
    selected = (draws < fraction) & maskable
    masked_ids = input_ids.copy()
    masked_ids[selected] = _replace(input_ids[selected], draws[selected], fraction, mask_token_id, vocab_size, special)
    return masked_ids, selected


def mask_segments(
    input_ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    rows: NDArray[np.int64],
    seeds: NDArray[np.uint64],
    *,
    fraction: float,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`mask_tokens` of packed texts: the same tokens are chosen and become the same as if the texts were padded.

    input_ids[N] holds S texts of lengths[S] one after another, drawn from (seeds[i], rows[i]); special_ids are never
    chosen. Returns a masked copy [N] and the places of the chosen tokens, int64 [K], in order.
    """
    if rows.shape != lengths.shape or seeds.shape != lengths.shape or input_ids.shape != (int(lengths.sum()),):
        raise ValueError(
            f"input_ids {input_ids.shape} must be [sum of lengths], lengths {lengths.shape}, rows {rows.shape} and "
            f"seeds {seeds.shape} [S]"
        )
    special = _check(fraction, vocab_size, special_ids)
    draws = ragged_uniforms(seeds, rows, lengths)
    selected = np.flatnonzero(draws < fraction)
    selected = selected[~np.isin(input_ids[selected], special_ids)]
    masked_ids = input_ids.copy()
    masked_ids[selected] = _replace(input_ids[selected], draws[selected], fraction, mask_token_id, vocab_size, special)
    return masked_ids, selected


def _check(fraction: float, vocab_size: int, special_ids: Sequence[int]) -> NDArray[np.int64]:
    """The special tokens of the vocabulary, in order."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it must be in [0, 1]")
    # Added special tokens can lie beyond the vocabulary; those cannot be drawn anyway.
    special = np.array(sorted({token for token in special_ids if 0 <= token < vocab_size}), dtype=np.int64)
    if vocab_size <= len(special):
        raise ValueError(f"all {vocab_size} tokens of the vocabulary are special: there is no random token to draw")
    return special


def _replace(
    tokens: NDArray[np.int64],
    draws: NDArray[np.float64],
    fraction: float,
    mask_token_id: int,
    vocab_size: int,
    special: NDArray[np.int64],
) -> NDArray[np.int64]:
    """What becomes of the chosen tokens [K], by the draws [K] under `fraction` that chose them."""
    # Below `fraction`, a draw divided by it is uniform again: one number a token decides all. 53 bits are plenty.
    fates = draws / fraction if fraction else draws
    replaced = tokens.copy()
    replaced[fates < MASK_SHARE] = mask_token_id
    is_random = (fates >= MASK_SHARE) & (fates < MASK_SHARE + RANDOM_SHARE)
    num_ordinary = vocab_size - len(special)
    ranks = ((fates[is_random] - MASK_SHARE) / RANDOM_SHARE * num_ordinary).astype(np.int64)
    ranks = np.minimum(ranks, num_ordinary - 1)  # rounding may reach the end
    # The k-th ordinary token: k plus the number of special tokens below it. Saves listing the vocabulary on each call.
    replaced[is_random] = ranks + np.searchsorted(special - np.arange(len(special)), ranks, side="right")
    return replaced
