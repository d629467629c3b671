"""Contrastive losses of pre-training.

Both work in float32, also under autocast: at a temperature of 0.05 half precision would round logits of up to 20 by
more than the differences that matter.

Shapes: M pairs, N points, D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(anchors: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy of anchors[M, D] and positives[M, D], a float32 scalar.

    Chen et al. 2020 (SimCLR, arXiv 2002.05709), equation 1; as used by DeCLUTR, arXiv 2006.03659, section 3.2. Each of
    the 2M points, scaled to unit length, must find its partner among all others:

        mean over i of -log(exp(z_i . z_partner(i) / t) / sum over k != i of exp(z_i . z_k / t))

    Raises ValueError for shapes that differ or are not [M, D], no pairs, or a temperature that is not positive.
    """
    if anchors.ndim != 2 or anchors.shape != positives.shape or not len(anchors):
        raise ValueError(
            f"anchors {tuple(anchors.shape)} and positives {tuple(positives.shape)} must be of one shape [M, D], M >= 1"
        )
    num_pairs = len(anchors)
    with torch.autocast(anchors.device.type, enabled=False):
        # float() before cat: outside autocast, mixed types would be an error or be cut to the smaller one.
        logits = _compute_logits(torch.cat([anchors.float(), positives.float()]), temperature)
        partner = torch.arange(2 * num_pairs, device=logits.device).roll(num_pairs)
        return F.cross_entropy(logits, partner)


def sup_con(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of embeddings[N, D] with labels[N] int64, a float32 scalar.

    Khosla et al. 2020 (arXiv 2004.11362), equation 2, L_out: a point's positives are the others of its label, and the
    mean over positives stands outside the logarithm:

        mean over i of -1 / |P(i)| * sum over p in P(i) of
            log(exp(z_i . z_p / t) / sum over k != i of exp(z_i . z_k / t))

    with z scaled to unit length. The mean is over points that have a positive (the paper sums, and always has one,
    since it pairs two views of each image); without any such point the loss is zero, with zero gradients.

    Raises ValueError for shapes that do not fit or a temperature that is not positive.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings {tuple(embeddings.shape)} must be [N, D] and labels {tuple(labels.shape)} [N]")
    with torch.autocast(embeddings.device.type, enabled=False):
        log_probs = _compute_logits(embeddings.float(), temperature).log_softmax(dim=1)
        is_positive = (labels[:, None] == labels).fill_diagonal_(False)
        num_positives = is_positive.sum(dim=1)
        # Counts are clamped instead of rows dropped: dropping would make the GPU wait for the host to learn the shape.
        losses = -log_probs.masked_fill(~is_positive, 0.0).sum(dim=1) / num_positives.clamp(min=1)
        return losses.sum() / (num_positives > 0).sum().clamp(min=1)


def _compute_logits(points: Tensor, temperature: float) -> Tensor:
    """Cosines of points[N, D] with each other over the temperature, [N, N], -inf on the diagonal."""
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    points = F.normalize(points, dim=1)
    logits = points @ points.T / temperature
    return logits.masked_fill(torch.eye(len(points), dtype=torch.bool, device=points.device), -torch.inf)
