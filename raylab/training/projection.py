"""The cross-entropy of a projection to a vocabulary, without its logits ever being whole.

The logits of all masked tokens of a large step take more memory than an encoder. Here they live a part at a time, and
what the backward pass needs of them, the gradients, is computed in the forward pass while they are there.

Shapes: K tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits at once: few stay in a processor's cache, many keep a GPU busy.
LOGITS = {"cpu": 2**22, "cuda": 2**26}


class _ProjectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        device = features.device.type
        half = torch.is_autocast_enabled(device)
        # Cast once, not with every part.
        with torch.autocast(device, enabled=False):
            dtype = torch.get_autocast_dtype(device) if half else features.dtype
            x, w = features.to(dtype), weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            to_x, to_w, to_b, _ = ctx.needs_input_grad
            d_x = torch.empty_like(x) if to_x else None
            d_w = torch.zeros_like(weight) if to_w else None
            d_b = torch.zeros_like(bias) if bias is not None and to_b else None
            total = torch.zeros((), device=features.device)
            step = max(1, LOGITS[device] // len(weight))
            for start in range(0, len(x), step):
                part, wanted = x[start : start + step], targets[start : start + step, None]
                log_probs = F.linear(part, w, b).float().log_softmax(1)
                total -= log_probs.gather(1, wanted).sum()
                # d loss / d logits: the probabilities, less one at the target.
                gradient = log_probs.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=torch.float32))
                if d_b is not None:
                    d_b += gradient.sum(0)
                gradient = gradient.to(dtype)
                if d_x is not None:
                    torch.mm(gradient, w, out=d_x[start : start + step])
                if d_w is not None and dtype == d_w.dtype:
                    d_w.addmm_(gradient.T, part)
                elif d_w is not None:
                    d_w += gradient.T @ part
        ctx.save_for_backward(*(part for part in (d_x, d_w, d_b) if part is not None))
        ctx.kept = [part is not None for part in (d_x, d_w, d_b)]
        ctx.dtype = features.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        d_x, d_w, d_b = (next(saved) * gradients[0] if kept else None for kept in ctx.kept)
        return None if d_x is None else d_x.to(ctx.dtype), d_w, d_b, None


def projected_cross_entropy(features: Tensor, projection: nn.Linear, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies of projection(features[K, D]) and targets[K], a float32 scalar.

    As `F.cross_entropy(projection(features).float(), targets, reduction="sum")`, also under autocast, with gradients.
    """
    loss: Tensor = _ProjectedLoss.apply(features, projection.weight, projection.bias, targets)
    return loss
