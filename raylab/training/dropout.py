"""Dropout at the speed of what it stands between, where torch's own takes longer than that.

On GPUs its mask is a short hash of a seed and the place: a fifth of a random generator's arithmetic. In a compiled step
dropout is fused with what is around it, and its random numbers are then most of the cost. On processors it takes a
quarter of torch's random numbers. Masks are a function of the seed alone, so that a pass can be repeated with the same
ones.
"""

import numpy as np
import torch
from torch import Tensor, nn

# The mixing steps of "lowbias32" (Wellons 2018, "Prospecting for hash functions"), here with a second key in between.
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B - 2**32
# On processors a unit is dropped by 16 random bits: probabilities are multiples of this share.
LEVELS = 2**16


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
    if keys is None or not keys.is_cuda:
        torch.manual_seed(seed)
    else:
        # Not for every kind of device that torch knows: of those that aren't there it keeps each call and its stack.
        torch.cuda.manual_seed(seed)
    if keys is not None:
        drawn = draw_keys(seed, len(keys))
        keys.copy_(drawn.pin_memory() if keys.is_cuda else drawn, non_blocking=True)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` on a processor, from a quarter of the random numbers and in a sixth of the time."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; drawn from torch's generator, in one order for any number of threads."""
        dropped = round(self.p * LEVELS)
        if not self.training or not 0 < dropped < LEVELS:
            return super().forward(input)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: input.numel()].view(input.shape) >= dropped - LEVELS // 2
        return (input * kept).mul_(LEVELS / (LEVELS - dropped))


def quicken(model: nn.Module) -> None:
    """Puts QuickDropout in place of a model's dropout where the model is on a processor."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        return
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, QuickDropout(child.p).train(child.training))
