"""Similarity graphs: components, degrees, clustering and how far edges stay in a class."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from raylab.measures.cosines import TOLERANCE, Level, Links, Space, cosines_of

Ints = npt.NDArray[np.int64]

# Up to here the points' whole adjacency is multiplied out; beyond, sparse rows of it.
DENSE_POINTS = 2048
SPARSE_ROWS = 256
# On a GPU: bytes of the rows that are marked at once, and paths of two edges that are followed at once.
MARKED_BYTES = 2**30
PATHS_AT_ONCE = 2**27
# Where edges are not listed, clustering is estimated at this many points, from so many pairs of edges of each.
NUM_CENTRES = 1000
NUM_PAIRS = 20
NORMAL_95 = 1.959964


class Estimate(NamedTuple):
    """A value, and its 95 % interval where it is estimated from a sample (else NaN)."""

    value: float
    low: float = math.nan
    high: float = math.nan


def measure_graph(links: Links, clustering: Callable[[], Estimate]) -> dict[str, Estimate]:
    """The measures of a graph of n > 0 points that need no class."""
    num = len(links.degrees)
    sizes = np.unique(links.components, return_counts=True)[1]
    return {
        "components": Estimate(float(len(sizes))),
        "largest_share": Estimate(float(sizes.max() / num)),
        "isolated_share": Estimate(float((links.degrees == 0).mean())),
        "mean_degree": Estimate(float(links.degrees.mean())),
        "clustering": clustering(),
    }


def measure_classes(links: Links, codes: Ints) -> dict[str, float]:
    """Assortativity and modularity of classes, int64 [n], below 0 for none; NaN without edges."""
    return _compare(links.num_same, _share_ends(links, codes), links.class_degrees.sum() / 2)


def shuffle_classes(links: Links, shuffles: list[Ints]) -> dict[str, float]:
    """Their means where classes are shuffled among the points that have one, [n] each.

    Of the edges, the expected share in a class is that of all pairs: only ends of edges have to be counted.
    """
    num_edges, found = links.class_degrees.sum() / 2, []
    for codes in shuffles:
        sizes = np.bincount(codes[codes >= 0])
        share = (sizes * (sizes - 1)).sum() / max(1, sizes.sum() * (sizes.sum() - 1))
        found.append(_compare(share * num_edges, _share_ends(links, codes), num_edges))
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def _share_ends(links: Links, codes: Ints) -> float:
    """Sum over classes of the squared share of the ends of edges."""
    known = codes >= 0
    ends = np.bincount(codes[known], weights=links.class_degrees[known])
    return float(((ends / ends.sum()) ** 2).sum()) if ends.sum() else math.nan


def _compare(num_same: float, expected: float, num_edges: float) -> dict[str, float]:
    modularity = num_same / num_edges - expected if num_edges else math.nan
    # One class alone has nothing to be assorted by.
    assortativity = modularity / (1 - expected) if num_edges and expected < 1 else math.nan
    return {"assortativity": assortativity, "modularity": modularity}


def link_mutual(neighbours: Ints, codes: Ints) -> Links:
    """The graph that joins points that are among each other's nearest `neighbours` [n, k]."""
    num, k = neighbours.shape
    if not k:
        return link_edges(np.zeros((2, 0), dtype=np.int32), codes)
    near = sparse.csr_array((np.ones(num * k, dtype=bool), neighbours.reshape(-1), np.arange(0, num * k + 1, k)))
    near.resize((num, num))
    rows, columns = near.multiply(near.T).nonzero()
    edges = np.stack([rows, columns])[:, rows < columns].astype(np.int32)
    return link_edges(edges, codes)


def link_edges(edges: npt.NDArray[np.int32], codes: Ints) -> Links:
    """The graph of some edges, int32 [2, E], each once."""
    num = len(codes)
    known = (codes[edges] >= 0).all(0)
    same = known & (codes[edges[0]] == codes[edges[1]])
    matrix = sparse.coo_array((np.ones(edges.shape[1], dtype=bool), tuple(edges)), (num, num))
    components = connected_components(matrix, directed=False)[1].astype(np.int64)
    degrees, class_degrees = (
        np.bincount(ends.reshape(-1), minlength=num).astype(np.int64) for ends in (edges, edges[:, known])
    )
    return Links(degrees, class_degrees, int(same.sum()), components, torch.from_numpy(edges))


def compute_clustering(links: Links, space: Space, level: Level | None) -> Estimate:
    """Transitivity: 3 x triangles / pairs of edges that meet; NaN without such pairs. Exact where edges are listed."""
    degrees = links.degrees.astype(np.float64)
    num_pairs = float((degrees * (degrees - 1) / 2).sum())
    if not num_pairs:
        return Estimate(math.nan)
    if links.edges is not None:
        return Estimate(3 * count_triangles(links.edges, links.degrees) / num_pairs)
    assert level is not None
    return _sample_clustering(degrees * (degrees - 1), space, level)


def count_triangles(edges: torch.Tensor, degrees: Ints) -> int:
    """Triangles of the graph of edges int32 [2, E], each once; counted where the edges are."""
    num = len(degrees)
    if num <= DENSE_POINTS:
        joined = torch.zeros((num, num), device=edges.device)
        start, end = edges.long()
        joined[start, end] = joined[end, start] = 1
        # Entries count paths of two edges: whole numbers below 2^24, exact in float32.
        return round(float(((joined @ joined) * joined).sum(1).double().sum()) / 6)
    # Each edge points to the end with more edges, so that no point has many; a triangle is a path and its short cut.
    rank = np.empty(num, dtype=np.int32)
    rank[np.argsort(degrees, kind="stable")] = np.arange(num, dtype=np.int32)
    ends = torch.from_numpy(rank).to(edges.device)[edges.long()].sort(0).values
    return COUNTERS[edges.device.type](ends, num)


def _multiply(ends: torch.Tensor, num: int) -> int:
    """Triangles of edges from ends[0] to ends[1], by products of sparse rows."""
    start, end = ends.numpy()
    ahead = sparse.csr_array((np.ones(len(start), dtype=np.int32), (start, end)), (num, num))
    del start, end, ends

    def count(start: int) -> int:
        some = ahead[start : start + SPARSE_ROWS]
        return int((some @ ahead).multiply(some).sum())

    # scipy lets other threads run while it multiplies.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return sum(pool.map(count, range(0, num, SPARSE_ROWS)))


def _follow(ends: torch.Tensor, num: int) -> int:
    """The same on a GPU: every path of two edges is followed, and ends where its start has marked its own ends."""
    device = ends.device
    # In order of start, then end.
    keys = (ends[0].long() * num + ends[1]).sort().values
    starts, columns = torch.div(keys, num, rounding_mode="floor"), (keys % num).to(torch.int32)
    del keys
    counts = torch.bincount(starts, minlength=num)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    height = max(1, min(num, MARKED_BYTES // num))
    marked = torch.zeros((height, num), dtype=torch.bool, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    firsts = offsets[torch.arange(0, num + height, height, device=device).clamp(max=num)].tolist()
    for top, first, last in zip(range(0, num, height), firsts, firsts[1:], strict=False):
        here, middle = starts[first:last] - top, columns[first:last].long()
        marked[here, middle] = True
        paths = counts[middle].cumsum(0)
        num_paths = int(paths[-1]) if len(paths) else 0
        for begin in range(0, num_paths, PATHS_AT_ONCE):
            path = torch.arange(begin, min(begin + PATHS_AT_ONCE, num_paths), device=device)
            edge = torch.searchsorted(paths, path, right=True)
            # The path's place among those of its first edge is that of its second edge among the middle's.
            second = offsets[middle[edge]] + path - (paths[edge] - counts[middle[edge]])
            total += marked[here[edge], columns[second]].sum()
        marked[here, middle] = False
    return int(total)


COUNTERS = {"cpu": _multiply, "cuda": _follow}


def _sample_clustering(weights: npt.NDArray[np.float64], space: Space, level: Level) -> Estimate:
    """Transitivity from NUM_CENTRES points drawn by their pairs of edges, and NUM_PAIRS random pairs of each."""
    device = space.rows.device
    generator = torch.Generator(device).manual_seed(0)
    drawn = np.random.default_rng(0).choice(len(weights), NUM_CENTRES, p=weights / weights.sum())
    threshold, shares = level.cosine - TOLERANCE[space.rows.dtype], []
    for centres in torch.from_numpy(drawn).to(device).split(100):
        joined = cosines_of(space, centres, slice(None), level.centred) >= threshold
        joined[torch.arange(len(centres), device=device), centres] = False
        ends = torch.multinomial(joined.float(), 2 * NUM_PAIRS, replacement=True, generator=generator)
        for first, second in zip(ends[:, :NUM_PAIRS], ends[:, NUM_PAIRS:], strict=True):
            # Drawn with replacement: a pair of one point twice is no pair.
            closed = cosines_of(space, first, second, level.centred).diagonal()[first != second] >= threshold
            if len(closed):
                shares.append(closed.double().mean())
    found = torch.stack(shares)
    mean, half = float(found.mean()), NORMAL_95 * float(found.std()) / math.sqrt(len(found))
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))
