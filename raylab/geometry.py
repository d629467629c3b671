"""The shape of an embedding space: uniformity, alignment, cosines, silhouette and similarity graph.

Every function takes embeddings of any length and L2-normalises the rows itself, in float64. On the unit sphere
||x - y||^2 = 2 - 2 cos(x, y), which is how distances are computed here. A pair is two distinct rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import sklearn
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_score

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

UNIFORMITY_T = 2.0
ALIGNMENT_ALPHA = 2.0
BLOCK_ROWS = 512
SILHOUETTE_MEMORY_MIB = 128
# Equal vectors can have a cosine a rounding error below 1.
COSINE_TOLERANCE = 1e-9

WANG_ISOLA = "Wang and Isola 2020, arXiv 2005.10242"
DEFINITIONS: dict[str, str] = {
    "uniformity": f"log of the mean of exp(-2 ||x - y||^2) over all pairs ({WANG_ISOLA}, t = 2); "
    "lower is better (more evenly spread)",
    "alignment": "mean ||x - y||^2 over the pairs of a class, then the mean over classes with 2 points or more "
    f"({WANG_ISOLA}, alpha = 2, with the pairs of a class as positives); lower is better (tighter classes)",
    "cosine_within": "mean cosine over all same-class pairs, so large classes weigh more; "
    "higher is better (tighter classes)",
    "cosine_between": "mean cosine over all different-class pairs; lower is better (classes further apart)",
    "silhouette": "mean silhouette of the classes with cosine distance (Rousseeuw 1987), from -1 to 1; "
    "higher is better (classes apart)",
    "graph_components": "number of connected components of the graph that joins points with cosine >= the parameter; "
    "no better direction (more: the space falls into more pieces)",
    "graph_largest_share": "share of the points in the largest component of that graph; "
    "no better direction (near 1 at a high threshold: the space is one narrow cone)",
}


class GeometryValue(NamedTuple):
    """A measured value: `metric` is a key of DEFINITIONS, `num_points` the number of rows it was measured on."""

    metric: str
    parameter: float | None
    value: float
    num_points: int


def measure_geometry(
    embeddings: npt.NDArray[np.float32],
    labels: IntArray,
    *,
    thresholds: Sequence[float],
    max_points: int,
    graph_points: int,
    seed: int,
) -> list[GeometryValue]:
    """Measure every metric of DEFINITIONS; one row a metric, for the graph metrics one a threshold.

    embeddings: float32 [n, d], n > 0. labels: int64 [n]; rows below 0 are unlabelled and enter only uniformity and
    the graph. thresholds: cosines, each in -1..1. At most `max_points` rows are used, drawn without replacement, and
    of these at most `graph_points` for the graph. A value that is not defined (no such pair, one class) is NaN.
    Embeddings are compared on the same rows if they share n and the seed.
    ValueError if the shapes do not fit, a threshold or a number of points is out of range, or any row is a zero
    vector or not finite.
    """
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or not embeddings.size:
        raise ValueError(f"embeddings {embeddings.shape} and labels {labels.shape} must be [n, d] and [n], n > 0")
    if max_points < 2 or graph_points < 2:
        raise ValueError(f"max_points is {max_points} and graph_points {graph_points}: both must be 2 or more")
    _check_rows(embeddings)

    chosen = np.random.default_rng(seed).permutation(len(embeddings))[:max_points]
    x, chosen_labels = normalize_rows(embeddings[chosen]), labels[chosen]
    known = chosen_labels >= 0
    labelled, known_labels = x[known], chosen_labels[known]
    num_points, num_labelled = len(x), len(labelled)
    values = [
        GeometryValue("uniformity", UNIFORMITY_T, uniformity(x), num_points),
        GeometryValue("alignment", ALIGNMENT_ALPHA, alignment(labelled, known_labels), num_labelled),
        GeometryValue("cosine_within", None, cosine_within(labelled, known_labels), num_labelled),
        GeometryValue("cosine_between", None, cosine_between(labelled, known_labels), num_labelled),
        GeometryValue("silhouette", None, silhouette(labelled, known_labels), num_labelled),
    ]
    # `chosen` is in random order, so its head is a fair sample too.
    graph_x = x[:graph_points]
    for threshold in thresholds:
        components, largest_share = graph_components(graph_x, threshold)
        values.append(GeometryValue("graph_components", threshold, float(components), len(graph_x)))
        values.append(GeometryValue("graph_largest_share", threshold, largest_share, len(graph_x)))
    return values


def normalize_rows(x: npt.NDArray[Any]) -> FloatArray:
    """Scale each row of x [n, d] to length 1, in float64. ValueError if a row is a zero vector or not finite."""
    _check_rows(x)
    # In float32 the squares of very small or large entries would leave the range.
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def uniformity(x: npt.NDArray[Any]) -> float:
    """Uniformity of x [n, d], as in DEFINITIONS; NaN for under 2 rows. Memory: a few blocks of 512 x n."""
    num_points = len(x)
    if num_points < 2:
        return float("nan")
    total = 0.0
    for _, cosines in _iterate_cosines(normalize_rows(x)):
        kernel = np.exp(-UNIFORMITY_T * (2.0 - 2.0 * cosines))
        # Each pair once, and no row with itself: only what is right of the diagonal.
        total += float(np.triu(kernel, k=1).sum())
    return float(np.log(total / (num_points * (num_points - 1) / 2)))


def alignment(x: npt.NDArray[Any], labels: IntArray) -> float:
    """Alignment of the classes of x [n, d], labels int64 [n], as in DEFINITIONS; NaN if no class has 2 rows."""
    sizes, _, within_sums = _sum_cosines(x, labels)
    paired = sizes > 1
    if not paired.any():
        return float("nan")
    means = within_sums[paired] / (sizes[paired] * (sizes[paired] - 1))
    return float((2.0 - 2.0 * means).mean())


def cosine_within(x: npt.NDArray[Any], labels: IntArray) -> float:
    """Mean cosine of the same-class pairs of x [n, d], labels int64 [n]; NaN if there is no such pair."""
    sizes, _, within_sums = _sum_cosines(x, labels)
    num_ordered_pairs = (sizes * (sizes - 1)).sum()
    return float(within_sums.sum() / num_ordered_pairs) if num_ordered_pairs else float("nan")


def cosine_between(x: npt.NDArray[Any], labels: IntArray) -> float:
    """Mean cosine of the different-class pairs of x [n, d], labels int64 [n]; NaN if there is no such pair."""
    sizes, total, within_sums = _sum_cosines(x, labels)
    num_ordered_pairs = sizes.sum() ** 2 - (sizes**2).sum()
    return float((total - within_sums.sum()) / num_ordered_pairs) if num_ordered_pairs else float("nan")


def silhouette(x: npt.NDArray[Any], labels: IntArray) -> float:
    """Mean silhouette of x [n, d], labels int64 [n], with cosine distance; a class of one row counts as 0.

    NaN where it is not defined: under 2 classes, or as many classes as rows.
    """
    if not 2 <= len(np.unique(labels)) < len(x):
        return float("nan")
    # scikit-learn computes distances in chunks of this size, whatever n is.
    with sklearn.config_context(working_memory=SILHOUETTE_MEMORY_MIB):
        return float(silhouette_score(normalize_rows(x), labels, metric="cosine"))


def graph_components(x: npt.NDArray[Any], threshold: float) -> tuple[int, float]:
    """Number of components, and share of points in the largest, of the graph that joins points of x [n, d], n > 0,
    whose cosine is at least `threshold` (within 1e-9).

    Memory: a few blocks of 512 x n, however many pairs are joined. ValueError if the threshold is not in -1..1.
    """
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}: a cosine lies in -1..1")
    num_points = len(x)
    points = np.arange(num_points)
    components = points
    for start, cosines in _iterate_cosines(normalize_rows(x)):
        rows, columns = np.nonzero(cosines >= threshold - COSINE_TOLERANCE)
        # What earlier blocks joined is kept as one edge a point, to the first point of its component. A low threshold
        # joins nearly all of the n^2 pairs, too many to keep (or to hold as a networkx graph).
        sources, targets = np.append(rows + start, points), np.append(columns + start, components)
        edges = sparse.coo_array((np.ones(len(sources), dtype=bool), (sources, targets)), (num_points, num_points))
        members = connected_components(edges, directed=False)[1]
        components = np.unique(members, return_index=True)[1][members]
    sizes = np.unique(components, return_counts=True)[1]
    return len(sizes), float(sizes.max() / num_points)


def _check_rows(x: npt.NDArray[Any]) -> None:
    if num_bad := int((~np.isfinite(x)).any(axis=1).sum()):
        raise ValueError(f"{num_bad} of {len(x)} embeddings are not finite (NaN or infinite)")
    if num_zero := int((~np.asarray(x).any(axis=1)).sum()):
        raise ValueError(f"{num_zero} of {len(x)} embeddings are zero vectors: they have no direction")


def _iterate_cosines(x: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """Yield (start, cosines of up to BLOCK_ROWS rows from `start` with all rows from `start`) of unit rows x [n, d]."""
    for start in range(0, len(x), BLOCK_ROWS):
        yield start, x[start : start + BLOCK_ROWS] @ x[start:].T


def _sum_cosines(x: npt.NDArray[Any], labels: IntArray) -> tuple[FloatArray, float, FloatArray]:
    """Class sizes [C], and the sums of cosines over ordered pairs: over all (a number), and inside each class [C].

    The sum over all (x, y) with y = x included is ||sum of x||^2, so no pair has to be visited.
    """
    unit = normalize_rows(x)
    classes, codes = np.unique(labels, return_inverse=True)
    sizes = np.bincount(codes, minlength=len(classes)).astype(np.float64)
    sums = np.zeros((len(classes), unit.shape[1]))
    np.add.at(sums, codes, unit)
    within_sums = (sums**2).sum(axis=1) - sizes
    total = float((sums.sum(axis=0) ** 2).sum() - sizes.sum())
    return sizes, total, within_sums
