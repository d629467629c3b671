"""The shape of an embedding space: every metric of `definitions.DEFINITIONS`, with references and intervals.

Embeddings may be of any length: on the unit sphere ||x - y||^2 = 2 - 2 cos(x, y), which is how distances are computed.
A pair is two distinct rows.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from raylab.measures.cosines import Level, Space, centre, find_cosine, load_rows, sample_pairs, scan
from raylab.measures.definitions import (
    ALIGNMENT_ALPHA,
    BINS,
    BOUNDS,
    DEFINITIONS,
    NUM_PERMUTATIONS,
    UNIFORMITY_T,
)
from raylab.measures.graphs import compute_clustering, link_mutual, measure_classes, measure_graph, shuffle_classes
from raylab.measures.spaces import (
    HISTOGRAM_ROWS,
    align_spans,
    alignment,
    anisotropy,
    bin_cosines,
    cosine_between,
    cosine_within,
    davies_bouldin,
    first_component,
    intrinsic_dimension,
    isoscore,
    knn_purity,
    rankme,
    silhouette,
    spectrum,
    sum_classes,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Key = tuple[str, float | None]

# Of the groups, in each subsample of an interval.
SUBSAMPLE_SHARE = 0.5


class GeometryValue(NamedTuple):
    """A measured value: `metric` is a key of DEFINITIONS, `num_points` the number of rows it was measured on.

    `reference` is what the definition says, `low` and `high` a 95 % interval; NaN where not asked for or not defined.
    """

    metric: str
    parameter: float | None
    value: float
    num_points: int
    reference: float = math.nan
    low: float = math.nan
    high: float = math.nan


class Options(NamedTuple):
    """What is measured, and where: cosines of graphs, shares of pairs of graphs, and k of neighbours."""

    thresholds: tuple[float, ...]
    densities: tuple[float, ...] = ()
    neighbours: tuple[int, ...] = ()
    device: str = "cpu"


def measure_geometry(
    embeddings: Floats,
    labels: npt.NDArray[Any],
    *,
    options: Options,
    max_points: int,
    graph_points: int,
    seed: int,
    references: bool = False,
    subsamples: int = 0,
    groups: npt.NDArray[Any] | None = None,
    spans: tuple[Floats, Floats] | None = None,
) -> list[GeometryValue]:
    """Measure every metric of DEFINITIONS; one row a metric and parameter.

    embeddings: float32 [n, d], n > 0. labels: int64 [n], below 0 for none; or int8 [n, L] of several labels a row, -1
    where missing: then a class is a set of labels. Rows without a class enter only metrics that need none. At most
    `max_points` rows are used, drawn without replacement, and of these at most `graph_points` for graphs. A value that
    is not defined (no such pair, one class) is NaN. Embeddings are compared on the same rows if they share n and seed.

    references: also each metric's reference (NUM_PERMUTATIONS shuffles, or Gaussian vectors, kept for the next call).
    subsamples: intervals from so many subsamples of half the `groups` [n] (else of the rows), see `_find_interval`.
    spans: embeddings [m, d] of two spans of each of m documents, for alignment_spans.

    ValueError if the shapes do not fit, an option is out of range, or any row is a zero vector or not finite.
    """
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or labels.shape[:1] != embeddings.shape[:1] or labels.ndim > 2 or not embeddings.size:
        raise ValueError(f"embeddings {embeddings.shape} and labels {labels.shape} must be [n, d] and [n], n > 0")
    _check_options(options, max_points, graph_points, subsamples)
    _check_rows(embeddings)

    chosen = np.random.default_rng(seed).permutation(len(embeddings))[:max_points]
    x, codes = embeddings[chosen], code_classes(labels)[chosen]
    # `chosen` is in random order, so its head is a fair sample too.
    num_graph = min(graph_points, len(x))
    whole = spectrum(embeddings, options.device).covariance if len(x) < len(embeddings) else None
    found = _measure(x, codes, num_graph, options, NUM_PERMUTATIONS if references else 0, whole)
    paired, unpaired = align_spans(*spans) if spans is not None else (math.nan, math.nan)
    num_spans = len(spans[0]) if spans is not None else 0
    found["alignment_spans", ALIGNMENT_ALPHA] = Found(paired, num_spans, floor=unpaired if references else math.nan)
    gaussian = _measure_gaussian(*x.shape, num_graph, options) if references else {}
    samples = []
    for part in _draw_parts(np.arange(len(x)) if groups is None else np.asarray(groups)[chosen], subsamples, seed):
        samples.append(_measure(x[part], codes[part], max(2, int((part < num_graph).sum())), options, 0, whole))
    values = []
    for metric, definition in DEFINITIONS.items():
        for parameter in list_parameters(options, metric):
            value = found[metric, parameter]
            others = [sample[metric, parameter] for sample in samples if (metric, parameter) in sample]
            low, high = _find_interval(value, others, definition.grows)
            lowest, highest = BOUNDS[definition.unit]
            low, high = max(low, lowest), min(high, highest)
            gaussian_value = gaussian.get((metric, parameter), math.nan)
            reference = gaussian_value if definition.reference == "gaussian" else value.floor
            values.append(GeometryValue(metric, parameter, value.value, value.num_points, reference, low, high))
    return values


def list_parameters(options: Options, metric: str) -> tuple[float | None, ...]:
    """The parameters at which a metric is measured; None for a metric without one."""
    parameter = DEFINITIONS[metric].parameter
    return tuple(getattr(options, parameter)) if isinstance(parameter, str) else parameter or (None,)


def code_classes(labels: npt.NDArray[Any]) -> Ints:
    """A class for each row, -1 for none: its label, or of several labels [n, L] the set of them."""
    if labels.ndim == 1:
        return np.asarray(labels, dtype=np.int64)
    codes = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    return np.asarray(np.where((labels < 0).any(axis=1), -1, codes), dtype=np.int64)


def _check_options(options: Options, max_points: int, graph_points: int, subsamples: int) -> None:
    if max_points < 2 or graph_points < 2:
        raise ValueError(f"max_points is {max_points} and graph_points {graph_points}: both must be 2 or more")
    for threshold in options.thresholds:
        if not -1.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}: a cosine lies in -1..1")
    for density in options.densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density is {density}: a share of the pairs lies above 0 and at most at 1")
    for k in options.neighbours:
        if k < 1:
            raise ValueError(f"neighbours is {k}: a number of neighbours is 1 or more")
    if subsamples == 1 or subsamples < 0:
        raise ValueError(f"subsamples is {subsamples}: an interval needs 2 or more, 0 for none")


def _check_rows(x: Floats) -> None:
    """Of all rows, so that a bad one is found even if it is not drawn."""
    if num_bad := int((~np.isfinite(x)).any(axis=1).sum()):
        raise ValueError(f"{num_bad} of {len(x)} embeddings are not finite (NaN or infinite)")
    if num_zero := int((~np.asarray(x).any(axis=1)).sum()):
        raise ValueError(f"{num_zero} of {len(x)} embeddings are zero vectors: they have no direction")


class Found(NamedTuple):
    """A value, its number of points, an interval of its own where it is an estimate, and its permutation floor."""

    value: float
    num_points: int
    low: float = math.nan
    high: float = math.nan
    floor: float = math.nan


def _measure(
    embeddings: Floats, codes: Ints, num_graph: int, options: Options, permutations: int, whole: Any
) -> dict[Key, Found]:
    """Every metric but that of spans. `whole`: the covariance of a larger set, for IsoScore*."""
    rng = np.random.default_rng(0)
    known = codes >= 0
    shuffles = []
    for _ in range(permutations):
        shuffled = codes.copy()
        shuffled[known] = rng.permutation(codes[known])
        shuffles.append(shuffled)
    num_neighbours = max(2, *options.neighbours) if options.neighbours else 2
    found: dict[Key, Found] = {}

    # Graphs first: where they are of all rows, their pass over the cosines serves the rest too.
    x = load_rows(embeddings, options.device)
    graph_x = x if num_graph == len(x) else load_rows(embeddings[:num_graph], options.device)
    space = centre(graph_x) if options.thresholds else Space(graph_x)
    samples = {False: sample_pairs(space, False)} if options.densities else {}
    levels = {("graph", t): Level(False, t) for t in options.thresholds}
    levels |= {("centred", t): Level(True, t) for t in options.thresholds}
    levels |= {("density", share): Level(False, find_cosine(samples[False], share)) for share in options.densities}
    graph_codes = codes[:num_graph]
    device_codes = torch.from_numpy(codes).to(x.device)
    passed = scan(
        space,
        list(dict.fromkeys(levels.values())),
        codes=device_codes[:num_graph],
        num_neighbours=num_neighbours,
        samples=samples,
    )
    graphs: dict[tuple[str, float], tuple[Any, Level | None]] = {
        key: (passed.links[level], level) for key, level in levels.items()
    }
    neighbours = passed.neighbours.cpu().numpy()
    graphs |= {("mutual", k): (link_mutual(neighbours[:, :k], graph_codes), None) for k in options.neighbours}
    for (name, parameter), (links, level) in graphs.items():
        estimates = measure_graph(links, functools.partial(compute_clustering, links, space, level))
        for metric, estimate in estimates.items():
            found[f"{name}_{metric}", parameter] = Found(estimate.value, num_graph, estimate.low, estimate.high)
        floors = shuffle_classes(links, [shuffled[:num_graph] for shuffled in shuffles]) if shuffles else {}
        for metric, value in measure_classes(links, graph_codes).items():
            num_known = int((graph_codes >= 0).sum())
            found[f"{name}_{metric}", parameter] = Found(value, num_known, floor=floors.get(metric, math.nan))
    del graphs, space, graph_x
    if num_graph < len(x):
        passed = scan(Space(x), (), num_neighbours=num_neighbours)

    num = len(x)
    found["uniformity", UNIFORMITY_T] = Found(math.log(passed.kernel) if num > 1 else math.nan, num)
    found["anisotropy", None] = Found(anisotropy(x), num)
    dimension = intrinsic_dimension(x, passed.neighbours[:, :2]) if num > 2 else math.nan
    found["intrinsic_dimension", None] = Found(dimension, num)
    shape = spectrum(embeddings, options.device)
    found["first_component", None] = Found(first_component(shape.covariance), num)
    found["rankme", None] = Found(rankme(shape.singular), num)
    found["isoscore", None] = Found(isoscore(shape.covariance, whole), num)

    labelled = x if known.all() else x[torch.from_numpy(known).to(x.device)]
    del x
    values = _measure_labels(labelled, codes, passed.neighbours, options)
    floors_of = [_measure_labels(labelled, shuffled, passed.neighbours, options) for shuffled in shuffles]
    for key, value in values.items():
        floor = float(np.mean([row[key] for row in floors_of])) if floors_of else math.nan
        found[key] = Found(value, int(known.sum()), floor=floor)
    shares = bin_cosines(labelled, torch.from_numpy(codes[known]).to(labelled.device))
    for index, left in enumerate(BINS):
        for name in ("within", "between"):
            # Shuffled labels have the shares of all pairs, on average.
            floor = shares["all"][index] if shuffles else math.nan
            num_binned = min(int(known.sum()), HISTOGRAM_ROWS)
            found[f"cosine_{name}_share", left] = Found(float(shares[name][index]), num_binned, floor=float(floor))
    return found


def _measure_labels(x: torch.Tensor, codes: Ints, neighbours: torch.Tensor, options: Options) -> dict[Key, float]:
    """The metrics of the labelled rows x [m, d]; codes [n] and `neighbours` [n, k] are of all rows."""
    all_codes = torch.from_numpy(codes).to(x.device)
    classes = sum_classes(x, all_codes[all_codes >= 0])
    values: dict[Key, float] = {
        ("alignment", ALIGNMENT_ALPHA): alignment(classes),
        ("cosine_within", None): cosine_within(classes),
        ("cosine_between", None): cosine_between(classes),
        ("silhouette", None): silhouette(x, classes),
        ("davies_bouldin", None): davies_bouldin(x, classes),
    }
    return values | {("knn_purity", k): knn_purity(neighbours[:, :k], all_codes) for k in options.neighbours}


@functools.lru_cache(maxsize=16)
def _measure_gaussian(num: int, width: int, num_graph: int, options: Options) -> dict[Key, float]:
    """Metrics that need no class, of independent Gaussian vectors."""
    x = np.random.default_rng(0).standard_normal((num, width), dtype=np.float32)
    found = _measure(x, np.full(num, -1), num_graph, options, 0, None)
    return {key: value.value for key, value in found.items()}


def _draw_parts(groups: npt.NDArray[Any], number: int, seed: int) -> Iterator[Ints]:
    """Rows of SUBSAMPLE_SHARE of the groups [n], drawn without replacement, `number` times."""
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    num_groups = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(number if num_groups > 1 else 0):
        kept = np.zeros(num_groups, dtype=bool)
        kept[rng.permutation(num_groups)[: max(1, round(SUBSAMPLE_SHARE * num_groups))]] = True
        part = np.flatnonzero(kept[codes])
        if len(part) > 1:
            yield part


def _find_interval(value: Found, samples: list[Found], grows: bool) -> tuple[float, float]:
    """A 95 % interval from subsamples of groups without replacement (Politis and Romano 1994, Annals of
    Statistics 22, section 2).

    Their spread is that of a statistic of a share s of the groups, given all: scaled by sqrt(s / (1 - s)) (the square
    root rate, with the correction for a finite population, as in the delete-d jackknife of Shao and Wu 1989) it is the
    standard error; times Student's t of their number less 1. What grows with the points is counted a point.
    """
    if not samples:
        return value.low, value.high
    factors = [value.num_points / row.num_points if grows and row.num_points else 1.0 for row in samples]
    values = np.array([row.value * factor for row, factor in zip(samples, factors, strict=True)])
    values = values[np.isfinite(values)]
    if len(values) < 2 or math.isnan(value.value):
        return math.nan, math.nan
    scale = math.sqrt(SUBSAMPLE_SHARE / (1 - SUBSAMPLE_SHARE))
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) * scale)
    return value.value - half, value.value + half
