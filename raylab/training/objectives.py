"""The pre-training objectives: from padded inputs to losses, alike for one worker and for many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raylab.job.blocks import Pretrain
from raylab.training.encoder import encode, pool, predict_tokens
from raylab.training.losses import nt_xent, sup_con

# Shapes: B texts or anchors, T tokens, S selected tokens, M anchors, P positives an anchor, D hidden size.


class Batch(NamedTuple):
    """`batches.Inputs` as tensors, and the categories int64 [B] of the texts (-1: none)."""

    input_ids: Tensor
    attention_mask: Tensor
    selected: Tensor
    targets: Tensor
    positive_ids: Tensor | None
    positive_mask: Tensor | None
    categories: Tensor


class Totals(NamedTuple):
    """Counts over a whole step, all its parts and all workers: what means are taken over."""

    selected: int
    categories: int
    parts: int
    workers: int


class GatherRows(torch.autograd.Function):
    """Rows of all workers, in the order of their ranks; their number may differ.

    The gradient of a worker's rows is the sum of what all workers send back. Where each computes the same loss from
    the gathered rows, DistributedDataParallel's mean over workers then gives the gradient of that one loss.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """[n, ...] -> [sum of n, ...]."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        counts = [int(size) for size in sizes]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        ctx.start, ctx.count = sum(counts[: dist.get_rank()]), len(rows)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum over workers, cut to this worker's rows."""
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count]


def _gather(rows: Tensor, workers: int) -> Tensor:
    gathered: Tensor = GatherRows.apply(rows) if workers > 1 else rows
    return gathered


class Learner(nn.Module):
    """An encoder with its masked-language head, and the category head where the objective has one."""

    def __init__(self, encoder: nn.Module, pretrain: Pretrain, num_categories: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pretrain = pretrain
        needs_head = pretrain.objective == "metadata" and pretrain.metadata.loss == "cross_entropy"
        self.head = nn.Linear(encoder.config.hidden_size, num_categories) if needs_head else None  # type: ignore[union-attr, arg-type]

    def forward(self, batch: Batch, totals: Totals) -> dict[str, Tensor]:
        """This worker's share of each loss: the mean over workers of the sum over parts is the loss of the step."""
        return OBJECTIVES[self.pretrain.objective](self, batch, totals)


def _mlm_loss(learner: Learner, hidden: Tensor, batch: Batch, totals: Totals) -> Tensor:
    logits = predict_tokens(learner.encoder, hidden[batch.selected])
    summed = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return summed * totals.workers / max(totals.selected, 1)


def compute_mlm(learner: Learner, batch: Batch, totals: Totals) -> dict[str, Tensor]:
    """Cross-entropy of the masked tokens, mean over the tokens of the whole step."""
    hidden = encode(learner.encoder, batch.input_ids, batch.attention_mask)
    return {"mlm": _mlm_loss(learner, hidden, batch, totals)}


def compute_declutr(learner: Learner, batch: Batch, totals: Totals) -> dict[str, Tensor]:
    """MLM on the anchors, and NT-Xent of the anchors with the mean of their positives over all workers.

    The anchors' one forward pass, with masked tokens, serves both losses, as in DeCLUTR (arXiv 2006.03659, section 3).
    """
    assert batch.positive_ids is not None
    assert batch.positive_mask is not None
    hidden = encode(learner.encoder, batch.input_ids, batch.attention_mask)
    anchors = pool(hidden, batch.attention_mask)
    spans = pool(encode(learner.encoder, batch.positive_ids, batch.positive_mask), batch.positive_mask)
    positives = spans.view(len(anchors), -1, spans.shape[-1]).mean(1)
    contrastive = nt_xent(
        _gather(anchors, totals.workers),
        _gather(positives, totals.workers),
        learner.pretrain.declutr.temperature,
    )
    return {"mlm": _mlm_loss(learner, hidden, batch, totals), "declutr": contrastive / totals.parts}


def compute_metadata(learner: Learner, batch: Batch, totals: Totals) -> dict[str, Tensor]:
    """MLM, and the category from the pooled embedding of the same masked text; no loss where a text has none."""
    hidden = encode(learner.encoder, batch.input_ids, batch.attention_mask)
    known = batch.categories >= 0
    embeddings, categories = pool(hidden, batch.attention_mask)[known], batch.categories[known]
    if learner.head is not None:
        summed = F.cross_entropy(learner.head(embeddings).float(), categories, reduction="sum")
        loss = summed * totals.workers / max(totals.categories, 1)
    else:
        loss = sup_con(
            _gather(embeddings, totals.workers),
            _gather(categories, totals.workers),
            learner.pretrain.metadata.temperature,
        )
        loss = loss / totals.parts
    return {"mlm": _mlm_loss(learner, hidden, batch, totals), "metadata": loss}


OBJECTIVES: dict[str, Callable[[Learner, Batch, Totals], dict[str, Tensor]]] = {
    "mlm": compute_mlm,
    "declutr": compute_declutr,
    "metadata": compute_metadata,
}


def loss_weights(pretrain: Pretrain) -> dict[str, float]:
    """The weight of each loss in the sum that is minimised."""
    return {
        "mlm": pretrain.mlm.weight,
        "declutr": pretrain.declutr.weight,
        "metadata": pretrain.metadata.weight,
    }
