"""Inputs of the next step, built in a thread while the device computes: data are a function of the place alone."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylab.base.world import World
from raylab.job.blocks import Pretrain
from raylab.training.batches import Inputs, Ints, Place, Step, Units, iterate_steps
from raylab.training.objectives import Batch
from raylab.training.packing import lay_out


class Fed(NamedTuple):
    """A worker's part of a step: its batches, on the CPU, and counts over them.

    Masked tokens, texts with a category, token slots that pass through the layers and through attention, padding
    included, and what `count_flops` counts; `waited` is in seconds.
    """

    step: Step
    batches: list[Batch]
    selected: int
    categories: int
    slots: int
    attended: int
    flops: float
    waited: float


def make_batch(
    inputs: Inputs, categories: NDArray[np.int64] | None, gathered: tuple[int, ...] = (), *, kernel: bool
) -> Batch:
    """Inputs as tensors on the CPU; `categories` are those of all rows, `kernel` as in `lay_out`."""
    found = categories[inputs.rows] if categories is not None else np.full(len(inputs.rows), -1)
    return Batch(
        torch.from_numpy(inputs.input_ids),
        torch.from_numpy(inputs.positions),
        lay_out(inputs.offsets, kernel=kernel),
        torch.from_numpy(inputs.selected),
        torch.from_numpy(inputs.targets),
        torch.from_numpy(found),
        torch.from_numpy(np.flatnonzero(found >= 0)),
        gathered,
    )


def _count_attended(batch: Batch) -> int:
    padding = batch.layout.padding
    return len(batch.input_ids) if padding is None else len(padding.slots)


def move(value: Any, device: torch.device) -> Any:
    """Tensors in (named) tuples to a device; to a GPU from pinned memory, without waiting."""
    if isinstance(value, Tensor):
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
    if isinstance(value, tuple):
        parts = [move(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def feed(
    units: Units,
    categories: NDArray[np.int64] | None,
    pretrain: Pretrain,
    seed: int,
    place: Place,
    num_tokens: int,
    world: World,
    count_flops: Callable[[Inputs], float],
    *,
    kernel: bool,
) -> Iterator[Fed]:
    """Steps from `place` on until `num_tokens` or more, each a step ahead of the one that is asked for.

    A step's texts are dealt to the workers in turn, so that the global batch is the same for any number of them.
    """
    steps = iterate_steps(units, pretrain.batch_tokens, seed, place)
    shares = pretrain.accumulation * world.size

    def count_rows(dealt: Ints) -> int:
        return len(dealt) * units.texts if categories is None else int((categories[units.row[dealt]] >= 0).sum())

    def build() -> Fed:
        step = next(steps)
        # A part of the step is the same texts for any number of workers, and so are its negatives.
        mine = [
            units.build(step.epochs[share::shares], step.units[share::shares])
            for share in range(world.rank * pretrain.accumulation, (world.rank + 1) * pretrain.accumulation)
        ]
        rows = [count_rows(step.units[share::shares]) for share in range(shares)]
        batches = [
            make_batch(inputs, categories, tuple(rows[part :: pretrain.accumulation]), kernel=kernel)
            for part, inputs in enumerate(mine)
        ]
        return Fed(
            step,
            batches,
            sum(len(batch.targets) for batch in batches),
            sum(len(batch.known) for batch in batches),
            sum(len(batch.input_ids) for batch in batches),
            sum(_count_attended(batch) for batch in batches),
            sum(count_flops(inputs) for inputs in mine),
            0.0,
        )

    if num_tokens <= 0:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        ahead = pool.submit(build)
        while num_tokens > 0:
            began = time.perf_counter()
            fed = ahead.result()
            waited = time.perf_counter() - began
            num_tokens -= fed.step.num_tokens
            if num_tokens > 0:
                ahead = pool.submit(build)
            yield fed._replace(waited=waited)
