"""Dropout on GPUs whose mask is a short hash of a seed and the place: a fifth of a random generator's arithmetic.

In a compiled step dropout is fused with what is around it, and its random numbers are then most of the cost. Masks are
a function of the seed alone, so that a pass can be repeated with the same ones.
"""

import numpy as np
import torch
from torch import Tensor, nn

# The mixing steps of "lowbias32" (Wellons 2018, "Prospecting for hash functions"), here with a second key in between.
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B - 2**32


def _shift(words: Tensor, num: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return (words >> num) & (2 ** (32 - num) - 1)


def hash_places(num: int, keys: Tensor) -> Tensor:
    """31 bits for each of `num` places, int32 [num]; keys int32 [2]."""
    words = torch.arange(num, dtype=torch.int32, device=keys.device) ^ keys[0]
    words = (words ^ _shift(words, 16)) * MULTIPLIER_1 ^ keys[1]
    words = (words ^ _shift(words, 15)) * MULTIPLIER_2
    return (words ^ _shift(words, 16)) & (2**31 - 1)


class HashedDropout(nn.Module):
    """`nn.Dropout` with masks by `hash_places`, from keys int32 [2]."""

    keys: Tensor

    def __init__(self, p: float, keys: Tensor) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("keys", keys, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape of under 2^31 values."""
        if not self.training or not self.p:
            return x
        kept = hash_places(x.numel(), self.keys).view(x.shape) >= round(self.p * 2**31)
        return torch.where(kept, x * (1 / (1 - self.p)), 0.0)


def replace_dropout(model: nn.Module) -> Tensor:
    """Puts hashed dropout in place of a model's; returns the keys of all, int32 [num, 2], to be set before a pass."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    keys = torch.zeros(len(found), 2, dtype=torch.int32, device=next(model.parameters()).device)
    for index, (parent, name, child) in enumerate(found):
        hashed = HashedDropout(child.p, keys[index])
        hashed.train(child.training)
        setattr(parent, name, hashed)
    return keys


def draw_keys(seed: int, num: int) -> Tensor:
    """Keys from a seed, int32 [num, 2]."""
    words = np.random.default_rng(seed).integers(0, 2**32, (num, 2), dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def seed_dropout(keys: Tensor | None, seed: int) -> None:
    """Decides the next pass's dropout: torch's own, and the hashed one of `keys`."""
    torch.manual_seed(seed)
    if keys is not None:
        drawn = draw_keys(seed, len(keys))
        keys.copy_(drawn.pin_memory() if keys.is_cuda else drawn, non_blocking=True)
