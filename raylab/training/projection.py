"""The cross-entropy of a projection to a vocabulary, without its logits ever being whole.

The logits of all masked tokens of a large step take more memory than an encoder. Here they live a part at a time, and
what the backward pass needs of them, the gradients, is computed in the forward pass while they are there.

Shapes: K tokens, D hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The target of rows that only fill a batch up to a fixed shape, as in `F.cross_entropy`.
NO_TARGET = -100
# Logits at once: few stay in a processor's cache, many keep a GPU busy.
LOGITS = {"cpu": 2**22, "cuda": 2**26}
# Rows of a projection are filled up to a multiple of this.
ALIGNED = {"cpu": 1, "cuda": 64}


def _compare(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of logits [K, V] and wanted [K], float32; its gradient [K, V] in their type."""
    log_probs = logits.float().log_softmax(1)
    places = wanted[:, None]
    loss = -log_probs.gather(1, places).sum()
    # d loss / d logits: the probabilities, less one at the target.
    gradient = log_probs.exp_().scatter_add_(1, places, -torch.ones_like(places, dtype=torch.float32))
    return loss, gradient.to(logits.dtype)


def _compare_fused(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`_compare` in a form that compiles to two passes over the logits; rows with `NO_TARGET` count nothing."""
    log_probs, places = logits.float().log_softmax(1), wanted[:, None]
    counted = places != NO_TARGET
    loss = -torch.where(counted, log_probs.gather(1, torch.where(counted, places, 0)), 0.0).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == places
    return loss, torch.where(counted, log_probs.exp() - hit.float(), 0.0).to(logits.dtype)


@functools.cache
def _compile() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_compare_fused)


def _compare_compiled(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`_compare` on GPUs: what is made of the logits on the way is several times their size."""
    # No two steps mask as many tokens: one piece of code for all of them.
    for tensor in (logits, wanted):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compile()(logits, wanted)


def _align(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] in a type; on GPUs with rows added that no target has and whose probability is 0.

    A vocabulary such as RoBERTa's 50,265 gives rows of logits that start at odd addresses, which the fast products
    refuse: they were three times slower.
    """
    rows, width = weight.shape
    extra = -rows % ALIGNED[weight.device.type]
    if not extra:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    w, b = weight.new_zeros(rows + extra, width, dtype=dtype), weight.new_full((rows + extra,), -torch.inf, dtype=dtype)
    w[:rows] = weight
    b[:rows] = 0 if bias is None else bias
    return w, b


class _ProjectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compiled: bool
    ) -> Tensor:
        device = features.device.type
        half = torch.is_autocast_enabled(device)
        # Cast once, not with every part.
        with torch.autocast(device, enabled=False):
            dtype = torch.get_autocast_dtype(device) if half else features.dtype
            x, w, b = features.to(dtype), *_align(weight, bias, dtype)
            to_x, to_w, to_b, *_ = ctx.needs_input_grad
            d_x = torch.empty_like(x) if to_x else None
            d_w = torch.zeros(w.shape, dtype=weight.dtype, device=w.device) if to_w else None
            d_b = torch.zeros(len(w), dtype=weight.dtype, device=w.device) if bias is not None and to_b else None
            total = torch.zeros((), device=features.device)
            step = max(1, LOGITS[device] // len(w))
            compare = _compare_compiled if compiled else _compare
            for start in range(0, len(x), step):
                part, wanted = x[start : start + step], targets[start : start + step]
                loss, gradient = compare(F.linear(part, w, b), wanted)
                total += loss
                if d_b is not None:
                    d_b += gradient.sum(0, dtype=d_b.dtype)
                if d_x is not None:
                    torch.mm(gradient, w, out=d_x[start : start + step])
                if d_w is not None and dtype == d_w.dtype:
                    d_w.addmm_(gradient.T, part)
                elif d_w is not None:
                    d_w += gradient.T @ part
        # The rows that were added end here.
        d_w, d_b = (None if part is None else part[: len(weight)] for part in (d_w, d_b))
        ctx.save_for_backward(*(part for part in (d_x, d_w, d_b) if part is not None))
        ctx.kept = [part is not None for part in (d_x, d_w, d_b)]
        ctx.dtype = features.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        d_x, d_w, d_b = (next(saved) * gradients[0] if kept else None for kept in ctx.kept)
        return None if d_x is None else d_x.to(ctx.dtype), d_w, d_b, None, None


def projected_cross_entropy(
    features: Tensor, projection: nn.Linear, targets: Tensor, *, compiled: bool = False
) -> Tensor:
    """The sum of the cross-entropies of projection(features[K, D]) and targets[K], a float32 scalar.

    As `F.cross_entropy(projection(features).float(), targets, reduction="sum")`, also under autocast, with gradients.
    Only where it is `compiled` may targets be `NO_TARGET`.
    """
    loss: Tensor = _ProjectedLoss.apply(features, projection.weight, projection.bias, targets, compiled)
    return loss
