"""Compiled encoders on a GPU: a handful of shapes, so that they compile once; and when compiling pays."""

import math
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

# Compiling takes half a minute the first time and seconds from torch's cache after: shorter trainings go without.
LEAST_SECONDS = 60.0
# What uncompiled steps do a second on a Hopper GPU at most: small encoders are bound by launches, not by operations.
EAGER_FLOPS, EAGER_TOKENS = 1.7e14, 1.2e6
# Rows that hold less than a full one shrink by steps of this share of it; those of workers whose share of a step is a
# little more than the mean grow by a finer one.
LESS, MORE = 16, 64


def can_compile(device: torch.device) -> bool:
    """Whether code can be compiled for this device: a GPU that Triton knows, and a C compiler for its launchers."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return device.type == "cuda" and bool(has_triton()) and compiler is not None


def pays(flops: float, num_tokens: int) -> bool:
    """Whether a training of so many operations and tokens on one GPU is long enough to compile for."""
    return max(flops / EAGER_FLOPS, num_tokens / EAGER_TOKENS) > LEAST_SECONDS


def choose_room(num_tokens: int, capacity: int) -> int:
    """Tokens of a row of fixed shape that holds `num_tokens`, where a full one holds `capacity`; a multiple of 128."""
    full = _round_up(capacity)
    step = _round_up(capacity / (LESS if num_tokens <= full else MORE))
    return full + step * math.ceil((num_tokens - full) / step)


def _round_up(num_tokens: float) -> int:
    return 128 * math.ceil(num_tokens / 128)


def _round_norm(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16) if module.training and torch.is_autocast_enabled("cuda") else output


def round_norms(model: nn.Module) -> None:
    """Lets layer norms give bf16 where an encoder trains in it on a GPU: float32 within, half the bytes to move.

    Not that of the embeddings: where norms stand before the layers (ModernBERT) it begins the sum that all layers add
    to, which stays float32.
    """
    for name, module in model.base_model.named_modules():  # type: ignore[union-attr]
        if isinstance(module, nn.LayerNorm) and "embeddings" not in name:
            module.register_forward_hook(_round_norm)


def compile_encoder(model: nn.Module, *, graphs: bool) -> None:
    """Compiles an encoder in place; its names and weights stay. With `graphs` its kernels are replayed as CUDA graphs.

    Inside DistributedDataParallel torch cuts what it compiles at the buckets of gradients, so that some travel between
    workers while others are computed.
    """
    # Of the trials that this process ran before, compiled code and the memory of its graphs would stay.
    torch.compiler.reset()
    torch.cuda.empty_cache()
    # Rows that don't fit the usual room have other shapes; past the limit torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 2 * LESS
    model.base_model.compile(dynamic=False, mode="reduce-overhead" if graphs else None)  # type: ignore[union-attr]
