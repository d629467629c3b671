"""Batches: the order of the data, steps of a fixed number of tokens, and padded inputs. All of it NumPy, no state.

Every draw depends on the seed, the epoch and the row alone, so a place in the data is two numbers, and the batch is
the same however many workers share it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylab.base.mistakes import InfeasibleError
from raylab.base.noise import derive_seed
from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Corpus, Declutr, Pretrain
from raylab.training.masks import mask_tokens
from raylab.training.spans import Spans, effective_spans, sample_spans

Ints = NDArray[np.int64]
LOOKAHEAD = 64
# Above any text in tokens: a piece is named by its row and first token, so that other rows change no mask of it.
LONGEST_TEXT = 2**32


class Place(NamedTuple):
    """Where the data stand: the next unit is the `position`-th of the epoch's order."""

    epoch: int
    position: int


class Step(NamedTuple):
    """The units of one optimiser step, with the epoch that each is drawn in, both int64 [U], and its tokens."""

    units: Ints
    epochs: Ints
    num_tokens: int
    after: Place


class Inputs(NamedTuple):
    """What one forward pass takes, padded on the right. B texts or anchors, M anchors of P positives each.

    input_ids, attention_mask int64 [B, T]; selected bool [B, T] marks the masked tokens, targets int64 [S] holds what
    they were; positive_ids, positive_mask [M * P, T2] (declutr, else None); rows int64 [B], the documents' rows.
    """

    input_ids: Ints
    attention_mask: Ints
    selected: NDArray[np.bool_]
    targets: Ints
    positive_ids: Ints | None
    positive_mask: Ints | None
    rows: Ints


class Units(NamedTuple):
    """What a training run draws from: pieces of texts (mlm, metadata) or whole documents (declutr).

    `cost(epoch, units)` gives the tokens that each unit brings into the encoder, `build(epochs, units)` their inputs.
    """

    num: int
    row: Ints
    cost: Callable[[int, Ints], Ints]
    build: Callable[[Ints, Ints], Inputs]


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


def iterate_steps(units: Units, batch_tokens: int, seed: int, place: Place) -> Iterator[Step]:
    """Steps without end from `place` on: each takes units in the epoch's order until it holds `batch_tokens`.

    An epoch's order is a permutation from (seed, epoch). A step may run over the end of an epoch.
    """
    epoch, position = place

    def shuffle(epoch: int) -> Ints:
        return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(units.num)

    order = shuffle(epoch)
    while True:
        taken: list[Ints] = []
        epochs: list[Ints] = []
        tokens = 0
        while tokens < batch_tokens:
            ahead = order[position : position + LOOKAHEAD]
            running = np.cumsum(units.cost(epoch, ahead))
            count = min(int(np.searchsorted(running, batch_tokens - tokens)) + 1, len(ahead))
            taken.append(ahead[:count])
            epochs.append(np.full(count, epoch))
            tokens += int(running[count - 1])
            position += count
            if position >= units.num:
                epoch, position = epoch + 1, 0
                order = shuffle(epoch)
        yield Step(np.concatenate(taken), np.concatenate(epochs), tokens, Place(epoch, position))


def _mask(
    ids: Ints, mask: Ints, keys: Ints, seed: int, fraction: float, vocabulary: Vocabulary
) -> tuple[Ints, NDArray[np.bool_]]:
    maskable = (mask > 0) & ~np.isin(ids, vocabulary.special_ids)
    masked, selected = mask_tokens(
        ids,
        maskable,
        keys,
        seed,
        fraction=fraction,
        mask_token_id=vocabulary.mask_id,
        vocab_size=vocabulary.size,
        special_ids=vocabulary.special_ids,
    )
    return masked, selected


def _mask_by_epoch(
    ids: Ints, mask: Ints, keys: Ints, epochs: Ints, seed: int, fraction: float, vocabulary: Vocabulary
) -> tuple[Ints, NDArray[np.bool_]]:
    """`mask_tokens` with another seed each epoch: the masks are dynamic."""
    masked, selected = ids.copy(), np.zeros(ids.shape, dtype=bool)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        masked[here], selected[here] = _mask(
            ids[here], mask[here], keys[here], derive_seed(seed, "masks", int(epoch)), fraction, vocabulary
        )
    return masked, selected


def piece_units(
    store: TokenStore, rows: Ints, vocabulary: Vocabulary, corpus: Corpus, pretrain: Pretrain, seed: int
) -> Units:
    """Units of the mlm and metadata objectives: the pieces of the documents in `rows`, masked."""
    pieces = cut_pieces(store.lengths, rows, corpus.max_length, corpus.long_documents)

    def cost(epoch: int, units: Ints) -> Ints:
        return pieces.length[units] + 2

    def build(epochs: Ints, units: Ints) -> Inputs:
        ids, mask = pad_rows([slice_piece(store, pieces, int(unit)) for unit in units], vocabulary)
        keys = pieces.row[units] * LONGEST_TEXT + pieces.start[units]
        masked, selected = _mask_by_epoch(ids, mask, keys, epochs, seed, pretrain.mlm.mask_fraction, vocabulary)
        return Inputs(masked, mask, selected, ids[selected], None, None, pieces.row[units])

    return Units(len(pieces.row), pieces.row, cost, build)


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

    def cut(begin: Ints, start: Ints, length: Ints) -> tuple[Ints, Ints]:
        first = (begin.reshape(-1, *[1] * (start.ndim - 1)) + start).ravel()
        return pad_rows(
            [store.values[f : f + n] for f, n in zip(first, length.ravel(), strict=True)],
            vocabulary,
        )

    def build(epochs: Ints, units: Ints) -> Inputs:
        parts = [draw(int(epoch), units[epochs == epoch]) for epoch in np.unique(epochs)]
        spans = Spans(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        # Units come epoch by epoch, so the parts are in the units' order.
        begin = store.offsets[rows[units]]
        ids, mask = cut(begin, spans.anchor_start, spans.anchor_length)
        positive_ids, positive_mask = cut(begin, spans.positive_start, spans.positive_length)
        anchors = np.arange(declutr.num_anchors)
        keys = (rows[units][:, None] * declutr.num_anchors + anchors).ravel()
        masked, selected = _mask_by_epoch(
            ids, mask, keys, np.repeat(epochs, declutr.num_anchors), seed, pretrain.mlm.mask_fraction, vocabulary
        )
        owners = np.repeat(rows[units], declutr.num_anchors)
        return Inputs(masked, mask, selected, ids[selected], positive_ids, positive_mask, owners)

    return Units(len(rows), rows, cost, build)


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
