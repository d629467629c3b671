"""Texts through an encoder without gradients, packed: mean-pooled embeddings, and hidden states at freeze depths."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.data.tokens import TokenStore, Vocabulary
from raylab.training.batches import Ints, Pieces, cut_pieces, pack_segments
from raylab.training.encoder import count_frozen, precision, split_layers
from raylab.training.feed import move
from raylab.training.packing import encode_packed, fits_kernel, lay_out, pool_segments

# Shapes: B pieces of texts, N tokens, D hidden size.

# Tokens that pass through an encoder at once: few stay in a processor's cache, many keep a GPU busy.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


class Passed(NamedTuple):
    """Pieces that went through an encoder, packed one after another: their places, where each begins in the row and
    the row's end [B + 1], pooled [B, D], and states at boundaries [N, D]."""

    batch: Ints
    offsets: Ints
    pooled: NDArray[np.float32]
    states: dict[str, Tensor]


@torch.inference_mode()
def pass_pieces(
    model: nn.Module,
    store: TokenStore,
    pieces: Pieces,
    vocabulary: Vocabulary,
    *,
    batch_tokens: int | None = None,
    boundaries: Sequence[str] = (),
    half: bool = False,
) -> Iterator[Passed]:
    """Runs pieces of texts through an encoder without dropout, longest first; `boundaries` are freeze depths."""
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or BATCH_TOKENS[device.type]
    parts, caught = split_layers(model), {}
    kernel = half and fits_kernel(model, device)  # in bf16 alone

    def catch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            caught[name] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    hooks = []
    for name in boundaries:
        frozen = count_frozen(model, name)
        hooks.append((parts.layers[frozen - 1] if frozen else parts.embeddings).register_forward_hook(catch(name)))
    was_training = model.training
    model.eval()
    try:
        # Texts of like length go together, for kernels that pad; a stable order keeps the numbers the same.
        order = np.argsort(-pieces.length, kind="stable")
        ends = np.cumsum(pieces.length[order] + 2)
        start = 0
        while start < len(order):
            limit = batch_tokens + (ends[start - 1] if start else 0)
            batch = order[start : max(start + 1, int(np.searchsorted(ends, limit, side="right")))]
            start += len(batch)
            first = store.offsets[pieces.row[batch]] + pieces.start[batch]
            ids, positions, offsets = pack_segments(store.values, first, pieces.length[batch], vocabulary)
            packed = torch.from_numpy(ids), torch.from_numpy(positions), lay_out(offsets, kernel=kernel)
            inputs, places, layout = move(packed, device)
            with precision(device, half):
                hidden = encode_packed(model, inputs, places, layout)
            yield Passed(batch, offsets, pool_segments(hidden, layout, len(ids)).cpu().numpy(), dict(caught))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)


class Pooling:
    """Embeddings of texts from their pieces: means over all tokens of all windows."""

    def __init__(self, pieces: Pieces, num: int, width: int) -> None:
        self.owner = pieces.owner
        self.sums, self.tokens = np.zeros((num, width), dtype=np.float32), np.zeros(num, dtype=np.float32)

    def add(self, passed: Passed) -> None:
        """Takes a batch in."""
        weight = np.diff(passed.offsets).astype(np.float32)
        np.add.at(self.sums, self.owner[passed.batch], passed.pooled * weight[:, None])
        np.add.at(self.tokens, self.owner[passed.batch], weight)

    def finish(self) -> NDArray[np.float32]:
        """The embeddings [num, D]."""
        return self.sums / self.tokens[:, None]


def embed(
    model: nn.Module,
    store: TokenStore,
    rows: Ints,
    vocabulary: Vocabulary,
    *,
    max_length: int,
    long_documents: str,
    batch_tokens: int | None = None,
    half: bool = False,
) -> NDArray[np.float32]:
    """Mean-pooled embeddings of the store's `rows`: [len(rows), D] float32. Windows are averaged by their tokens.

    `half`: with products in bf16.
    """
    pieces = cut_pieces(store.lengths, rows, max_length, long_documents)
    config: Any = model.config
    pooling = Pooling(pieces, len(rows), config.hidden_size)
    for passed in pass_pieces(model, store, pieces, vocabulary, batch_tokens=batch_tokens, half=half):
        pooling.add(passed)
    return pooling.finish()
