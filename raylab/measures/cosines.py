"""All cosines of a set of vectors, in tiles that fit the cache: uniformity, similarity graphs and nearest neighbours.

One pass visits each pair once and feeds everything that is asked for. Up to EXACT_ROWS rows it is in float64, beyond
in float32; sums are in float64 either way. The device of the vectors is where it runs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raylab.measures.components import join, join_tile

Ints = npt.NDArray[np.int64]
EXACT_ROWS = 4096
# Rows and columns of a tile: it stays in the processor's cache, and keeps a GPU busy.
TILES = {"cpu": (512, 4096), "cuda": (8192, 32_768)}
# Edges are listed up to this many; beyond, only counted. Above this share of the pairs counting is quicker too.
MOST_EDGES = 50_000_000
SAMPLE_ROWS = 512
DENSE = 0.05
# Equal vectors can have a cosine a rounding error below 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
# A row this close to the mean has no direction of its own.
SHORTEST = 1e-6


class Level(NamedTuple):
    """A graph: points are joined whose cosine, of the vectors or of the centred ones, is `cosine` or more."""

    centred: bool
    cosine: float


class Links(NamedTuple):
    """A level's graph of n points. `class_degrees` and `num_same` count edges between points of known class only.

    degrees, class_degrees int64 [n]; num_same: edges within a class; components int64 [n]: a name for each point's
    component; edges: int32 [2, E] on the device of the vectors, None where there were too many to list.
    """

    degrees: Ints
    class_degrees: Ints
    num_same: int
    components: Ints
    edges: Tensor | None


class Scan(NamedTuple):
    """What the pass found: the mean of exp(-2 ||x - y||^2) over the pairs, the nearest neighbours int64 [n, k] (nearest
    first) and each level's graph."""

    kernel: float
    neighbours: Tensor
    links: dict[Level, Links]


class Space(NamedTuple):
    """Unit vectors, and what turns products of `rows` into cosines: rows_i rows_j scale_i scale_j + shift_i + shift_j.

    `rows` are the centred vectors at unit length where some level asks for them (then scale and shift are set), else
    the vectors. Centred first, a small angle to the mean loses no digits.
    """

    rows: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


def load_rows(x: npt.NDArray[Any], device: str = "cpu") -> Tensor:
    """The rows of x [n, d] at length 1: float64 up to EXACT_ROWS rows, else float32.

    ValueError if a row is a zero vector or not finite.
    """
    kind = torch.float64 if len(x) <= EXACT_ROWS else torch.float32
    rows = torch.empty(x.shape, dtype=kind, device=device)
    num_bad = num_zero = 0
    for start in range(0, len(x), 8192):
        # In float32 the squares of very small or large entries would leave the range.
        part = torch.from_numpy(np.array(x[start : start + 8192])).to(device).double()
        lengths = part.norm(dim=1, keepdim=True)
        num_bad += int((~lengths.isfinite()).sum())
        num_zero += int((lengths == 0).sum())
        rows[start : start + 8192] = part.mul_(1 / lengths)
    if num_bad:
        raise ValueError(f"{num_bad} of {len(x)} embeddings are not finite (NaN or infinite)")
    if num_zero:
        raise ValueError(f"{num_zero} of {len(x)} embeddings are zero vectors: they have no direction")
    return rows


def centre(x: Tensor) -> Space:
    """The space whose levels may be centred."""
    mean = x.mean(0, dtype=torch.float64)
    rows = x - mean.to(x.dtype)
    shift = rows @ mean.to(x.dtype) + (mean @ mean / 2).to(x.dtype)
    scale = rows.norm(dim=1)
    rows /= scale.clamp(min=SHORTEST)[:, None]
    rows[scale < SHORTEST] = 0
    return Space(rows, scale, shift)


def cosines_of(space: Space, rows: Any, columns: Any, centred: bool) -> Tensor:
    """The cosines [R, C] of some rows with some columns (indices or slices)."""
    found = space.rows[rows] @ space.rows[columns].T
    if centred or space.scale is None or space.shift is None:
        return found
    found *= space.scale[rows][:, None]
    found *= space.scale[columns]
    found += space.shift[rows][:, None]
    return found.add_(space.shift[columns])


def sample_pairs(space: Space, centred: bool, num_rows: int = EXACT_ROWS) -> Tensor:
    """Cosines of all pairs, or beyond `num_rows` rows of that many random rows with as many others; in order."""
    num = len(space.rows)
    if num <= num_rows:
        found = cosines_of(space, slice(None), slice(None), centred)
        upper = torch.triu_indices(num, num, 1, device=found.device)
        return found[upper[0], upper[1]].sort().values
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(num)[: 2 * num_rows]).to(space.rows.device)
    half = len(chosen) // 2
    return cosines_of(space, chosen[:half], chosen[half:], centred).view(-1).sort().values


def find_cosine(pairs: Tensor, density: float) -> float:
    """The cosine that joins a share of the pairs (in order): the m-th largest, m the share of them, at least 1."""
    if not len(pairs):
        return math.inf
    return float(pairs[-max(1, round(density * len(pairs)))])


def scan(
    space: Space,
    levels: Sequence[Level],
    *,
    codes: Tensor | None = None,
    num_neighbours: int = 0,
    list_edges: bool = True,
    samples: dict[bool, Tensor] | None = None,
) -> Scan:
    """Visits every pair once. codes int64 [n]: classes, below 0 for none. Without
    `list_edges` no graph keeps its edges. A sample (`sample_pairs`) by space says how
    many edges a level will have; it is drawn where it is not given."""
    num, device, kind = len(space.rows), space.rows.device, space.rows.dtype
    num_neighbours = min(num_neighbours, num - 1)
    if codes is not None and not bool((codes >= 0).any()):
        codes = None
    counters = {level: _Counter(num, device) for level in levels}
    listed, counted = _divide(space, levels, samples or {})
    stores = {centred: _Store(listed[centred] if list_edges else [], kind) for centred in (False, True)}
    best = torch.full((num, num_neighbours), -math.inf, dtype=kind, device=device)
    nearest = torch.full((num, num_neighbours), -1, dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    height, width = TILES[device.type]
    height, width = min(height, num), min(width, num)
    buffers = [torch.empty(height * width, dtype=kind, device=device) for _ in range(3)]
    flags = torch.empty(height * width, dtype=torch.bool, device=device)
    for top in range(0, num, height):
        candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        for left in range(top, num, width):
            rows, columns = slice(top, min(top + height, num)), slice(left, min(left + width, num))
            shape = (rows.stop - top, columns.stop - left)
            raw, spare, same = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            tile = _multiply(space.rows[rows], space.rows[columns])
            if space.scale is None or space.shift is None:
                raw = tile
            else:
                torch.mul(tile, space.scale[rows][:, None], out=raw).mul_(space.scale[columns])
                raw.add_(space.shift[rows][:, None]).add_(space.shift[columns])
            if left < rows.stop:
                # Each pair once, and no row with itself: only what is right of the diagonal.
                square = slice(left, min(rows.stop, columns.stop))
                here, there = (torch.arange(part.start, part.stop, device=device) for part in (rows, square))
                hidden = there <= here[:, None]
                for part in {id(tile): tile, id(raw): raw}.values():
                    part[:, : len(there)].masked_fill_(hidden, -math.inf)
            total += torch.mul(raw, 4.0, out=spare).exp_().sum(1).double().sum()
            if codes is not None and (counted[False] or counted[True]):
                same.copy_((codes[rows][:, None] == codes[columns]) & (codes[rows] >= 0)[:, None])
            for centred, values in ((False, raw), (True, tile)):
                if listed[centred]:
                    _list_edges(values, rows, columns, listed[centred], counters, stores[centred], codes, flags)
                for level in counted[centred]:
                    torch.ge(values, level.cosine - TOLERANCE[kind], out=spare)
                    _count_edges(spare, same, rows, columns, counters[level], codes)
            if num_neighbours:
                candidates += _find_near(raw, spare, flags, rows, columns, best[:, -1], num_neighbours)
        for counter in counters.values():
            counter.join()
        if candidates:
            _keep_nearest(best, nearest, candidates)
    num_pairs = num * (num - 1) / 2
    # exp(-2 (2 - 2 cos)) = exp(4 cos) / exp(4)
    kernel = float(total) / num_pairs / math.exp(4.0) if num_pairs else math.nan
    for store in stores.values():
        store.close()
    links = {level: _finish(counters[level], stores[level.centred].edges(level)) for level in levels}
    return Scan(kernel, nearest, links)


def _multiply(rows: Tensor, columns: Tensor) -> Tensor:
    """The products [R, C] of rows [R, d] with columns [C, d], in their own precision."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        # A convolution of width 1 is the same sums, by oneDNN: twice as fast as torch.mm's BLAS on some processors.
        return torch.nn.functional.conv1d(columns.T[None], rows[:, :, None])[0]
    return rows @ columns.T


class _Counter:
    """What the pass gathers of a level's graph."""

    def __init__(self, num: int, device: torch.device) -> None:
        self.degrees = torch.zeros(num, dtype=torch.int64, device=device)
        self.class_degrees = torch.zeros(num, dtype=torch.int64, device=device)
        self.num_same = torch.zeros((), dtype=torch.int64, device=device)
        self.components = torch.arange(num, device=device)
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.whole = False  # all one component: nothing is left to join

    def join(self) -> None:
        """Joins the components of the edges that wait."""
        if self.waiting:
            rows, columns = (torch.cat(part) for part in zip(*self.waiting, strict=True))
            self.components = join(self.components, rows, columns)
            self.whole = bool((self.components == self.components[0]).all())
            self.waiting = []


class _Store:
    """The edges of a space, down to the lowest level that has at most MOST_EDGES of them."""

    def __init__(self, levels: list[Level], kind: torch.dtype) -> None:
        self.levels = list(levels)
        self.tolerance = TOLERANCE[kind]
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num = 0
        self.ends = torch.zeros((2, 0), dtype=torch.int32)
        self.counts: dict[Level, int] = {}

    def add(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Keeps edges of the lowest level that is kept."""
        self.parts.append((rows.to(torch.int32), columns.to(torch.int32), values))
        self.num += len(rows)
        while self.num > MOST_EDGES and self.levels:
            del self.levels[0]
            lowest = self.levels[0].cosine - self.tolerance if self.levels else math.inf
            kept = [(part, (part[2] >= lowest).nonzero().view(-1)) for part in self.parts]
            self.parts = [(part[0][where], part[1][where], part[2][where]) for part, where in kept]
            self.num = sum(len(part[0]) for part in self.parts)

    def close(self) -> None:
        """Puts the edges of higher levels before those of lower ones alone: a level's are the first ones."""
        self.counts = dict.fromkeys(self.levels, 0)
        if not self.parts or not self.levels:
            return
        rows, columns, values = (torch.cat(column) for column in zip(*self.parts, strict=True))
        self.parts = []
        bounds = torch.tensor([level.cosine - self.tolerance for level in self.levels], dtype=values.dtype)
        passed = torch.bucketize(values, bounds.to(values.device), out_int32=True, right=True).to(torch.uint8)
        groups = [(passed == number).nonzero().view(-1) for number in range(len(bounds), 0, -1)]
        order = torch.cat(groups)
        self.ends = torch.stack([rows[order], columns[order]])
        self.counts = {level: int((passed > place).sum()) for place, level in enumerate(self.levels)}

    def edges(self, level: Level) -> Tensor | None:
        """A level's edges, or None; a view."""
        return self.ends[:, : self.counts[level]] if level in self.counts else None


def _divide(
    space: Space, levels: Sequence[Level], samples: dict[bool, Tensor]
) -> tuple[dict[bool, list[Level]], dict[bool, list[Level]]]:
    """The levels of either space whose edges are listed, lowest first, and those whose edges are only counted."""
    listed: dict[bool, list[Level]] = {False: [], True: []}
    counted: dict[bool, list[Level]] = {False: [], True: []}
    num = len(space.rows)
    for level in sorted(set(levels), key=lambda level: level.cosine):
        density = 0.0
        if num > EXACT_ROWS and num**2 / 2 > MOST_EDGES:
            if level.centred not in samples:
                samples[level.centred] = sample_pairs(space, level.centred, SAMPLE_ROWS)
            pairs = samples[level.centred]
            density = 1 - float(torch.searchsorted(pairs, level.cosine)) / len(pairs)
        dense = density > DENSE and density * num**2 / 2 > MOST_EDGES
        (counted if dense else listed)[level.centred].append(level)
    return listed, counted


def _list_edges(
    values: Tensor,
    rows: slice,
    columns: slice,
    levels: list[Level],
    counters: dict[Level, _Counter],
    store: _Store,
    codes: Tensor | None,
    flags: Tensor,
) -> None:
    """Finds the edges of a tile at the lowest level, and those of the next levels among them."""
    mask = flags[: values.numel()]
    torch.ge(values.view(-1), levels[0].cosine - TOLERANCE[values.dtype], out=mask)
    flat = mask.nonzero().view(-1)
    here = torch.div(flat, values.shape[1], rounding_mode="floor")
    found, there = values.view(-1)[flat], flat - here * values.shape[1]
    stored = store.levels[0] if store.levels else None  # as adding may raise it
    for level in levels:
        if level != levels[0]:
            keep = (found >= level.cosine - TOLERANCE[values.dtype]).nonzero().view(-1)
            if len(keep) < len(found):
                found, here, there = found[keep], here[keep], there[keep]
        if not len(found):
            return
        counter = counters[level]
        _add_degrees(counter.degrees, here, there, rows, columns)
        if codes is not None:
            first, second = codes[rows][here], codes[columns][there]
            known = (first >= 0) & (second >= 0)
            counter.num_same += (known & (first == second)).sum()
            if bool(known.all()):
                _add_degrees(counter.class_degrees, here, there, rows, columns)
            else:
                _add_degrees(counter.class_degrees, here[known], there[known], rows, columns)
        if not counter.whole:
            apart = (counter.components[rows][here] != counter.components[columns][there]).nonzero().view(-1)
            if len(apart):
                counter.waiting.append((here[apart] + rows.start, there[apart] + columns.start))
        if level == stored:
            store.add(here + rows.start, there + columns.start, found)


def _add_degrees(degrees: Tensor, here: Tensor, there: Tensor, rows: slice, columns: slice) -> None:
    for ends, part in ((here, rows), (there, columns)):
        degrees[part] += torch.bincount(ends, minlength=part.stop - part.start)


def _count_edges(
    joined: Tensor, same: Tensor, rows: slice, columns: slice, counter: _Counter, codes: Tensor | None
) -> None:
    """Counts the edges of a tile (1 where joined), without a list of them."""
    counter.degrees[rows] += joined.sum(1).long()
    counter.degrees[columns] += joined.sum(0).long()
    counter.components = join_tile(counter.components, joined, rows, columns)
    if codes is not None:
        known = [(codes[part] >= 0).to(joined.dtype) for part in (rows, columns)]
        counter.class_degrees[rows] += ((joined @ known[1]) * known[0]).long()
        counter.class_degrees[columns] += ((known[0] @ joined) * known[1]).long()
        # Last: it overwrites the tile.
        counter.num_same += joined.mul_(same).sum(1).long().sum()


def _find_near(
    raw: Tensor, spare: Tensor, flags: Tensor, rows: slice, columns: slice, worst: Tensor, num: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Candidates (point, neighbour, cosine) for the nearest neighbours: what beats the worst kept so far."""
    if not rows.start:
        found, index = raw.topk(min(num, raw.shape[1]), dim=1)
        here = torch.arange(rows.stop, device=raw.device).repeat_interleave(index.shape[1])
        yield here, index.view(-1) + columns.start, found.view(-1)
        found, index = raw.topk(min(num, raw.shape[0]), dim=0)
        there = torch.arange(columns.start, columns.stop, device=raw.device).repeat(index.shape[0])
        yield there, index.view(-1), found.view(-1)
        return
    torch.minimum(worst[rows][:, None].expand_as(raw), worst[columns].expand_as(raw), out=spare)
    mask = flags[: raw.numel()]
    torch.gt(raw.view(-1), spare.view(-1), out=mask)
    flat = mask.nonzero().view(-1)
    found, here, there = raw.view(-1)[flat], flat // raw.shape[1] + rows.start, flat % raw.shape[1] + columns.start
    for ends in ((here, there), (there, here)):
        keep = found > worst[ends[0]]
        yield ends[0][keep], ends[1][keep], found[keep]


def _keep_nearest(best: Tensor, nearest: Tensor, candidates: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Merges candidates into the nearest neighbours kept so far, in place."""
    owners, others, values = (torch.cat(part) for part in zip(*candidates, strict=True))
    num = best.shape[1]
    members = owners.unique()
    owners = torch.cat([members.repeat_interleave(num), owners])
    others = torch.cat([nearest[members].view(-1), others])
    values = torch.cat([best[members].view(-1), values])
    order = values.argsort(descending=True, stable=True)
    order = order[owners[order].argsort(stable=True)]
    owners = owners[order]
    counts = torch.unique_consecutive(owners, return_counts=True)[1]
    rank = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    keep = rank < num
    best[owners[keep], rank[keep]] = values[order][keep]
    nearest[owners[keep], rank[keep]] = others[order][keep]


def _finish(counter: _Counter, edges: Tensor | None) -> Links:
    arrays = (counter.degrees, counter.class_degrees, counter.components)
    degrees, class_degrees, components = (array.cpu().numpy() for array in arrays)
    return Links(degrees, class_degrees, int(counter.num_same), components, edges)
