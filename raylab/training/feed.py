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
from raylab.training.batches import Inputs, Ints, Units
from raylab.training.compilation import choose_room
from raylab.training.objectives import Batch, is_contrastive
from raylab.training.packing import lay_out
from raylab.training.projection import NO_TARGET
from raylab.training.steps import Place, Step, deal, iterate_steps

# Masked tokens of a row of fixed shape are filled up to a multiple of this: for a number that it has not seen before,
# cuBLAS has to choose a kernel, which takes the host longer than to launch one.
SELECTED = 256


class Part(NamedTuple):
    """A worker's share of a part of a step: its chunks, and whether any worker has several, which all of them know."""

    chunks: tuple[Batch, ...]
    chunked: bool


class Fed(NamedTuple):
    """A worker's share of a step: its parts, on the CPU, and counts over them.

    `counts` float32 [2] are masked tokens and texts with a category; `slots` and `attended` the token slots that pass
    through the layers and through attention, padding included; `flops` what `count_flops` counts. Over all workers,
    `negatives` are those of a contrastive loss, mean a point; None without one. `waited` is in seconds.
    """

    step: Step
    parts: tuple[Part, ...]
    counts: Tensor
    slots: int
    attended: int
    flops: float
    negatives: float | None
    waited: float


class Rows(NamedTuple):
    """How rows are laid out: for the variable-length `kernel`; in fixed shapes, where a full row holds `capacity`
    tokens and no segment more than `longest`."""

    kernel: bool
    capacity: int | None = None
    longest: int = 0


PLAIN = Rows(kernel=False)


def make_batch(
    inputs: Inputs,
    categories: NDArray[np.int64] | None,
    gathered: tuple[int, ...] = (),
    *,
    rows: Rows = PLAIN,
    pad_id: int = 0,
) -> Batch:
    """Inputs as tensors on the CPU; `categories` are those of all rows.

    In fixed shapes `pad_id` fills what is left of the row, and `NO_TARGET` follows the targets.
    """
    found = categories[inputs.rows] if categories is not None else np.full(len(inputs.rows), -1)
    num_tokens, ids, positions = len(inputs.input_ids), inputs.input_ids, inputs.positions
    selected, targets = inputs.selected, inputs.targets
    room = None
    if rows.capacity is not None:
        room = choose_room(num_tokens, rows.capacity)
        left = (0, room - num_tokens)
        ids, positions = np.pad(ids, left, constant_values=pad_id), np.pad(positions, left)
        more = (0, -len(selected) % SELECTED)
        selected, targets = np.pad(selected, more), np.pad(targets, more, constant_values=NO_TARGET)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        lay_out(inputs.offsets, kernel=rows.kernel, room=room, longest=rows.longest or None),
        torch.from_numpy(selected),
        torch.from_numpy(targets),
        torch.from_numpy(found),
        torch.from_numpy(np.flatnonzero(found >= 0)),
        num_tokens,
        gathered,
    )


def deal_chunks(costs: Ints, chunk_tokens: int | None) -> list[Ints]:
    """The units of a share, places in it, in even chunks of at most `chunk_tokens`, or of the largest unit."""
    if chunk_tokens is None or not len(costs):
        return [np.arange(len(costs))]
    most = max(chunk_tokens, int(costs.max()))
    chunks = deal(costs, -(-int(costs.sum()) // most))
    while any(costs[chunk].sum() > most for chunk in chunks):
        chunks = deal(costs, len(chunks) + 1)
    return chunks


def _count_pairs(rows: Ints) -> tuple[int, int]:
    """Points of NT-Xent, two a row, and all their negatives: every point but itself and its partner."""
    points = 2 * len(rows)
    return points, points * (points - 2)


def _count_others(categories: Ints) -> tuple[int, int]:
    """Points of a supervised contrastive loss, and all their negatives: the points of other categories."""
    counts = np.bincount(categories[categories >= 0])
    return int(counts.sum()), int((counts * (counts.sum() - counts)).sum())


def _count_attended(batch: Batch) -> int:
    padding = batch.layout.bounds.padding
    return len(batch.input_ids) if padding is None else len(padding.slots)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def pin(value: Any) -> Any:
    """Tensors in (named) tuples in pinned memory, which a GPU reads by itself."""
    return _map_tensors(value, lambda tensor: tensor.pin_memory())


def move(value: Any, device: torch.device) -> Any:
    """Tensors in (named) tuples to a device; pinned ones without waiting."""
    return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


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
    chunk_tokens: int | None = None,
    rows: Rows = PLAIN,
    pad_id: int = 0,
    pinned: bool = False,
) -> Iterator[Fed]:
    """Steps from `place` on until `num_tokens` or more, each a step ahead of the one that is asked for.

    A step is cut into parts of like tokens, at most as many as it has units, and so with its negatives: the same for
    any number of workers. A part is dealt to the workers by tokens, for all wait for the slowest.
    """
    steps = iterate_steps(units, pretrain.batch_tokens, seed, place)
    contrastive = is_contrastive(pretrain)

    def count_rows(dealt: Ints) -> int:
        return len(dealt) * units.texts if categories is None else int((categories[units.row[dealt]] >= 0).sum())

    def count_negatives(dealt: Ints) -> tuple[int, int]:
        rows = np.repeat(units.row[dealt], units.texts)
        return _count_pairs(rows) if categories is None else _count_others(categories[rows])

    def build() -> Fed:
        step = next(steps)
        parts, built, points, negatives = [], [], 0, 0
        for part in deal(step.costs, min(pretrain.accumulation, len(step.units))):
            shares = [part[share] for share in deal(step.costs[part], world.size)]
            chunked = [[share[chunk] for chunk in deal_chunks(step.costs[share], chunk_tokens)] for share in shares]
            mine = [
                units.build(step.epochs[chunk], step.units[chunk]) if len(chunk) else units.nothing
                for chunk in chunked[world.rank]
            ]
            counts = tuple(count_rows(step.units[share]) for share in shares)
            batches = tuple(make_batch(inputs, categories, counts, rows=rows, pad_id=pad_id) for inputs in mine)
            parts.append(Part(batches, any(len(chunks) > 1 for chunks in chunked)))
            built += [inputs for inputs in mine if inputs is not units.nothing]
            found = count_negatives(step.units[part]) if contrastive else (0, 0)
            points, negatives = points + found[0], negatives + found[1]
        batches = tuple(batch for part in parts for batch in part.chunks)
        counted = torch.tensor(
            [sum(len(inputs.targets) for inputs in built), sum(len(batch.known) for batch in batches)],
            dtype=torch.float32,
        )
        return Fed(
            step,
            pin(tuple(parts)) if pinned else tuple(parts),
            pin(counted) if pinned else counted,
            sum(len(batch.input_ids) for batch in batches),
            sum(_count_attended(batch) for batch in batches),
            sum(count_flops(inputs) for inputs in built),
            negatives / max(points, 1) if contrastive else None,
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
