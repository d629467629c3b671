"""What an encoder costs to run: latency, throughput and memory, and what a kept embedding saves. No text is needed."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from raylab.base.memory import read_peak, reset_peak
from raylab.base.mistakes import JobError
from raylab.runs.trials import TRIAL_ID, find_trial, open_final
from raylab.training.encoder import encode, inspect_encoder, load_encoder, pool

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
# The head of a fine-tuned encoder, as `evaluate.fine_tune` has it by default, and as many classes as a task may have.
HEAD_SIZE = 128
NUM_CLASSES = 10
WARM_UP = 3
FEWEST = 3
# Embeddings that are kept: rows of a table, drawn at random.
KEPT = 10_000


class Load(NamedTuple):
    """What is measured: each precision on each device, each number of texts at once at each length in tokens."""

    devices: tuple[str, ...]
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    batches: tuple[int, ...] = (1, 8, 32)
    lengths: tuple[int, ...] | None = None
    repeats: int = 30
    seconds: float = 2.0


LENGTHS = (32, 128, 512)


def list_devices() -> tuple[str, ...]:
    """The kinds of device of this machine."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def check_load(load: Load, positions: int | None) -> tuple[int, ...]:
    """The lengths to measure: those asked for, or the usual ones that the encoder can take. Raises JobError."""
    problems = [
        f"--{name}: '{value}' is not one of {', '.join(valid)}"
        for name, values, valid in (
            ("devices", load.devices, list_devices()),
            ("precisions", load.precisions, tuple(PRECISIONS)),
        )
        for value in values
        if value not in valid
    ]
    lengths = load.lengths or tuple(n for n in LENGTHS if positions is None or n <= positions) or (positions or 0,)
    if positions is not None and max(lengths) > positions:
        problems.append(f"--lengths: {max(lengths)} exceeds the encoder's {positions} positions; lower it")
    if problems:
        raise JobError(problems)
    return lengths


def profile_encoder(path: str, load: Load, tell: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """A row for every device, precision, length and batch: `work` is encode, or kept.

    encode: token ids enter, class scores leave: forward pass, mean pooling and a head, as in a fine-tuned encoder.
    kept: embeddings [10,000, D] are there; some are picked, and the same head gives class scores: no length.
    p50_ms, p95_ms: milliseconds a batch, over `repeats` calls (fewer, 3 at least, where `seconds` are over) after a
    warm-up; the way to the device and back counts. texts_per_s, tokens_per_s: at p50. peak_mb: megabytes of the
    process, torch itself included (cpu), or that torch held (cuda). kept_speedup: p50 of encode over that of kept
    at the same device, precision and batch. What does not fit a GPU has null numbers. Raises JobError.
    """
    lengths = check_load(load, inspect_encoder(path, None)["positions"])
    rows: list[dict[str, Any]] = []
    for device in map(torch.device, load.devices):
        for precision in load.precisions:
            model = load_encoder(path)[0].base_model.to(device, PRECISIONS[precision]).eval()  # type: ignore[union-attr]
            head = _make_head(model).to(device).eval()
            for batch in load.batches:
                tell(f"{device.type} {precision} batch {batch}")
                common = {"device": device.type, "precision": precision, "batch": batch}
                kept = _measure(_classify_kept(head, model, batch, device), device, batch, None, load)
                for length in lengths:
                    found = _measure(_encode(head, model, batch, length, device), device, batch, length, load)
                    both = found["p50_ms"] is not None and kept["p50_ms"] is not None
                    times = {"kept_speedup": found["p50_ms"] / kept["p50_ms"] if both else None}
                    rows.append(common | {"work": "encode", "length": length} | found | times)
                rows.append(common | {"work": "kept", "length": None} | kept | {"kept_speedup": None})
            del model, head
    return rows


def _make_head(model: nn.Module) -> nn.Module:
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    return nn.Sequential(nn.Linear(width, HEAD_SIZE), nn.GELU(), nn.Linear(HEAD_SIZE, NUM_CLASSES))


def _encode(head: nn.Module, model: nn.Module, batch: int, length: int, device: torch.device) -> Callable[[], Tensor]:
    """Classifies random tokens [batch, length]; never the padding token, from which some families count positions."""
    config: Any = model.config
    pad = config.pad_token_id or 0
    ids = np.random.default_rng(0).integers(0, config.vocab_size - 1, (batch, length))
    ids_t = torch.from_numpy(ids + (ids >= pad))
    mask = torch.ones_like(ids_t)

    def act() -> Tensor:
        mask_t = mask.to(device)
        result: Tensor = head(pool(encode(model, ids_t.to(device), mask_t), mask_t)).cpu()
        return result

    return act


def _classify_kept(head: nn.Module, model: nn.Module, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """Classifies random rows of a table of embeddings."""
    config: Any = model.config
    rng = np.random.default_rng(0)
    kept = rng.standard_normal((KEPT, config.hidden_size), dtype=np.float32)

    def act() -> Tensor:
        result: Tensor = head(torch.from_numpy(kept[rng.integers(0, KEPT, batch)]).to(device)).cpu()
        return result

    return act


def _measure(
    act: Callable[[], Tensor], device: torch.device, batch: int, length: int | None, load: Load
) -> dict[str, Any]:
    reset_peak(device)
    try:
        times = np.array(list(_time(act, load.repeats, load.seconds)))
    except torch.cuda.OutOfMemoryError:
        names = ("calls", "p50_ms", "p95_ms", "texts_per_s", "tokens_per_s", "peak_mb")
        return dict.fromkeys(names)
    middle = float(np.median(times))
    return {
        "calls": len(times),
        "p50_ms": middle * 1e3,
        "p95_ms": float(np.percentile(times, 95)) * 1e3,
        "texts_per_s": batch / middle,
        "tokens_per_s": None if length is None else batch * length / middle,
        "peak_mb": read_peak(device) / 1e6,
    }


@torch.inference_mode()
def _time(act: Callable[[], Tensor], repeats: int, seconds: float) -> Iterator[float]:
    """Seconds of each call. The result lies on the CPU when it returns: a GPU has ended its work."""
    began = time.perf_counter()
    for index in range(WARM_UP):
        if index == 0 or time.perf_counter() - began < seconds:
            act()
    began = time.perf_counter()
    for index in range(repeats):
        if index >= FEWEST and time.perf_counter() - began > seconds:
            return
        started = time.perf_counter()
        act()
        yield time.perf_counter() - started


def read_numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas between. Raises JobError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise JobError([f"{option}: '{text}' must be whole numbers above 0 with commas between, such as 1,8,32"])
    return tuple(dict.fromkeys(int(part) for part in parts))


def find_encoder(name: str, open_results: Callable[[], Path], tell: Callable[[str], None]) -> str:
    """A Hugging Face name or directory as it is; of a complete trial's id, the directory. Raises JobError."""
    if TRIAL_ID.fullmatch(name) and not Path(name).is_dir():
        results = open_results()
        return str(open_final(results, find_trial(results, name, "profile"), tell) / "encoder")
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        kind = type(error).__name__
        raise JobError([f"profile: '{name}' is no encoder's directory, Hugging Face name or trial ({kind})"]) from None
    return name


def read_names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))
