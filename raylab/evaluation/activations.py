"""Hidden states at freeze depths: computed once an encoder in one pass, kept as memory-mapped half precision."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Corpus
from raylab.store.stages import Stage, build_stage, prune_stage
from raylab.training.batches import Ints, cut_pieces, slice_piece
from raylab.training.embedding import Pooling, pass_pieces
from raylab.training.encoder import is_half, name_precision, split_layers

# Files of a stage of activations that pruning takes; they are made again where they are needed.
STATES = "states-"
# A larger stage is pruned as soon as its evaluation is done, others when the job is.
KEPT_BYTES = 2**30


class Texts(NamedTuple):
    """Texts as they enter the layers that are trained: text i is the pieces first[i] to first[i + 1] - 1.

    first int64 [n + 1]; length int64 [P], tokens of a piece, special ones included; `slice(p)` gives the token ids of
    a piece, int64 [T], or its hidden states at the boundary, float [T, D].
    """

    first: Ints
    length: Ints
    slice: Callable[[int], NDArray[Any]]


def open_texts(store: TokenStore, rows: Ints, vocabulary: Vocabulary, corpus: Corpus) -> Texts:
    """Texts as token ids, special ones around: for encoders of which nothing is frozen."""
    pieces = cut_pieces(store.lengths, rows, corpus.max_length, corpus.long_documents)

    def cut(index: int) -> NDArray[Any]:
        inner = slice_piece(store, pieces, index)
        return np.concatenate([[vocabulary.prefix_id], inner, [vocabulary.suffix_id]]).astype(np.int64)

    return Texts(_first(pieces.owner, len(rows)), pieces.length + 2, cut)


def open_states(folder: Path, depth: str) -> Texts:
    """Texts as their kept hidden states at a freeze depth."""
    values = np.load(folder / f"{STATES}{depth}.npy", mmap_mode="r")
    first, length = np.load(folder / "first.npy"), np.load(folder / "length.npy")
    offsets = np.concatenate([[0], np.cumsum(length)])
    return Texts(first, length, lambda index: values[offsets[index] : offsets[index + 1]])


def join_texts(one: Texts, other: Texts) -> Texts:
    """Some texts and behind them others, as one list."""
    count = len(one.length)
    return Texts(
        np.concatenate([one.first, other.first[1:] + count]),
        np.concatenate([one.length, other.length]),
        lambda index: one.slice(index) if index < count else other.slice(index - count),
    )


def _first(owner: Ints, num: int) -> Ints:
    return np.searchsorted(owner, np.arange(num + 1)).astype(np.int64)


def keep_states(
    results: Path,
    key: dict[str, Any],
    model: Callable[[], nn.Module],
    store: TokenStore,
    rows: Ints,
    vocabulary: Vocabulary,
    corpus: Corpus,
    depths: Sequence[str],
    asked: str = "float32",
) -> Stage:
    """The hidden states of some rows at each of `depths`, and their embeddings, from one pass; kept by content.

    A depth beyond the encoder's layers is left out: another arm may ask for it, and is told.

    states-DEPTH.npy float16 [T, D] (float32 where a value does not fit), all tokens of the rows' pieces one behind the
    other; first.npy and length.npy say where; embeddings.npy float32 [len(rows), D]. `asked` is `evaluate.precision`.
    """

    def build(folder: Path) -> dict[str, Any]:
        encoder = model()
        half = is_half(asked, encoder)
        config: Any = encoder.config
        layers = len(split_layers(encoder).layers)
        boundaries = [depth for depth in depths if not depth.isdigit() or int(depth) <= layers]
        pieces = cut_pieces(store.lengths, rows, corpus.max_length, corpus.long_documents)
        length = pieces.length + 2
        offsets = np.concatenate([[0], np.cumsum(length)])
        np.save(folder / "first.npy", _first(pieces.owner, len(rows)))
        np.save(folder / "length.npy", length)
        files: dict[str, Any] = {}
        wanted = boundaries
        # Each depth by itself: what else is asked for beside it must not decide its precision.
        for kind in (np.float16, np.float32):
            shape = (int(offsets[-1]), config.hidden_size)
            files |= {
                name: np.lib.format.open_memmap(folder / f"{STATES}{name}.npy", "w+", kind, shape) for name in wanted
            }
            pooling, largest = Pooling(pieces, len(rows), config.hidden_size), dict.fromkeys(wanted, 0.0)
            passing = pass_pieces(encoder, store, pieces, vocabulary, boundaries=wanted, half=half)
            for passed in passing:
                pooling.add(passed)
                for name, states in passed.states.items():
                    largest[name] = max(largest[name], float(states.abs().max()))
                    values = states.to(torch.float32).cpu().numpy()
                    for index, begin, end in zip(passed.batch, passed.offsets, passed.offsets[1:], strict=False):
                        with np.errstate(over="ignore"):
                            files[name][offsets[index] : offsets[index + 1]] = values[begin:end]
            wanted = [name for name in wanted if largest[name] >= float(np.finfo(np.float16).max)]
            if not wanted:
                break
        for file in files.values():
            file.flush()
        np.save(folder / "embeddings.npy", pooling.finish())
        return {
            "rows": len(rows),
            "bytes": sum(file.nbytes for file in files.values()),
            "precision": name_precision(half),
        }

    key = {**key, "boundaries": list(depths)}
    return build_stage(results, "activations", key, build, needs=STATES)


def prune_states(results: Path, stage_id: str) -> int:
    """Deletes the hidden states of a stage; returns the bytes freed."""
    return prune_stage(results, stage_id, (STATES,))
