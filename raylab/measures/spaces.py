"""Metrics of vectors and classes: sums, spectra, silhouettes and neighbours, each as `definitions.DEFINITIONS` says.

Vectors are torch tensors [n, d] of length 1 (`cosines.load_rows`), except where embeddings as they are are asked for.
Codes int64 [n] are classes. A value that is not defined (no such pair, one class) is NaN.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raylab.measures.definitions import BIN_WIDTH, BINS, ISOSCORE_SHRINKAGE, TWO_NN_DISCARD

BLOCK = 8192
HISTOGRAM_ROWS = 4096
RANKME_EPSILON = 1e-7


class Classes(NamedTuple):
    """Unit vectors by class: codes [n] from 0 to C - 1, sizes float64 [C], sums of the vectors float64 [C, d]."""

    codes: Tensor
    sizes: Tensor
    sums: Tensor


class Spectrum(NamedTuple):
    """Of embeddings as they are: singular values float64 [min(n, d)], descending, and covariance float64 [d, d]."""

    singular: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


def _blocks(num: int) -> Iterator[slice]:
    for start in range(0, num, BLOCK):
        yield slice(start, min(start + BLOCK, num))


def sum_classes(x: Tensor, codes: Tensor) -> Classes:
    """Class sizes and sums, of x [n, d] and codes [n] of any whole numbers."""
    names, codes = codes.unique(return_inverse=True)
    sizes = torch.bincount(codes, minlength=len(names)).double()
    sums = torch.zeros((len(names), x.shape[1]), dtype=torch.float64, device=x.device)
    for part in _blocks(len(x)):
        sums.index_add_(0, codes[part], x[part].double())
    return Classes(codes, sizes, sums)


def cosine_sums(classes: Classes) -> tuple[Tensor, float]:
    """Sums of cosines over ordered pairs: inside each class [C], and over all.

    The sum over all (x, y) with y = x included is ||sum of x||^2, so no pair has to be visited.
    """
    within = (classes.sums**2).sum(1) - classes.sizes
    return within, float((classes.sums.sum(0) ** 2).sum() - classes.sizes.sum())


def alignment(classes: Classes) -> float:
    """Mean over classes of the mean squared distance in a class."""
    within, _ = cosine_sums(classes)
    paired = classes.sizes > 1
    means = within[paired] / (classes.sizes[paired] * (classes.sizes[paired] - 1))
    return float((2.0 - 2.0 * means).mean()) if len(means) else math.nan


def cosine_within(classes: Classes) -> float:
    """Mean cosine of the same-class pairs."""
    num_ordered = float((classes.sizes * (classes.sizes - 1)).sum())
    return float(cosine_sums(classes)[0].sum()) / num_ordered if num_ordered else math.nan


def cosine_between(classes: Classes) -> float:
    """Mean cosine of the different-class pairs."""
    within, total = cosine_sums(classes)
    num_ordered = float(classes.sizes.sum() ** 2 - (classes.sizes**2).sum())
    return (total - float(within.sum())) / num_ordered if num_ordered else math.nan


def anisotropy(x: Tensor) -> float:
    """Mean cosine of all pairs of x [n, d]."""
    num = len(x)
    total = x.sum(0, dtype=torch.float64)
    return (float(total @ total) - num) / (num * (num - 1)) if num > 1 else math.nan


def align_spans(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean squared distance of row i of `first` [n, d] to row i of `second`, and its mean over all other pairings."""
    sides = [np.asarray(side, dtype=np.float64) for side in (first, second)]
    a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    num, paired = len(a), float((a * b).sum())
    others = (float(a.sum(0) @ b.sum(0)) - paired) / (num * (num - 1)) if num > 1 else math.nan
    return (2.0 - 2.0 * paired / num, 2.0 - 2.0 * others) if num else (math.nan, math.nan)


def bin_cosines(x: Tensor, codes: Tensor) -> dict[str, npt.NDArray[np.float64]]:
    """Shares of the pairs in each of BINS: within classes, between them, and of all; of the first rows."""
    x, codes = x[:HISTOGRAM_ROWS], codes[:HISTOGRAM_ROWS]
    upper = torch.triu_indices(len(x), len(x), 1, device=x.device)
    cosines = (x @ x.T)[upper[0], upper[1]]
    # A cosine on an edge, but for a rounding error, belongs to the bin above.
    bins = ((cosines + (1.0 + 1e-6)) / BIN_WIDTH).long().clamp(0, len(BINS) - 1)
    same = codes[upper[0]] == codes[upper[1]]
    within, whole = (torch.bincount(part, minlength=len(BINS)).double().cpu().numpy() for part in (bins[same], bins))
    counts = {"within": within, "between": whole - within, "all": whole}
    return {name: count / count.sum() if count.sum() else count * math.nan for name, count in counts.items()}


def silhouette(x: Tensor, classes: Classes) -> float:
    """Mean silhouette with cosine distance, from the classes' sums: exact, as distances are linear in the vectors.

    A class of one row counts as 0.
    """
    if not 2 <= len(classes.sizes) < len(x):
        return math.nan
    total = 0.0
    for part in _blocks(len(x)):
        codes = classes.codes[part, None]
        # Sums of cosines with each class; a row's own is no pair.
        sums = x[part].double() @ classes.sums.T
        own_size = classes.sizes[codes][:, 0]
        inner = (own_size - sums.gather(1, codes)[:, 0]) / (own_size - 1).clamp(min=1)
        outer = (1.0 - sums / classes.sizes).scatter(1, codes, math.inf).min(1).values
        larger = torch.maximum(inner, outer)
        values = torch.where((own_size > 1) & (larger > 0), (outer - inner) / larger, 0.0)
        total += float(values.sum())
    return total / len(x)


def davies_bouldin(x: Tensor, classes: Classes) -> float:
    """Davies-Bouldin index of x [n, d] on the unit sphere; classes that coincide count as 0, as in scikit-learn."""
    if not 2 <= len(classes.sizes) < len(x):
        return math.nan
    centroids = classes.sums / classes.sizes[:, None]
    spread = torch.zeros_like(classes.sizes)
    for part in _blocks(len(x)):
        codes = classes.codes[part]
        spread.index_add_(0, codes, (x[part].double() - centroids[codes]).norm(dim=1))
    spread /= classes.sizes
    apart = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    if torch.allclose(spread, torch.zeros_like(spread)) or torch.allclose(apart, torch.zeros_like(apart)):
        return 0.0
    apart[apart == 0] = math.inf
    return float(((spread[:, None] + spread) / apart).max(1).values.mean())


def knn_purity(neighbours: Tensor, codes: Tensor) -> float:
    """Mean share of the own class among the nearest `neighbours` [n, k] of known class; codes below 0 have none."""
    found = codes[neighbours]
    known = (found >= 0) & (codes >= 0)[:, None]
    counted = known.sum(1)
    same = ((found == codes[:, None]) & known).sum(1)
    shares = same[counted > 0].double() / counted[counted > 0]
    return float(shares.mean()) if len(shares) else math.nan


def intrinsic_dimension(x: Tensor, neighbours: Tensor) -> float:
    """TwoNN of unit vectors x [n, d] with their two nearest neighbours [n, 2]. Points with an equal are left out."""
    near = torch.stack(
        [
            torch.cat([(x[part].double() - x[neighbours[part, k]].double()).norm(dim=1) for part in _blocks(len(x))])
            for k in range(2)
        ]
    )
    near = near.sort(0).values
    ratios = (near[1] / near[0])[near[0] > 0].log().sort().values.cpu().numpy()
    kept = ratios[: int(len(ratios) * (1 - TWO_NN_DISCARD))]
    if not kept.any():
        return math.nan
    empirical = -np.log1p(-np.arange(1, len(kept) + 1) / len(ratios))
    return float(kept @ empirical / (kept @ kept))


def spectrum(x: npt.NDArray[Any], device: str = "cpu") -> Spectrum:
    """The spectrum of embeddings [n, d] as they are, in float64; what is under a rounding error is 0."""
    num, width = x.shape
    gram = torch.zeros((width, width), dtype=torch.float64, device=device)
    total = torch.zeros(width, dtype=torch.float64, device=device)
    for part in _blocks(num):
        rows = torch.from_numpy(np.asarray(x[part], dtype=np.float64)).to(device)
        gram.addmm_(rows.T, rows)
        total += rows.sum(0)
    squares = torch.linalg.eigvalsh(gram).cpu().numpy()[::-1][: min(num, width)]
    error = width * np.finfo(np.float64).eps
    squares = np.where(squares > squares[0] * error, squares, 0.0)
    covariance = (gram - torch.outer(total, total / num)) / max(1, num - 1)
    if covariance.trace() * num <= gram.trace() * error:
        covariance.zero_()
    return Spectrum(np.sqrt(squares), covariance.cpu().numpy())


def rankme(singular: npt.NDArray[np.float64]) -> float:
    """Exp of the entropy of singular values."""
    shares = singular / singular.sum() + RANKME_EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


def first_component(covariance: npt.NDArray[np.float64]) -> float:
    """Share of the largest eigenvalue of a covariance."""
    eigenvalues = np.linalg.eigvalsh(covariance)
    return float(eigenvalues[-1] / eigenvalues.sum()) if eigenvalues.sum() > 0 else math.nan


def isoscore(covariance: npt.NDArray[np.float64], whole: npt.NDArray[np.float64] | None = None) -> float:
    """IsoScore* of a covariance [d, d], shrunk to that of a larger set if there is one; NaN for d < 2 or no spread."""
    if whole is not None:
        covariance = (1 - ISOSCORE_SHRINKAGE) * covariance + ISOSCORE_SHRINKAGE * whole
    width = len(covariance)
    values = np.linalg.eigvalsh(covariance)
    length = np.linalg.norm(values)
    if width < 2 or not length:
        return math.nan
    defect = np.linalg.norm(values * math.sqrt(width) / length - 1) / math.sqrt(2 * (width - math.sqrt(width)))
    used = (width - defect**2 * (width - math.sqrt(width))) ** 2 / width**2
    return float((width * used - 1) / (width - 1))
