"""Every metric of an embedding space: what it is, where it is from, its unit and which way is better."""

import math
from typing import Literal, NamedTuple

UNIFORMITY_T = 2.0
ALIGNMENT_ALPHA = 2.0
BIN_WIDTH = 0.1
BINS = tuple(round(-1 + BIN_WIDTH * index, 1) for index in range(20))
TWO_NN_DISCARD = 0.1
ISOSCORE_SHRINKAGE = 0.2
NUM_PERMUTATIONS = 20
# What values of a unit can't leave: neither do the ends of an interval.
BOUNDS = {
    "share": (0.0, 1.0),
    "coefficient": (-1.0, 1.0),
    "cosine": (-1.0, 1.0),
    "squared distance": (0.0, 4.0),
    "ratio": (0.0, math.inf),
    "dimensions": (0.0, math.inf),
    "edges": (0.0, math.inf),
    "components": (1.0, math.inf),
    "nats": (-math.inf, 0.0),
}

Direction = Literal["max", "min", "none"]
Reference = Literal["labels", "pairs", "gaussian"]
Setting = Literal["thresholds", "densities", "neighbours"]


class Definition(NamedTuple):
    """A metric. `direction` says what is better (none: neither).

    `parameter`: fixed values that it is measured at, or the name of the setting of evaluate.geometry that lists them.
    `reference`: what the table's column `reference` holds: the mean over shuffles of what `labels` or `pairs` say, or
    the value of Gaussian vectors of the same number and dimension. `grows`: in proportion to the number of points.
    """

    text: str
    source: str
    unit: str
    direction: Direction
    reference: Reference
    parameter: tuple[float, ...] | Setting | None = None
    grows: bool = False


WANG_ISOLA = "Wang and Isola 2020, arXiv 2005.10242"
NEWMAN = "Newman 2003, arXiv cond-mat/0209450"

_SPACE = {
    "uniformity": Definition(
        "log of the mean of exp(-2 ||x - y||^2) over all pairs; lower: more evenly spread",
        f"{WANG_ISOLA}, section 4.1.2, t = 2", "nats", "min", "gaussian", (UNIFORMITY_T,),
    ),
    "alignment": Definition(
        "mean ||x - y||^2 over the pairs of a class, then the mean over classes with 2 points or more; lower: tighter",
        f"{WANG_ISOLA}, section 4.1.1, alpha = 2, the pairs of a class as positives", "squared distance", "min",
        "labels", (ALIGNMENT_ALPHA,),
    ),
    "alignment_spans": Definition(
        "mean ||x - y||^2 of two spans of one document that follow each other and share no token; lower: closer",
        f"{WANG_ISOLA}, section 4.1.1, alpha = 2, spans of a document as positives", "squared distance", "min",
        "pairs", (ALIGNMENT_ALPHA,),
    ),
    "cosine_within": Definition(
        "mean cosine over all same-class pairs, so large classes weigh more; higher: tighter classes",
        "direct", "cosine", "max", "labels",
    ),
    "cosine_between": Definition(
        "mean cosine over all different-class pairs; lower: classes further apart", "direct", "cosine", "min", "labels",
    ),
    "cosine_within_share": Definition(
        "share of the same-class pairs whose cosine lies in the bin of width 0.1 from the parameter; of at most 4,096 "
        "rows", "direct", "share", "none", "labels", BINS,
    ),
    "cosine_between_share": Definition(
        "share of the different-class pairs whose cosine lies in the bin of width 0.1 from the parameter; of at most "
        "4,096 rows", "direct", "share", "none", "labels", BINS,
    ),
    "anisotropy": Definition(
        "mean cosine of two different points, over all pairs; lower: no direction is shared",
        "Ethayarajh 2019, arXiv 1909.00512, section 3.4, over all pairs in place of random ones", "cosine", "min",
        "gaussian",
    ),
    "first_component": Definition(
        "share of the variance of the embeddings, as they are, on their first principal component; lower: more even",
        "Mu and Viswanath 2018, arXiv 1702.01417, section 2", "share", "min", "gaussian",
    ),
    "rankme": Definition(
        "exp of the entropy of the singular values of the embeddings, as they are, over their sum (+ 1e-7); higher: "
        "more dimensions are used",
        "Garrido et al. 2023, arXiv 2210.02885, equation 1", "dimensions", "max", "gaussian",
    ),
    "isoscore": Definition(
        "IsoScore*: evenness of the eigenvalues of the covariance of the embeddings, as they are, shrunk by 0.2 to "
        "that of all rows where these are a sample; from 0 to 1, higher: more even",
        "Rudman and Eickhoff 2024, arXiv 2305.19358, algorithm 1", "share", "max", "gaussian",
    ),
    "silhouette": Definition(
        "mean silhouette of the classes with cosine distance, from -1 to 1; higher: classes apart",
        "Rousseeuw 1987, doi 10.1016/0377-0427(87)90125-7", "coefficient", "max", "labels",
    ),
    "davies_bouldin": Definition(
        "mean over classes of the largest ratio of two classes' mean distances to their centroids, summed, to the "
        "distance of the centroids, on the unit sphere; lower: classes apart",
        "Davies and Bouldin 1979, doi 10.1109/TPAMI.1979.4766909", "ratio", "min", "labels",
    ),
    "knn_purity": Definition(
        "mean share of a point's own class among its k nearest neighbours by cosine, those without a class left out; "
        "higher: classes apart", "direct", "share", "max", "labels", "neighbours",
    ),
    "intrinsic_dimension": Definition(
        "TwoNN: slope through the origin of -log(1 - F) on log(r2 / r1), r1 and r2 the distances to the two nearest "
        "neighbours on the unit sphere, the largest tenth of the ratios left out",
        "Facco et al. 2017, doi 10.1038/s41598-017-11873-y, steps 1 to 6 of the algorithm", "dimensions", "none",
        "gaussian",
    ),
}  # fmt: skip

# The graphs: what joins two points, and the setting that lists the parameter.
GRAPHS: dict[str, tuple[str, Setting]] = {
    "graph": ("cosine >= the parameter", "thresholds"),
    "density": ("cosine >= the cosine that joins the parameter's share of the pairs", "densities"),
    "centred": ("cosine >= the parameter after subtracting the mean of the unit vectors", "thresholds"),
    "mutual": ("each is among the other's k nearest by cosine, k the parameter", "neighbours"),
}
_MEASURES: dict[str, tuple[str, str, str, Direction, Reference, bool]] = {
    "components": ("number of connected components", "direct", "components", "none", "gaussian", True),
    "largest_share": ("share of the points in the largest component", "direct", "share", "none", "gaussian", False),
    "isolated_share": ("share of the points without an edge", "direct", "share", "none", "gaussian", False),
    "mean_degree": ("mean number of edges of a point", "direct", "edges", "none", "gaussian", True),
    "clustering": (
        "transitivity: 3 x triangles / pairs of edges that meet; over 50 million edges estimated from sampled pairs, "
        "with an interval", "Newman 2003, arXiv cond-mat/0303516, equation 3", "share", "none", "gaussian", False,
    ),
    "assortativity": (
        "assortativity by class of the edges between points of known class, at most 1; higher: edges stay in a class",
        f"{NEWMAN}, equation 2", "coefficient", "max", "labels", False,
    ),
    "modularity": (
        "modularity of the classes over the edges between points of known class; higher: edges stay in a class",
        "Newman 2004, arXiv cond-mat/0309508, equation 5", "coefficient", "max", "labels", False,
    ),
}  # fmt: skip

DEFINITIONS: dict[str, Definition] = {
    **_SPACE,
    **{
        f"{graph}_{name}": Definition(
            f"{text}, of the graph that joins points if {rule}", source, unit, direction, reference, parameter,
            # At a share of the pairs the number of edges grows with the points; a mutual graph's degree does not.
            grows and (name, graph) != ("mean_degree", "mutual"),
        )
        for graph, (rule, parameter) in GRAPHS.items()
        for name, (text, source, unit, direction, reference, grows) in _MEASURES.items()
    },
}  # fmt: skip
