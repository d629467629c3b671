"""How fast training runs: the FLOPs that a batch needs, a device's matrix peak, and the share of it that is used."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raylab.base.memory import start_lap
from raylab.training.batches import Inputs
from raylab.training.objectives import Learner

# Rows and columns of the matrices that are multiplied for the peak, and how often.
PEAK_SIZES, PEAK_REPEATS = {"cpu": 1024, "cuda": 8192}, {"cpu": 5, "cuda": 12}


def describe_speed(spent: Mapping[str, float]) -> dict[str, float]:
    """What a point of the curves tells of the time since the one before, over all workers.

    `spent`: seconds in the loop (evaluating and saving are outside it), tokens, `needed` FLOPs (`flop_counter`), slots
    that passed through the layers and through attention, memory (bytes, the worker's that took most) and the workers'
    peaks in FLOPs a second. Model FLOP utilisation is needed / (seconds * peak), which leaves out what padding and
    recomputing cost (Chowdhery et al., arXiv 2204.02311, appendix B), here of a peak that was measured.
    """
    return {
        "tokens_per_second": spent["tokens"] / spent["seconds"],
        "mfu": spent["needed"] / (spent["seconds"] * spent["peak"]),
        "padding": 1 - spent["tokens"] / spent["slots"],
        "attention_padding": 1 - spent["tokens"] / spent["attended"],
        "peak_memory_gb": spent["memory"] / 1e9,
    }


def count_weights(learner: Learner) -> int:
    """Weights of the matrices of an encoder's layers: what each token is multiplied with."""
    base = cast(nn.Module, learner.encoder.base_model)
    outside = ("embeddings", "pooler")
    return sum(p.numel() for name, p in base.named_parameters() if p.ndim > 1 and not name.startswith(outside))


def flop_counter(learner: Learner) -> Callable[[Inputs], float]:
    """Floating-point operations that a batch needs, forward and backward: no padding, nothing computed twice.

    A token costs 2 x the weights of the layers' matrices and, in attention, 4 x hidden size for each token that it
    sees in each layer; a masked token 2 x the weights of the masked-language head more, the projection to the
    vocabulary included; backward twice as much (Kaplan et al., arXiv 2001.08361, 2.1; the attention term as in
    Chowdhery et al., arXiv 2204.02311, appendix B). Embeddings are looked up. Category head and contrastive loss,
    norms and activations, well under a hundredth, are left out.
    """
    model: nn.Module = learner.encoder
    config: Any = model.config
    base = cast(nn.Module, model.base_model)
    body = count_weights(learner)
    projection: Any = cast(Any, model).get_output_embeddings()
    known = {id(p) for p in (*base.parameters(), projection.weight)}
    head = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in known) + projection.weight.numel()
    windows = list_windows(config)

    def count(inputs: Inputs) -> float:
        lengths = np.diff(inputs.offsets).astype(float)
        seen = sum(_count_pairs(lengths, window) * layers for window, layers in windows.items())
        forward = 2.0 * body * lengths.sum() + 4.0 * config.hidden_size * seen
        return float(3 * (forward + 2.0 * head * len(inputs.targets)))

    return count


def list_windows(config: Any) -> dict[int | None, int]:
    """How far a token sees to either side (None: the whole text), and in how many layers."""
    # ModernBERT alone has layers of both kinds.
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    local = sum(kind == "sliding_attention" for kind in kinds)
    return {None: len(kinds) - local} | ({config.local_attention // 2: local} if local else {})


def _count_pairs(lengths: NDArray[np.float64], window: int | None) -> float:
    """Pairs of tokens of one text, order counted, of which one sees the other."""
    if window is None:
        return float((lengths**2).sum())
    near = np.minimum(window, lengths - 1)
    return float((lengths * (2 * near + 1) - near * (near + 1)).sum())


def measure_peak(device: torch.device) -> float:
    """FLOPs a second of the product of two large square matrices, in the precision of the `precision` block it is in.

    The best of some, on a CPU with the threads that torch has: what other trials do at the time counts less. Measured
    once a process: it takes about 0.1 s.
    """
    half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
    return _measure_peak(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _measure_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    size = PEAK_SIZES[device.type]
    start_lap(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        # Random numbers of their own: of zeros, a GPU multiplies more than it can of others.
        generator = torch.Generator(device).manual_seed(0)
        left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = left @ right
        seconds = min(_time_product(left, right, out) for _ in range(PEAK_REPEATS[device.type]))
    del left, right, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # The matrices are no part of the trial's memory.
    start_lap(device, counted=False)
    return 2.0 * size**3 / seconds


def _time_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    if not left.is_cuda:
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(left, right, out=out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
