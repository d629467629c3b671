"""Pre-training on GPUs for benchmarks/pretrain.py: raylab's own loop, as a trial runs it, beside its peers.

Texts are random tokens: 4,000 documents with room for spans of 32 to 512 tokens, or texts of 100 to 512 tokens.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from recipes import Measured, make_roberta, run_declutr, run_pairs, run_trainer
from torch import multiprocessing

from raylab.base.world import ALONE, World
from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Corpus, Pretrain
from raylab.job.specs import Resources
from raylab.training.batches import UNITS, Units
from raylab.training.loop import Data, Progress, Training, make_optimizer, prepare_encoder, train
from raylab.training.objectives import Learner
from raylab.training.speed import measure_peak
from raylab.training.steps import Place, iterate_steps

BASE = {
    "vocab_size": 50_265, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
}  # fmt: skip
SMALL = BASE | {"vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
# Spans of 32 to 512 tokens, the two special ones included, of documents that have room for them.
DOCUMENTS, TEXTS, WHOLE = (2048, 3000), (100, 510), (510, 510)
# What 16 documents with 2 anchors and 2 positives each bring in the mean.
STEP = 23_700
SPANS = {"num_anchors": 2, "num_positives": 2, "max_span": 510, "min_span": 30}
CATEGORIES = 8


class Case(NamedTuple):
    """What is trained: the encoder, settings of `pretrain`, and the least and most tokens of a document."""

    config: dict[str, Any]
    pretrain: dict[str, Any]
    lengths: tuple[int, int]


class Ours(NamedTuple):
    """Medians: seconds a step, tokens and documents a step; FLOPs needed a step; the seconds that a call of the loop
    takes besides its steps, once a rung; the most bytes that torch held (a CUDA graph's tensors count in no other
    number); seconds of set-up."""

    seconds: float
    tokens: float
    documents: float
    flops: float
    start: float
    memory: int
    setup: float


def make_data(case: Case) -> tuple[Pretrain, Data, Units]:
    """Random documents, enough that none comes twice in a measured run, and what the objective draws from them."""
    pretrain = Pretrain.model_validate({"num_tokens": 10**10, "warmup_fraction": 0.001} | case.pretrain)
    size = case.config["vocab_size"]
    vocabulary = Vocabulary(prefix_id=0, suffix_id=2, pad_id=1, mask_id=4, special_ids=[0, 1, 2, 3, 4], size=size)
    rng = np.random.default_rng(0)
    low, high = case.lengths
    offsets = np.concatenate([[0], np.cumsum(rng.integers(low, high + 1, 4000))]).astype(np.int64)
    store = TokenStore(rng.integers(5, size, offsets[-1], dtype=np.int32), offsets)
    categories = rng.integers(0, CATEGORIES, 4000) if pretrain.objective == "metadata" else None
    corpus = Corpus.model_construct(max_length=512, long_documents="truncate")
    units = UNITS[pretrain.objective](store, np.arange(4000), vocabulary, corpus, pretrain, 0)
    return pretrain, Data(store, {}, vocabulary, categories, CATEGORIES if categories is not None else 0), units


def make_training(case: Case, pretrain: Pretrain, data: Data, compiled: str, world: World = ALONE) -> Training:
    """As a trial makes it, from random weights."""
    learner = Learner(make_roberta(case.config), pretrain, data.num_categories).to(f"cuda:{world.rank}")
    prepare_encoder(learner, Resources(compile=compiled), world)  # type: ignore[arg-type]
    return Training(learner, make_optimizer(learner, pretrain), Progress())


def draw_inputs(case: Case, steps: int) -> list[tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]]:
    """Of each step the anchors (or texts) and the positives, unmasked: what a peer gets."""
    pretrain, _, units = make_data(case._replace(pretrain=case.pretrain | {"mlm": {"mask_fraction": 1e-12}}))
    drawn = []
    places = iterate_steps(units, pretrain.batch_tokens, 0, Place(0, 0))
    for _ in range(steps):
        step = next(places)
        inputs = units.build(step.epochs, step.units)
        parts = np.split(inputs.input_ids, inputs.offsets[1:-1])
        drawn.append((parts[: len(inputs.rows)], parts[len(inputs.rows) :]))
    return drawn


def measure(
    case: Case,
    repeats: int,
    steps: int,
    compiled: str = "always",
    world: World | None = None,
    profile: str | None = None,
) -> Ours:
    """Runs the loop, by default on one GPU.

    Each repeat takes a short call from a long one, of `steps` steps more: what is left is that of the steps alone.
    """
    world = world or ALONE
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pretrain, data, units = make_data(case)
    training = make_training(case, pretrain, data, compiled, world)
    progress = training.progress
    begun = time.perf_counter()

    def go(number: int) -> NDArray[np.float64]:
        """Seconds, steps, tokens, FLOPs and documents of a call of the loop."""
        before = np.array([time.perf_counter(), *count_done(progress, units)])
        # Steps are all but full.
        train(training, units, data, pretrain, 0, progress.tokens + int((number - 0.5) * pretrain.batch_tokens), world)
        torch.cuda.synchronize()
        return np.array([time.perf_counter(), *count_done(progress, units)]) - before

    go(30)
    setup = time.perf_counter() - begun
    rows = []
    for _ in range(repeats):
        short, more = go(10), go(10 + steps)
        seconds, number, tokens, flops, documents = more - short
        each = seconds / number
        rows.append([each, tokens / number, documents / number, flops / number, short[0] - short[1] * each])
    if profile:
        with torch.profiler.profile() as found:
            go(4)
        table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
        with open(profile, "w") as file:
            file.write(table)
    medians = [float(statistics.median(column)) for column in zip(*rows, strict=True)]
    return Ours(*medians, torch.cuda.max_memory_reserved(), setup)


def count_done(progress: Progress, units: Units) -> tuple[float, ...]:
    """Steps, tokens, FLOPs and documents or texts so far; those taken ahead of their place are of a call's steps as
    often as of those before it."""
    return progress.step, progress.tokens, progress.flops, progress.epoch * units.num + progress.position


def make_cases() -> dict[str, Case]:
    """What is timed."""
    declutr = {"objective": "declutr", "batch_tokens": STEP, "declutr": SPANS}
    small = {"batch_tokens": 24_000}
    pairs = {"declutr": SPANS | {"num_positives": 1}, "mlm": {"weight": 0.0}}
    metadata = {"objective": "metadata", "metadata": {"field": "category"}}
    return {
        "declutr": Case(BASE, declutr, DOCUMENTS),
        "mlm": Case(BASE, {"objective": "mlm", "batch_tokens": 64 * 512}, WHOLE),
        "pairs": Case(BASE, declutr | pairs | {"batch_tokens": 17_500}, DOCUMENTS),
        "small_declutr": Case(SMALL, declutr | small, DOCUMENTS),
        "small_mlm": Case(SMALL, {"objective": "mlm"} | small, TEXTS),
        "small_metadata": Case(SMALL, metadata | small, TEXTS),
    }


def describe(ours: Ours, peak: float) -> dict[str, float]:
    """A measurement in the units of the results."""
    return {
        "milliseconds": 1e3 * ours.seconds,
        "tokens_per_second": ours.tokens / ours.seconds,
        "documents_per_second": ours.documents / ours.seconds,
        "mfu": ours.flops / ours.seconds / peak,
        "start_milliseconds": 1e3 * ours.start,
        "peak_memory_gb": ours.memory / 1e9,
        "setup_seconds": ours.setup,
    }


def _send(queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    queue.put(tuple(function(*arguments)))


def run_apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """A function's named tuple, from a process of its own: what ran before, profilers above all, slows what follows."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_send, args=(queue, function, arguments))
    process.start()
    while True:
        try:
            found: tuple[Any, ...] = queue.get(timeout=2)
            break
        except Empty:
            if not process.is_alive():
                raise SystemExit(f"{function.__name__} failed") from None
    process.join()
    return found


def compare_peers(repeats: int, steps: int, profile: str | None = None) -> dict[str, Any]:
    """Every case on one GPU, peers first; prints as it goes, and returns the figures and what they are of."""
    cases = make_cases()
    with torch.autocast("cuda", torch.bfloat16):
        peak = measure_peak(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s, torch {torch.__version__}", flush=True)
    peers: dict[str, dict[str, float]] = {}

    def note(name: str, documents: float, tokens: float, function: Callable[..., Any], *arguments: Any) -> None:
        found = Measured(*run_apart(function, *arguments))
        peers[name] = {
            "documents_per_second": documents / found.seconds,
            "tokens_per_second": tokens / found.seconds,
            # Of tensors alone: padded shapes that change every step leave gaps, which a peer could do without.
            "peak_memory_gb": found.memory / 1e9,
            "held_memory_gb": found.held / 1e9,
        }
        print(name, peers[name], flush=True)

    drawn = draw_inputs(cases["declutr"], 12)
    tokens = statistics.mean(sum(len(part) for part in a + p) for a, p in drawn)
    documents = statistics.mean(len(a) for a, _ in drawn) / SPANS["num_anchors"]
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    note("recipe", documents, tokens, run_declutr, BASE | dropout, drawn, SPANS["num_positives"], repeats, 12)
    batch = 64
    note("trainer", batch, batch * 512, run_trainer, BASE | dropout, 512, batch, repeats, steps)
    drawn = draw_inputs(cases["pairs"], (10 + repeats * steps) // 4)
    pairs = [pair for a, p in drawn for pair in zip(a, p, strict=True)]
    size = round(statistics.mean(len(a) for a, _ in drawn))
    tokens = size * statistics.mean(len(a) + len(p) for a, p in pairs)
    note("pairs", size / SPANS["num_anchors"], tokens, run_pairs, BASE | dropout, pairs, size, repeats, steps)
    found: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        kept = profile and f"{profile}-{name}.txt"
        found[name] = describe(Ours(*run_apart(measure, case, repeats, 5 * steps, "always", None, kept)), peak)
        print(name, found[name], flush=True)

    def ratio(ours: str, peer: str, unit: str) -> float:
        return round(found[ours][unit] / peers[peer][unit], 3)

    small = {name: value["tokens_per_second"] for name, value in found.items() if name.startswith("small_")}
    return {
        "declutr_speedup": ratio("declutr", "recipe", "documents_per_second"),
        "declutr_mfu": round(found["declutr"]["mfu"], 3),
        "declutr_memory": ratio("declutr", "recipe", "peak_memory_gb"),
        "mlm_speedup": ratio("mlm", "trainer", "tokens_per_second"),
        "st_speedup": ratio("pairs", "pairs", "documents_per_second"),
        "small_tokens_per_second": round(min(small.values())),
        "peak_tflops": round(peak / 1e12),
        "ours": found,
        "peers": peers,
    }


def measure_scaling(size: int, repeats: int, steps: int) -> dict[str, float]:
    """Tokens a second of `size` GPUs over `size` times those of one, with the same tokens for each."""
    found = {}
    for name in ("declutr", "small_declutr"):
        case = make_cases()[name]
        rates = []
        for workers in (1, size):
            batch = {"batch_tokens": workers * case.pretrain["batch_tokens"]}
            (ours,) = measure_workers([case._replace(pretrain=case.pretrain | batch)], workers, repeats, steps)
            rates.append(ours.tokens / ours.seconds)
            print(f"{name}, {workers} GPUs: {rates[-1]:.0f} tokens a second, {ours}", flush=True)
        found[name] = round(rates[1] / (size * rates[0]), 3)
        print(f"{name}: {found[name]} of linear", flush=True)
    return {f"scaling_{size}": found["declutr"], f"scaling_{size}_small": found["small_declutr"]}


def _work(rank: int, size: int, cases: Sequence[Case], repeats: int, steps: int, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size)

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    for case in cases:
        found = measure(case, repeats, steps, world=World(rank, size, broadcast))
        if rank == 0:
            queue.put(tuple(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_workers(cases: Sequence[Case], size: int, repeats: int, steps: int) -> list[Ours]:
    """Each case on `size` GPUs, a process each."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_work, args=(rank, size, cases, repeats, steps, queue)) for rank in range(size)]
    for process in processes:
        process.start()
    found = [Ours(*queue.get(timeout=500)) for _ in cases]
    for process in processes:
        process.join()
    return found
