"""The pre-training objectives: from packed inputs to losses, alike for one worker and for many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raylab.job.blocks import Pretrain
from raylab.training.encoder import project_from
from raylab.training.losses import nt_xent, sup_con
from raylab.training.packing import Layout, encode_packed, pool_segments
from raylab.training.projection import projected_cross_entropy

# Shapes: N tokens, S segments, of which B texts or anchors come first, K selected tokens, D hidden size.


class Batch(NamedTuple):
    """`batches.Inputs` as tensors, the categories int64 [B] of the texts (-1: none), and which texts have one.

    The first `num_tokens` of the row are real; in rows of a fixed shape padding follows, and selected places without a
    target (`projection.NO_TARGET`) follow the masked tokens. `gathered` are the rows of each worker in this part of the
    step, over all its chunks: texts, where there are categories those with one.
    """

    input_ids: Tensor
    positions: Tensor
    layout: Layout
    selected: Tensor
    targets: Tensor
    categories: Tensor
    known: Tensor
    num_tokens: int
    gathered: tuple[int, ...]


class Totals(NamedTuple):
    """Counts over a whole step, all its parts and all workers: what means are taken over.

    `parts` are those that hold a unit. Masked tokens and texts with a category are float32 scalars on the device, which
    need not wait to tell the host.
    """

    selected: Tensor
    categories: Tensor
    parts: int
    workers: int


class GatherRows(torch.autograd.Function):
    """Rows of all workers, in the order of their ranks; `counts` says how many each has, which all of them know.

    Each worker computes the same loss from the gathered rows, and so the same gradients: those of its own rows, times
    the number of workers, are what all would send back, and nobody waits for them. DistributedDataParallel's mean over
    workers then gives the gradient of that one loss.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        """[n, ...] -> [sum of n, ...]."""
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        ctx.start, ctx.count, ctx.workers = sum(counts[: dist.get_rank()]), len(rows), len(counts)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Of this worker's rows."""
        return gradients[0][ctx.start : ctx.start + ctx.count] * ctx.workers, None


def _gather(rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    # All workers know that there is nothing to gather, where there is nothing.
    gathered: Tensor = GatherRows.apply(rows, counts) if len(counts) > 1 and any(counts) else rows
    return gathered


class Learner(nn.Module):
    """An encoder with its masked-language head, and the category head where the objective has one."""

    def __init__(self, encoder: nn.Module, pretrain: Pretrain, num_categories: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pretrain = pretrain
        # The keys of a compiled encoder's dropout; others take torch's random numbers.
        self.dropout: Tensor | None = None
        needs_head = pretrain.objective == "metadata" and pretrain.metadata.loss == "cross_entropy"
        self.head = nn.Linear(encoder.config.hidden_size, num_categories) if needs_head else None  # type: ignore[union-attr, arg-type]

    def forward(self, batch: Batch, totals: Totals, gradients: Tensor | None = None) -> dict[str, Tensor]:
        """This worker's share of each loss: the mean over workers of the sum over parts is the loss of the step.

        `gradients` are those of the contrastive loss at the batch's rows, where it is a chunk of a part: then a sum
        that has these gradients stands for that loss, without its value.
        """
        return OBJECTIVES[self.pretrain.objective](self, batch, totals, gradients)


def _encode(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens [N or more, D], and the means of the segments, float32 [S, D]."""
    hidden = encode_packed(learner.encoder, batch.input_ids, batch.positions, batch.layout)
    return hidden, pool_segments(hidden, batch.layout, batch.num_tokens)


def _mlm_loss(learner: Learner, hidden: Tensor, batch: Batch, totals: Totals) -> dict[str, Tensor]:
    if not learner.pretrain.mlm.weight:
        return {}
    # The head sees the masked tokens alone, its projection a part of them at a time.
    features, projection = project_from(learner.encoder, hidden.index_select(0, batch.selected))
    summed = projected_cross_entropy(features, projection, batch.targets, compiled=learner.dropout is not None)
    return {"mlm": summed * totals.workers / totals.selected.clamp(min=1)}


def _pair_spans(learner: Learner, pooled: Tensor, batch: Batch) -> Tensor:
    """Anchors, each beside the mean of its positives: [S, D] -> [B, 2 D]."""
    num, positives = len(batch.categories), learner.pretrain.declutr.num_positives
    spans = pooled[num : num * (1 + positives)].unflatten(0, (num, positives))
    return torch.cat([pooled[:num], spans.mean(1)], 1)


def _contrast_spans(learner: Learner, rows: Tensor, categories: Tensor, counts: tuple[int, ...]) -> Tensor:
    """NT-Xent of the pairs of all workers; a part has some, for it has units."""
    anchors, positives = _gather(rows, counts).chunk(2, 1)
    return nt_xent(anchors, positives, learner.pretrain.declutr.temperature)


def _pick_known(learner: Learner, pooled: Tensor, batch: Batch) -> Tensor:
    """Embeddings of the texts with a category: [S, D] -> [n, D]."""
    return pooled.index_select(0, batch.known)


def _contrast_known(learner: Learner, rows: Tensor, categories: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Supervised contrastive loss over all workers."""
    points, labels = _gather(rows, counts), _gather(categories, counts)
    return sup_con(points, labels, learner.pretrain.metadata.temperature)


class Contrast(NamedTuple):
    """A contrastive loss in two steps: a batch's rows from its pooled segments, and the loss of all workers' rows.

    Between the two the rows of several chunks can be put together: the loss is one of a whole part of a step.
    """

    pick: Callable[[Learner, Tensor, Batch], Tensor]
    loss: Callable[[Learner, Tensor, Tensor, tuple[int, ...]], Tensor]


CONTRASTS = {"declutr": Contrast(_pair_spans, _contrast_spans), "metadata": Contrast(_pick_known, _contrast_known)}


def pick_rows(learner: Learner, batch: Batch) -> Tensor:
    """A batch's rows of the contrastive loss alone: no loss of its masked tokens."""
    return CONTRASTS[learner.pretrain.objective].pick(learner, _encode(learner, batch)[1], batch)


def contrast_rows(
    learner: Learner, rows: Tensor, categories: Tensor, counts: tuple[int, ...], totals: Totals
) -> Tensor:
    """The contrastive loss of a part of a step from this worker's rows; `counts` are those of all workers."""
    return CONTRASTS[learner.pretrain.objective].loss(learner, rows, categories, counts) / totals.parts


def _contrast(learner: Learner, pooled: Tensor, batch: Batch, totals: Totals, gradients: Tensor | None) -> Tensor:
    rows = CONTRASTS[learner.pretrain.objective].pick(learner, pooled, batch)
    if gradients is not None:
        return (rows * gradients).sum()
    categories = batch.categories.index_select(0, batch.known)
    return contrast_rows(learner, rows, categories, batch.gathered, totals)


def compute_mlm(learner: Learner, batch: Batch, totals: Totals, gradients: Tensor | None) -> dict[str, Tensor]:
    """Cross-entropy of the masked tokens, mean over the tokens of the whole step."""
    hidden = encode_packed(learner.encoder, batch.input_ids, batch.positions, batch.layout)
    return _mlm_loss(learner, hidden, batch, totals)


def compute_declutr(learner: Learner, batch: Batch, totals: Totals, gradients: Tensor | None) -> dict[str, Tensor]:
    """MLM on the anchors, and NT-Xent of the anchors with the mean of their positives over all workers.

    The anchors' masked tokens serve both losses, as in DeCLUTR (arXiv 2006.03659, section 3); the positives, unmasked,
    go through the encoder in the same pass. A single anchor in a part has no negatives, and no contrastive loss.
    """
    hidden, pooled = _encode(learner, batch)
    contrastive = _contrast(learner, pooled, batch, totals, gradients)
    return {**_mlm_loss(learner, hidden, batch, totals), "declutr": contrastive}


def compute_metadata(learner: Learner, batch: Batch, totals: Totals, gradients: Tensor | None) -> dict[str, Tensor]:
    """MLM, and the category from the pooled embedding of the same masked text; no loss where a text has none."""
    hidden, pooled = _encode(learner, batch)
    if learner.head is not None:
        scores = learner.head(_pick_known(learner, pooled, batch)).float()
        summed = F.cross_entropy(scores, batch.categories.index_select(0, batch.known), reduction="sum")
        loss = summed * totals.workers / totals.categories.clamp(min=1)
    else:
        loss = _contrast(learner, pooled, batch, totals, gradients)
    return {**_mlm_loss(learner, hidden, batch, totals), "metadata": loss}


OBJECTIVES: dict[str, Callable[[Learner, Batch, Totals, Tensor | None], dict[str, Tensor]]] = {
    "mlm": compute_mlm,
    "declutr": compute_declutr,
    "metadata": compute_metadata,
}


def is_contrastive(pretrain: Pretrain) -> bool:
    """Whether the objective has a loss that is one of a whole part of a step, not a sum over its texts."""
    return pretrain.objective == "declutr" or (
        pretrain.objective == "metadata" and pretrain.metadata.loss == "supervised_contrastive"
    )


def loss_weights(pretrain: Pretrain) -> dict[str, float]:
    """The weight of each loss in the sum that is minimised."""
    return {
        "mlm": pretrain.mlm.weight,
        "declutr": pretrain.declutr.weight,
        "metadata": pretrain.metadata.weight,
    }
