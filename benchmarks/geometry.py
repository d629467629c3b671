"""Geometry of embeddings in blocks, against torch.pdist and networkx for the same outputs; and all of it at scale.

    python benchmarks/geometry.py --quick                 8,000 x 768 alone
    python benchmarks/geometry.py                         and how our time grows with n
    python benchmarks/geometry.py --large [--device cuda]  250,000 x 768, every metric, ten thresholds

Compared: uniformity, components and degrees, at the cosines that join 0.1, 1 and 5 % of the pairs. Each repeat times
ours, then theirs; `speedup` is the median of the repeats' ratios. Vectors are a mixture of 50 Gaussian classes that
share a direction. The last line is one JSON object.
"""

import argparse
import json
import math
import resource
import statistics
import time
from typing import Any

import networkx as nx
import numpy as np
import torch

from raylab.measures.cosines import Level, Space, find_cosine, load_rows, sample_pairs, scan
from raylab.measures.geometry import GeometryValue, Options, measure_geometry

WIDTH = 768
NUM_CLASSES = 50
DENSITIES = (0.001, 0.01, 0.05)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)


def draw_points(num: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [num, WIDTH] and their classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, NUM_CLASSES, num)
    centres = 0.7 * rng.standard_normal((NUM_CLASSES, WIDTH), dtype=np.float32) + 0.6
    x = rng.standard_normal((num, WIDTH), dtype=np.float32)
    x += centres[labels]
    return x, labels


def run_ours(x: np.ndarray, thresholds: list[float], device: str) -> dict[str, Any]:
    """Uniformity, and at each threshold the number of components and the degrees."""
    levels = [Level(False, threshold) for threshold in thresholds]
    found = scan(Space(load_rows(x, device)), levels, list_edges=False)
    links = [found.links[level] for level in levels]
    return {
        "uniformity": math.log(found.kernel),
        "components": [len(np.unique(link.components)) for link in links],
        "degrees": [link.degrees for link in links],
    }


def run_theirs(x: np.ndarray, thresholds: list[float]) -> dict[str, Any]:
    """The same with torch.pdist and networkx; a cosine of t is a distance of sqrt(2 - 2 t)."""
    unit = torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
    distances = torch.pdist(unit)
    result: dict[str, Any] = {"uniformity": float(distances.pow(2).mul(-2).exp().mean().log())}
    result |= {"components": [], "degrees": []}
    rows, columns = torch.triu_indices(len(x), len(x), 1)
    for threshold in thresholds:
        joined = distances <= math.sqrt(2 - 2 * threshold)
        graph = nx.Graph()
        graph.add_nodes_from(range(len(x)))
        graph.add_edges_from(zip(rows[joined].tolist(), columns[joined].tolist(), strict=True))
        result["components"].append(nx.number_connected_components(graph))
        result["degrees"].append(np.array([degree for _, degree in graph.degree()]))
    return result


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The largest differences: of uniformity, and as shares of the value, of components and degrees (their mean).

    A threshold is some pair's own cosine: a rounding error of float32, on either side, joins that pair or not.
    """
    degrees = list(zip(ours["degrees"], theirs["degrees"], strict=True))
    components = zip(ours["components"], theirs["components"], strict=True)
    return {
        "uniformity": abs(ours["uniformity"] - theirs["uniformity"]),
        "components": max(abs(a - b) / b for a, b in components),
        "degrees": max(float(np.abs(a - b).mean() / b.mean()) for a, b in degrees),
    }


def choose_thresholds(x: np.ndarray) -> list[float]:
    """The cosines that join DENSITIES of the pairs."""
    pairs = sample_pairs(Space(load_rows(x)), False)
    return [find_cosine(pairs, density) for density in DENSITIES]


def time_ours(x: np.ndarray, thresholds: list[float], device: str) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    found = run_ours(x, thresholds, device)
    return time.perf_counter() - start, found


def run_comparison(repeats: int, device: str) -> dict[str, Any]:
    """8,000 points, ours and theirs in turns."""
    x, _ = draw_points(8000)
    thresholds = choose_thresholds(x)
    time_ours(x[:2000], thresholds, device)
    rows, differences = [], {}
    for repeat in range(repeats):
        ours_seconds, ours = time_ours(x, thresholds, device)
        start = time.perf_counter()
        theirs = run_theirs(x, thresholds)
        theirs_seconds = time.perf_counter() - start
        differences = compare(ours, theirs)
        rows.append((theirs_seconds / ours_seconds, ours_seconds, theirs_seconds))
        print(f"repeat {repeat}: ours {ours_seconds:.2f} s, theirs {theirs_seconds:.2f} s, {rows[-1][0]:.1f} times")
    for name, value in differences.items():
        print(f"largest difference of {name}: {value:.3g}")
    speedups, ours_all, theirs_all = zip(*rows, strict=True)
    return {
        "points": 8000,
        "speedup": round(statistics.median(speedups), 2),
        "ours_seconds": round(statistics.median(ours_all), 3),
        "theirs_seconds": round(statistics.median(theirs_all), 3),
        "max_difference": max(differences.values()),
    }


def run_growth(device: str) -> dict[str, float]:
    """Our seconds by number of points."""
    growth = {}
    for num in (2000, 4000, 8000, 16_000):
        x, _ = draw_points(num)
        thresholds = choose_thresholds(x)
        growth[str(num)] = round(min(time_ours(x, thresholds, device)[0] for _ in range(3)), 3)
        print(f"{num:>7,} points: {growth[str(num)]:.3f} s")
    return growth


def run_large(num: int, device: str) -> dict[str, Any]:
    """Every metric of many points."""
    x, labels = draw_points(num)
    options = Options(THRESHOLDS, DENSITIES, (1, 10), device)
    start, cpu_start = time.perf_counter(), time.process_time()
    rows: list[GeometryValue] = measure_geometry(x, labels, options=options, max_points=num, graph_points=num, seed=0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    for row in rows:
        if "_share" not in row.metric or row.metric.endswith(("largest_share", "isolated_share")):
            interval = "" if math.isnan(row.low) else f" [{row.low:.4f}, {row.high:.4f}]"
            print(f"{row.metric:28s} {'' if row.parameter is None else row.parameter!s:>6} {row.value:.5g}{interval}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "large_points": num,
        "large_seconds": round(seconds, 1),
        "large_cpu_seconds": round(cpu_seconds, 1),
        "large_peak_memory_gb": round(peak / 1e9, 2),
        "large_clustering_estimated": sum(not math.isnan(row.low) for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the comparison at 8,000 points alone")
    parser.add_argument("--large", action="store_true", help="every metric of many points alone")
    parser.add_argument("--points", type=int, default=250_000, help="of --large (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of the comparison (default %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU (default %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"device": given.device, "threads": given.threads, "width": WIDTH}
    if given.large:
        result |= run_large(given.points, given.device)
    else:
        result |= run_comparison(given.repeats, given.device)
        if not given.quick:
            result["growth_seconds"] = run_growth(given.device)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
