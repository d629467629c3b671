"""Held-out measures of an encoder on validation documents, with masks and spans that are the same for every trial."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.base.noise import derive_seed, uniforms
from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Corpus, Retrieval
from raylab.training.batches import Ints, cut_pieces, pad_rows, slice_piece
from raylab.training.encoder import precision, predict_tokens
from raylab.training.feed import move
from raylab.training.masks import mask_tokens
from raylab.training.packing import encode_packed, fits_kernel, lay_out, pool_segments
from raylab.training.projection import NO_TARGET

# All draws here come from this constant and the document's row: no trial's seed, no arm's settings.
HELD_OUT = derive_seed("held out")
MASK_FRACTION = 0.15
MOST_DOCUMENTS = 1024
SPAN_DRAWS = 2
SHORTEST_SPAN = 4
BATCH = 64


class HeldOut(NamedTuple):
    """Fixed held-out inputs: masked texts, retrieval spans in pools, and categories (-1: none) of the texts.

    masked, mask, targets [N, T] with targets `NO_TARGET` where not selected; anchors and positives are [K, L] ids and
    masks, K = pools x candidates; row i of one belongs to row i of the other.
    """

    masked: Ints
    mask: Ints
    targets: Ints
    anchors: tuple[Ints, Ints] | None
    positives: tuple[Ints, Ints] | None
    candidates: int
    categories: Ints


def _choose(rows: Ints) -> Ints:
    """At most MOST_DOCUMENTS rows, always the same ones of a table, in a fixed random order."""
    order = np.argsort(uniforms(derive_seed(HELD_OUT, "rows"), rows, 1)[:, 0], kind="stable")
    return rows[order[:MOST_DOCUMENTS]]


def cut_spans(tokens: NDArray[np.int32], place: float, retrieval: Retrieval) -> tuple[NDArray[np.int32], ...]:
    """A span of a text and the one that follows it; `place` in [0, 1) says where."""
    span = min(retrieval.span, len(tokens) // 2)
    start = int(place * (len(tokens) - 2 * span + 1))
    return tokens[start : start + span], tokens[start + span : start + 2 * span]


def pair_spans(store: TokenStore, rows: Ints, number: int, retrieval: Retrieval) -> tuple[TokenStore, TokenStore]:
    """Two spans of each of at most `number` of the rows, always the same ones: the first spans and what follows them.

    Rows under 2 x SHORTEST_SPAN tokens are left out.
    """
    chosen = _choose(rows[store.lengths[rows] >= 2 * SHORTEST_SPAN])[:number]
    places = uniforms(derive_seed(HELD_OUT, "aligned spans"), chosen, 1)[:, 0]
    pairs = [
        cut_spans(store.values[store.offsets[row] : store.offsets[row + 1]], place, retrieval)
        for row, place in zip(chosen, places, strict=True)
    ]
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    first, second = (
        TokenStore(
            np.concatenate([np.zeros(0, dtype=np.int32), *side]),
            np.concatenate([[0], np.cumsum([len(span) for span in side], dtype=np.int64)]).astype(np.int64),
        )
        for side in sides
    )
    return first, second


def prepare_heldout(
    store: TokenStore, rows: Ints, categories: Ints | None, vocabulary: Vocabulary, corpus: Corpus, retrieval: Retrieval
) -> HeldOut:
    """Draws the held-out inputs from the validation documents in `rows`; `categories` are those of the whole table."""
    chosen = _choose(rows)
    pieces = cut_pieces(store.lengths, chosen, corpus.max_length, "truncate")
    ids, mask = pad_rows([slice_piece(store, pieces, i) for i in range(len(chosen))], vocabulary)
    masked, selected = mask_tokens(
        ids,
        (mask > 0) & ~np.isin(ids, vocabulary.special_ids),
        chosen,
        derive_seed(HELD_OUT, "masks"),
        fraction=MASK_FRACTION,
        mask_token_id=vocabulary.mask_id,
        vocab_size=vocabulary.size,
        special_ids=vocabulary.special_ids,
    )
    labels = categories[chosen] if categories is not None else np.full(len(chosen), -1)
    long_enough = chosen[store.lengths[chosen] >= 2 * SHORTEST_SPAN]
    candidates = min(retrieval.candidates, len(long_enough))
    anchors, positives = [], []
    for draw in range(SPAN_DRAWS if candidates >= 2 else 0):
        places = uniforms(derive_seed(HELD_OUT, "spans", draw), long_enough, 1)[:, 0]
        # Pools are filled in order; what is left over after the last full pool is not used.
        for row, place in list(zip(long_enough, places, strict=True))[: len(long_enough) // candidates * candidates]:
            anchor, positive = cut_spans(store.values[store.offsets[row] : store.offsets[row + 1]], place, retrieval)
            anchors.append(anchor)
            positives.append(positive)
    return HeldOut(
        masked,
        mask,
        np.where(selected, ids, NO_TARGET),
        pad_rows(anchors, vocabulary) if anchors else None,
        pad_rows(positives, vocabulary) if positives else None,
        candidates,
        labels,
    )


def compute_unigram_entropy(store: TokenStore, train_rows: Ints, held_out: HeldOut, vocabulary: Vocabulary) -> float:
    """Cross-entropy in nats of the held-out masked tokens under the training tokens' unigram law, add-one smoothed.

    What a model that ignores context can reach: a held-out MLM loss above it has learned nothing of language.
    """
    is_train = np.zeros(len(store.lengths), dtype=bool)
    is_train[train_rows] = True
    counts = np.ones(vocabulary.size)
    for start in range(0, len(is_train), 10_000):
        stop = min(start + 10_000, len(is_train))
        values = store.values[store.offsets[start] : store.offsets[stop]]
        kept = values[np.repeat(is_train[start:stop], store.lengths[start:stop])]
        counts += np.bincount(kept, minlength=vocabulary.size)
    targets = held_out.targets[held_out.targets >= 0]
    return float(-np.log(counts[targets] / counts.sum()).mean())


def _encode_rows(encoder: nn.Module, ids: Ints, mask: Ints, half: bool) -> tuple[Tensor, Tensor]:
    """Padded rows through an encoder, packed: hidden states [N, D] of their tokens, and their means [B, D]."""
    device = next(encoder.parameters()).device
    lengths = mask.sum(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    layout = lay_out(offsets, kernel=half and fits_kernel(encoder, device))
    packed = torch.from_numpy(ids[mask > 0]), torch.from_numpy(positions), layout
    inputs, places, layout = move(packed, device)
    with precision(device, half):
        hidden = encode_packed(encoder, inputs, places, layout)
    return hidden, pool_segments(hidden, layout, len(hidden))


def _batches(num: int) -> list[slice]:
    return [slice(start, start + BATCH) for start in range(0, num, BATCH)]


@torch.inference_mode()
def measure_heldout(
    encoder: nn.Module, head: nn.Module | None, held_out: HeldOut, *, masked: bool = True, half: bool = False
) -> dict[str, float]:
    """MLM loss (nats a token) and accuracy (where `masked`), retrieval accuracy, and with a head category accuracy.

    Retrieval: the share of anchors whose own following span is the nearest by cosine among its pool's `candidates`.
    """
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    loss, hits, count, known, right = 0.0, 0, 0, 0, 0
    for here in _batches(len(held_out.masked)) if masked else ():
        hidden, pooled = _encode_rows(encoder, held_out.masked[here], held_out.mask[here], half)
        packed = held_out.targets[here][held_out.mask[here] > 0]
        chosen = torch.from_numpy(np.flatnonzero(packed >= 0)).to(device)
        targets = torch.from_numpy(packed[packed >= 0]).to(device)
        with precision(device, half):
            logits = predict_tokens(encoder, hidden[chosen]).float()
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        hits += int((logits.argmax(1) == targets).sum())
        count += len(targets)
        if head is not None:
            categories = torch.from_numpy(held_out.categories[here]).to(device)
            predicted = head(pooled).argmax(1)
            known += int((categories >= 0).sum())
            right += int(((predicted == categories) & (categories >= 0)).sum())
    measures = {}
    if masked:
        measures = {"heldout_mlm_loss": loss / max(count, 1), "heldout_mlm_accuracy": hits / max(count, 1)}
    if held_out.anchors is not None and held_out.positives is not None:
        sides = [_embed_spans(encoder, *side, half) for side in (held_out.anchors, held_out.positives)]
        pools = [side.reshape(-1, held_out.candidates, side.shape[1]) for side in sides]
        nearest = np.einsum("pad,pbd->pab", *pools).argmax(2)
        measures["heldout_retrieval_accuracy"] = float((nearest == np.arange(held_out.candidates)).mean())
        measures["heldout_retrieval_candidates"] = float(held_out.candidates)
    if known:
        measures["heldout_category_accuracy"] = right / known
    encoder.train(was_training)
    return measures


def _embed_spans(encoder: nn.Module, ids: Ints, mask: Ints, half: bool) -> NDArray[np.float32]:
    """Unit-length embeddings [K, D] of spans."""
    parts = [_encode_rows(encoder, ids[here], mask[here], half)[1] for here in _batches(len(ids))]
    return F.normalize(torch.cat(parts), dim=1).cpu().numpy()
