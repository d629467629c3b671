"""Contrastive losses of batches larger than memory, by gradient caching (Gao et al. 2021, arXiv 2101.06983).

Every chunk passes through the encoder without graph; the loss over all of them, and over all workers, gives the
gradients at their rows; then each chunk passes again, with a graph of its own, which those gradients go back through.
The gradients of the weights are those of the whole batch. It costs another forward pass, and needs memory for a chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raylab.training.dropout import seed_dropout
from raylab.training.encoder import precision
from raylab.training.objectives import Batch, Learner, Totals, contrast_rows, pick_rows


class Cache(NamedTuple):
    """The contrastive loss of a part of a step, and its gradients at the rows of each of a worker's chunks."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def cache_gradients(learner: Learner, chunks: Sequence[Batch], totals: Totals, seeds: Sequence[int]) -> Cache:
    """The first pass, with the dropout of `seeds`, one a chunk. All workers call this together."""
    found = []
    with torch.no_grad(), precision(chunks[0].input_ids.device):
        for batch, seed in zip(chunks, seeds, strict=True):
            seed_dropout(learner.dropout, seed)
            found.append(pick_rows(learner, batch))
    rows = torch.cat(found).requires_grad_()
    categories = torch.cat([batch.categories.index_select(0, batch.known) for batch in chunks])
    loss = contrast_rows(learner, rows, categories, chunks[0].gathered, totals)
    (gradients,) = torch.autograd.grad(loss, rows)
    return Cache(loss.detach(), gradients.split([len(part) for part in found]))
