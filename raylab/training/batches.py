"""Batches: the units that a training draws from, and their packed inputs. All of it NumPy, no state.

Every draw depends on the seed, the epoch and the row alone: a unit's inputs are the same in any batch, of any worker.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylab.base.mistakes import InfeasibleError
from raylab.base.noise import derive_seed
from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Corpus, Declutr, Pretrain
from raylab.training.masks import mask_segments
from raylab.training.spans import Spans, effective_spans, sample_spans

Ints = NDArray[np.int64]
# Above any text in tokens: a piece is named by its row and first token, so that other rows change no mask of it.
LONGEST_TEXT = 2**32


class Inputs(NamedTuple):
    """What one forward pass takes: S segments packed one after another, N tokens with special ones around each.

    The first B segments are the texts or anchors, some of their tokens masked; the rest are the positives of the first
    anchor, of the second, and so on (declutr). input_ids int64 [N]; positions int64 [N], places in the segments;
    segment i is offsets[i]:offsets[i + 1], int64 [S + 1]; selected int64 [K], the places of the masked tokens, and
    targets int64 [K], what they were; rows int64 [B], the documents' rows.
    """

    input_ids: Ints
    positions: Ints
    offsets: Ints
    selected: Ints
    targets: Ints
    rows: Ints


class Units(NamedTuple):
    """What a training run draws from: pieces of texts (mlm, metadata) or whole documents (declutr).

    A unit gives `texts` texts or anchors; no segment has more than `longest` tokens; `row` int64 [num] are the
    documents' rows. `cost(epoch, units)` gives the tokens that each unit brings into the encoder, `build(epochs,
    units)` their inputs. `nothing` are the inputs of a worker that has no unit, but must take part: an empty text that
    counts nowhere.
    """

    num: int
    texts: int
    longest: int
    row: Ints
    cost: Callable[[int, Ints], Ints]
    build: Callable[[Ints, Ints], Inputs]
    nothing: Inputs


def pad_rows(rows: Sequence[NDArray[np.int32]], vocabulary: Vocabulary) -> tuple[Ints, Ints]:
    """Token rows with special tokens around, padded on the right: input ids and attention mask, both [B, T]."""
    lengths = np.array([len(row) + 2 for row in rows])
    ids = np.full((len(rows), int(lengths.max())), vocabulary.pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, 0] = vocabulary.prefix_id
        ids[index, 1 : len(row) + 1] = row
        ids[index, len(row) + 1] = vocabulary.suffix_id
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return ids, mask


def pack_segments(
    values: NDArray[np.int32], first: Ints, length: Ints, vocabulary: Vocabulary
) -> tuple[Ints, Ints, Ints]:
    """The slices values[first:first + length], first and length [S], with special tokens around, one after another.

    Returns ids [N], each one's place in its segment [N], and the segments' offsets [S + 1].
    """
    offsets = np.concatenate([[0], np.cumsum(length + 2)])
    starts = np.repeat(offsets[:-1], length + 2)
    positions = np.arange(offsets[-1]) - starts
    # Special tokens stand where a slice's neighbours would: clipped at the ends of `values`, and overwritten.
    ids = np.take(values, positions + np.repeat(first - 1, length + 2), mode="clip").astype(np.int64)
    ids[offsets[:-1]] = vocabulary.prefix_id
    ids[offsets[1:] - 1] = vocabulary.suffix_id
    return ids, positions, offsets


class Pieces(NamedTuple):
    """The parts of texts that enter the encoder, int64 [N]: place in the list of rows, row, first token, tokens."""

    owner: Ints
    row: Ints
    start: Ints
    length: Ints


def cut_pieces(lengths: Ints, rows: Ints, max_length: int, long_documents: str) -> Pieces:
    """One piece a text (truncate) or as many as hold it (windows); `max_length` counts the two special tokens."""
    longest = max_length - 2
    if long_documents == "truncate":
        return Pieces(np.arange(len(rows)), rows, np.zeros_like(rows), np.minimum(lengths[rows], longest))
    counts = np.maximum(1, -(-lengths[rows] // longest))
    owner = np.repeat(np.arange(len(rows)), counts)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * longest
    return Pieces(owner, rows[owner], start, np.minimum(lengths[rows[owner]] - start, longest))


def slice_piece(store: TokenStore, pieces: Pieces, index: int) -> NDArray[np.int32]:
    """The tokens of one piece."""
    start = store.offsets[pieces.row[index]] + pieces.start[index]
    return store.values[start : start + pieces.length[index]]


def _mask_texts(
    packed: tuple[Ints, Ints, Ints],
    rows: Ints,
    keys: Ints,
    epochs: Ints,
    seed: int,
    fraction: float,
    vocabulary: Vocabulary,
) -> Inputs:
    """Inputs whose first len(rows) segments are masked, by keys and epochs [len(rows)]: each epoch has other masks."""
    ids, positions, offsets = packed
    seen, which = np.unique(epochs, return_inverse=True)
    seeds = np.array([derive_seed(seed, "masks", int(epoch)) for epoch in seen], dtype=np.uint64)
    texts = ids[: offsets[len(rows)]]
    masked, selected = mask_segments(
        texts,
        np.diff(offsets[: len(rows) + 1]),
        keys,
        seeds[which],
        fraction=fraction,
        mask_token_id=vocabulary.mask_id,
        vocab_size=vocabulary.size,
        special_ids=vocabulary.special_ids,
    )
    targets = texts[selected]
    texts[:] = masked
    return Inputs(ids, positions, offsets, selected, targets, rows)


def _build_nothing(vocabulary: Vocabulary) -> Inputs:
    none = np.zeros(0, dtype=np.int64)
    empty = pack_segments(np.zeros(1, dtype=np.int32), np.zeros(1, int), np.zeros(1, int), vocabulary)
    return Inputs(*empty, none, none, none)


def piece_units(
    store: TokenStore, rows: Ints, vocabulary: Vocabulary, corpus: Corpus, pretrain: Pretrain, seed: int
) -> Units:
    """Units of the mlm and metadata objectives: the pieces of the documents in `rows`, masked."""
    pieces = cut_pieces(store.lengths, rows, corpus.max_length, corpus.long_documents)

    def cost(epoch: int, units: Ints) -> Ints:
        return pieces.length[units] + 2

    def build(epochs: Ints, units: Ints) -> Inputs:
        rows, start = pieces.row[units], pieces.start[units]
        packed = pack_segments(store.values, store.offsets[rows] + start, pieces.length[units], vocabulary)
        keys = rows * LONGEST_TEXT + start
        return _mask_texts(packed, rows, keys, epochs, seed, pretrain.mlm.mask_fraction, vocabulary)

    return Units(len(pieces.row), 1, corpus.max_length, pieces.row, cost, build, _build_nothing(vocabulary))


def keep_documents(lengths: Ints, declutr: Declutr) -> NDArray[np.bool_]:
    """Which documents of lengths[N] tokens the spans can use. Raises InfeasibleError where none may be short."""
    floor = declutr.min_document_length or declutr.shortest_document()
    kept = lengths >= floor
    if declutr.short_documents == "refuse" and not kept.all():
        raise InfeasibleError(
            f"pretrain.declutr: {int((~kept).sum())} of {len(lengths)} documents have under {floor} tokens; "
            "use short_documents drop or shrink, or shorter spans"
        )
    if not kept.any():
        raise InfeasibleError(
            f"pretrain.declutr: no document has {floor} tokens, which these spans need; use shorter spans"
        )
    return kept


def span_units(
    store: TokenStore, rows: Ints, vocabulary: Vocabulary, corpus: Corpus, pretrain: Pretrain, seed: int
) -> Units:
    """Units of the declutr objective: the documents in `rows` that are long enough; anchors are masked."""
    declutr = pretrain.declutr
    rows = rows[keep_documents(store.lengths[rows], declutr)]
    lengths = store.lengths[rows]

    def draw(epoch: int, units: Ints) -> Spans:
        return sample_spans(
            lengths[units],
            rows[units],
            derive_seed(seed, "spans", epoch),
            num_anchors=declutr.num_anchors,
            num_positives=declutr.num_positives,
            max_span=declutr.max_span,
            min_span=declutr.min_span,
            sampling=declutr.sampling,
        )

    def cost(epoch: int, units: Ints) -> Ints:
        spans = draw(epoch, units)
        special = 2 * declutr.num_anchors * (1 + declutr.num_positives)
        return spans.anchor_length.sum(1) + spans.positive_length.sum((1, 2)) + special

    def build(epochs: Ints, units: Ints) -> Inputs:
        parts = [draw(int(epoch), units[epochs == epoch]) for epoch in np.unique(epochs)]
        spans = Spans(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        # Units come epoch by epoch, so the parts are in the units' order.
        begin = store.offsets[rows[units]]
        anchors = (begin[:, None] + spans.anchor_start).ravel()
        positives = (begin[:, None, None] + spans.positive_start).ravel()
        tokens = np.concatenate([spans.anchor_length.ravel(), spans.positive_length.ravel()])
        packed = pack_segments(store.values, np.concatenate([anchors, positives]), tokens, vocabulary)
        owners, slots = np.repeat(rows[units], declutr.num_anchors), np.arange(len(anchors)) % declutr.num_anchors
        keys = owners * declutr.num_anchors + slots
        shown = np.repeat(epochs, declutr.num_anchors)
        return _mask_texts(packed, owners, keys, shown, seed, pretrain.mlm.mask_fraction, vocabulary)

    longest = declutr.max_span + 2
    return Units(len(rows), declutr.num_anchors, longest, rows, cost, build, _build_nothing(vocabulary))


UNITS = {"mlm": piece_units, "metadata": piece_units, "declutr": span_units}


def describe_spans(lengths: Ints, declutr: Declutr) -> dict[str, float]:
    """What a span setting makes of documents of lengths[N] tokens: share and number kept, median and least span."""
    kept = lengths >= (declutr.min_document_length or declutr.shortest_document())
    spans = effective_spans(lengths[kept], declutr.num_anchors, declutr.max_span)
    return {
        "documents": int(kept.sum()),
        "share": float(kept.mean()) if len(kept) else 0.0,
        "shrunk": int((spans < declutr.max_span).sum()),
        "median_max_span": float(np.median(spans)) if len(spans) else 0.0,
        "mean_max_span": float(spans.mean()) if len(spans) else 0.0,
    }
