"""Pre-training on this machine's processor: what data cost, and packed steps against padded ones.

Run `python benchmarks/pretrain.py --threads 2`, with the machine left to it. The last line is JSON:
`data_tokens_per_second_OBJECTIVE` of sampling, masking and packing alone, on one core; `declutr_speedup_cpu` and
`mlm_speedup_cpu`, packed steps of a 6 x 384 encoder against those of a padded float32 recipe: anchors and positives in
two passes, each padded to its longest, logits of masked tokens alone. A step is forward, backward and gradient norm,
without dropout, on the same inputs by turns in one process. Packed steps compute as `pretrain.precision: auto`
chooses, which is printed; their losses are compared with the recipe's. Every number is a median.

`--device cuda` runs on one GPU instead (benchmarks/accelerator.py), beside the peers of benchmarks/recipes.py:
`declutr_speedup`, documents a second over those of the reference recipe, `declutr_mfu` and `declutr_memory`;
`mlm_speedup`, tokens a second over `transformers.Trainer`'s; `st_speedup`, documents a second over those of
`sentence-transformers`; `small_tokens_per_second`, the least of three objectives. `--gpus 2` runs on so many GPUs and
gives `scaling_2`, the share of linear, with the same tokens for each GPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from recipes import compute_losses
from torch import Tensor, nn

from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Corpus, EncoderConfig, Pretrain
from raylab.training.batches import UNITS, Inputs, Units
from raylab.training.encoder import build_encoder, is_half, name_precision, precision
from raylab.training.feed import make_batch
from raylab.training.objectives import Learner, Totals
from raylab.training.steps import Place, iterate_steps

SIZE = 16_000
VOCABULARY = Vocabulary(prefix_id=0, suffix_id=2, pad_id=1, mask_id=4, special_ids=[0, 1, 2, 3, 4], size=SIZE)
ENCODER = EncoderConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, dropout=0.0
)
SPANS = {"num_anchors": 2, "num_positives": 2, "max_span": 256, "min_span": 32, "short_documents": "shrink"}


def make_units(objective: str, shortest: int, longest: int, batch_tokens: int) -> tuple[Pretrain, Units]:
    """Random documents of `shortest` to `longest` tokens, and what the objective draws from them."""
    settings = {"objective": objective, "num_tokens": 10**7, "batch_tokens": batch_tokens}
    pretrain = Pretrain.model_validate(settings | ({"declutr": SPANS} if objective == "declutr" else {}))
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(shortest, longest, 2000))]).astype(np.int64)
    store = TokenStore(rng.integers(5, SIZE, offsets[-1], dtype=np.int32), offsets)
    corpus = Corpus.model_construct(max_length=512, long_documents="truncate")
    return pretrain, UNITS[objective](store, np.arange(2000), VOCABULARY, corpus, pretrain, 0)


def measure_data(objective: str, repeats: int) -> float:
    """Tokens a second of CPU time, steps of 24,000 tokens."""
    pretrain, units = make_units(objective, 1000, 4000, 24_000)
    steps = iterate_steps(units, pretrain.batch_tokens, 0, Place(0, 0))
    rates = []
    for _ in range(repeats):
        begun, tokens = time.process_time(), 0
        for _ in range(40):
            step = next(steps)
            units.build(step.epochs, step.units)
            tokens += step.num_tokens
        rates.append(tokens / (time.process_time() - begun))
    return statistics.median(rates)


def compute_packed(learner: Learner, inputs: Inputs) -> Tensor:
    """The sum of the losses, as raylab computes them."""
    batch = make_batch(inputs, None)
    totals = Totals(torch.tensor(float(len(batch.targets))), torch.tensor(0.0), 1, 1)
    with precision(torch.device("cpu"), is_half(learner.pretrain.precision, learner.encoder)):
        return torch.stack(list(learner(batch, totals).values())).sum()


def compute_padded(learner: Learner, inputs: Inputs) -> Tensor:
    """The same from padded texts."""
    return torch.stack(list(compute_losses(learner, inputs, VOCABULARY.pad_id).values())).sum()


def compare(objective: str, batch_tokens: int, repeats: int) -> tuple[float, float, float]:
    """Tokens a second packed and padded, and the speedup: medians over steps. Raises where their losses differ."""
    shortest, longest = (300, 2500) if objective == "declutr" else (30, 700)
    pretrain, units = make_units(objective, shortest, longest, batch_tokens)
    learner = Learner(build_encoder(ENCODER, VOCABULARY, 512, 0), pretrain, 0)
    half = is_half(pretrain.precision, learner.encoder)
    print(f"{objective}: packed steps in {name_precision(half)}", flush=True)
    tolerance = 1e-2 if half else 1e-4
    steps = iterate_steps(units, batch_tokens, 0, Place(0, 0))
    ways: dict[str, Callable[[Learner, Inputs], Tensor]] = {"packed": compute_packed, "padded": compute_padded}
    rates: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        step = next(steps)
        inputs = units.build(step.epochs, step.units)
        seconds, losses = {}, {}
        for name in sorted(ways, reverse=repeat % 2 == 1):
            learner.zero_grad()
            begun = time.perf_counter()
            loss = ways[name](learner, inputs)
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            seconds[name], losses[name] = time.perf_counter() - begun, loss.item()
        if abs(losses["packed"] - losses["padded"]) > tolerance * losses["padded"]:
            raise SystemExit(f"{objective}: losses differ: {losses}")
        if repeat:  # the first warms up
            rates.append((step.num_tokens / seconds["packed"], step.num_tokens / seconds["padded"]))
    packed, padded = zip(*rates, strict=True)
    return statistics.median(packed), statistics.median(padded), statistics.median(a / b for a, b in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of torch (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8000, help="a step (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--gpus", type=int, default=1, help="2 or more: how they scale")
    parser.add_argument("--steps", type=int, default=20, help="a repeat, on GPUs (default %(default)s)")
    parser.add_argument("--profile", help="where profiles of the steps on a GPU are written: PATH-CASE.txt")
    options = parser.parse_args()
    if options.device == "cuda":
        import accelerator

        if options.gpus > 1:
            print(json.dumps(accelerator.measure_scaling(options.gpus, options.repeats, 5 * options.steps)))
        else:
            print(json.dumps(accelerator.compare_peers(options.repeats, options.steps, options.profile)))
        return
    torch.set_num_threads(options.threads)
    results: dict[str, float] = {}
    for objective in ("declutr", "mlm"):
        rate = measure_data(objective, options.repeats)
        print(f"{objective}: sampling, masking and packing {rate / 1e6:.1f} million tokens a second", flush=True)
        results[f"data_tokens_per_second_{objective}"] = round(rate)
    for objective in ("declutr", "mlm"):
        packed, padded, speedup = compare(objective, options.tokens, options.repeats)
        print(f"{objective}: packed {packed:.0f}, padded {padded:.0f} tokens a second: {speedup:.2f} times", flush=True)
        results[f"{objective}_speedup_cpu"] = round(speedup, 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
