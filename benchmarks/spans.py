"""Span sampling on one core: documents a minute for 2 anchors and 2 positives, in small batches and in large chunks.

Run `python benchmarks/spans.py --documents 1000000`. The last line is JSON; each number is the median of 5 repeats.
"""

import argparse
import json
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from raylab.training.spans import sample_spans

NUM_REPEATS = 5


def measure_rate(lengths: NDArray[np.int64], chunk_size: int) -> float:
    """Documents a minute when lengths[N] are sampled chunk_size documents at a time."""
    rows = np.arange(len(lengths))
    rates = []
    for seed in range(NUM_REPEATS):
        start = time.perf_counter()
        for first in range(0, len(lengths), chunk_size):
            chunk = slice(first, first + chunk_size)
            sample_spans(
                lengths[chunk],
                rows[chunk],
                seed,
                num_anchors=2,
                num_positives=2,
                max_span=256,
                min_span=32,
                sampling="any",
            )
        rates.append(60.0 * len(lengths) / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=200_000, help="documents a repeat (default %(default)s)")
    num_documents = parser.parse_args().documents
    if num_documents < 1:
        parser.error("--documents must be at least 1")
    lengths = np.random.default_rng(0).integers(128, 4096, num_documents)
    results = {}
    for name, chunk_size in (("documents_per_minute_batches_64", 64), ("documents_per_minute", 100_000)):
        rate = measure_rate(lengths, chunk_size)
        print(f"chunks of {chunk_size:>7,} documents: {rate / 1e6:7.1f} million documents a minute")
        results[name] = round(rate)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
