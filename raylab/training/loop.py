"""The training loop of pre-training: steps of a fixed number of tokens, AdamW, and checkpoints without pickle."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylab.base.memory import read_lap, start_lap
from raylab.base.mistakes import JobError
from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Pretrain
from raylab.job.specs import Resources, TrialSpec
from raylab.training.batches import Units
from raylab.training.cache import cache_gradients
from raylab.training.compilation import can_compile, compile_encoder, pays, round_norms
from raylab.training.dropout import quicken, replace_dropout, seed_dropout
from raylab.training.encoder import choose_device, is_half, load_encoder, precision, save_encoder
from raylab.training.feed import Fed, Part, Rows, feed, move
from raylab.training.objectives import Learner, Totals, is_contrastive, loss_weights
from raylab.training.packing import fits_kernel
from raylab.training.speed import count_weights, describe_speed, flop_counter, measure_peak
from raylab.training.steps import Place

CURVE_POINTS = 50
# Gradients that travel at once, in MB: a compiled encoder is cut where they end, and every cut costs the host time.
BUCKET_MB = 100

# The parts of a rung's folder that pruning may take.
ENCODER = "encoder"
OPTIMIZER = "optimizer.safetensors"
HEAD = "head.safetensors"


class NotFiniteError(ArithmeticError):
    """A loss or gradient that is not a number: the trial fails at that step."""


@dataclass
class Progress:
    """How far a trial's pre-training is; with the weights and optimiser all that going on needs.

    Random states are no part of it: every draw is a function of the seed and the step or epoch. `sums`, `num_summed`,
    `data_seconds` and `spent`, what `speed.describe_speed` takes, are since the last point of the curves.
    """

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    position: int = 0
    ahead: list[int] = field(default_factory=list)
    flops: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    num_summed: int = 0
    data_seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Training:
    """A pre-training in memory."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    progress: Progress


@dataclass(frozen=True)
class Data:
    """The mapped inputs of a trial's pre-training."""

    store: TokenStore
    rows: Mapping[str, NDArray[Any]]
    vocabulary: Vocabulary
    categories: NDArray[np.int64] | None
    num_categories: int


def _note(progress: Progress, measures: Mapping[str, float]) -> None:
    progress.curves += [
        {"step": progress.step, "tokens": progress.tokens, "metric": metric, "value": value}
        for metric, value in measures.items()
    ]


def make_optimizer(learner: Learner, pretrain: Pretrain) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and norms do not."""
    trained = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": pretrain.weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=pretrain.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate(pretrain: Pretrain, tokens: float) -> float:
    """Slanted triangle over tokens: up to learning_rate at warmup_fraction of the budget, then down to 0 at its end."""
    share = min(tokens / pretrain.num_tokens, 1.0)
    if share < pretrain.warmup_fraction:
        return pretrain.learning_rate * share / pretrain.warmup_fraction
    return pretrain.learning_rate * (1 - share) / max(1 - pretrain.warmup_fraction, 1e-12)


def load_learner(spec: TrialSpec, data: Data, folder: Path, *, trained: bool) -> Learner:
    """The encoder of a rung's folder with its losses; with the heads that were trained, where they were."""
    encoder, _ = load_encoder(str(folder / ENCODER))
    torch.manual_seed(derive_seed(spec.seed, "heads"))
    learner = Learner(encoder, spec.settings.pretrain, data.num_categories).to(choose_device())
    quicken(encoder)
    if trained and learner.head is not None:
        learner.head.load_state_dict(load_file(folder / HEAD))
    return learner


def load_training(spec: TrialSpec, data: Data, folder: Path, *, resume: bool, world: World = ALONE) -> Training:
    """A training from a rung's folder; `resume` takes optimiser and heads too, else only the encoder's weights."""
    learner = load_learner(spec, data, folder, trained=resume)
    prepare_encoder(learner, spec.settings.resources, world)
    optimizer = make_optimizer(learner, spec.settings.pretrain)
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    if resume:
        tensors = load_file(folder / OPTIMIZER)
        names = {id(p): name for name, p in learner.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                kept = {k: f"{names[id(p)]}|{k}" for k in ("step", "exp_avg", "exp_avg_sq")}
                # A head whose loss weighs nothing has none.
                if kept["step"] in tensors:
                    optimizer.state[p] = {k: tensors[name].to(p.device) for k, name in kept.items()}
    return Training(learner, optimizer, progress)


def prepare_encoder(learner: Learner, resources: Resources, world: World) -> None:
    """Readies an encoder for training on its device, and compiles it where that pays.

    Raises JobError where it has to be compiled and can't be.
    """
    pretrain, device, wanted = learner.pretrain, next(learner.parameters()).device, resources.compile
    packs = is_half(pretrain.precision, learner.encoder) and fits_kernel(learner.encoder, device)
    if packs:
        round_norms(learner.encoder)
    able = can_compile(device) and packs
    if wanted == "always" and not able:
        raise JobError(
            [
                "resources.compile: 'always' needs bf16, an Ampere GPU or newer, attention heads of 8, 16, ... 256 "
                "dimensions, Triton and a C compiler; use 'auto' or 'never'"
            ]
        )
    flops = 6.0 * count_weights(learner.encoder) * pretrain.num_tokens / world.size
    if not able or wanted == "never" or (wanted == "auto" and not pays(flops, pretrain.num_tokens // world.size)):
        return
    learner.dropout = replace_dropout(learner.encoder.base_model)  # type: ignore[arg-type]
    # A graph's gradients lie where its next replay writes: one pass a step. What goes to other workers is a copy.
    compile_encoder(learner.encoder, graphs=pretrain.accumulation == 1 and resources.chunk_tokens is None)


def save_training(training: Training, tokenizer: Path, folder: Path, *, last: bool) -> None:
    """Writes encoder/ (a normal Hugging Face directory), progress.json, heads and the optimiser; no pickle.

    The last rung needs no optimiser: a larger budget is another arm.
    """
    learner = training.learner
    save_encoder(learner.encoder, tokenizer, folder / ENCODER)
    if learner.head is not None:
        save_file({k: v.detach().cpu().contiguous() for k, v in learner.head.state_dict().items()}, folder / HEAD)
    if not last:
        tensors = {
            f"{name}|{key}": value.detach().cpu().contiguous()
            for name, p in learner.named_parameters()
            for key, value in training.optimizer.state.get(p, {}).items()
        }
        save_file(tensors, folder / OPTIMIZER)
    (folder / "progress.json").write_text(json.dumps(training.progress.__dict__))


class Meter:
    """What steps measure, summed on the device until it is read, once: reading makes the host wait.

    With several workers, each sums its share. `peak` is this worker's `measure_peak`; the clock runs from here on.
    """

    def __init__(self, progress: Progress, world: World, device: torch.device, peak: float) -> None:
        self.progress, self.world, self.device = progress, world, device
        # One worker goes on from what `progress` holds, so that the sum over workers does.
        first = world.rank == 0
        self.before = dict(progress.sums) if first else {}
        self.host = {"flops": progress.flops, "data_seconds": progress.data_seconds}
        self.host |= {name: progress.spent.get(name, 0.0) for name in ("needed", "slots", "attended")}
        if not first:
            self.host = dict.fromkeys(self.host, 0.0)
        self.host["peak"] = peak
        self.names: list[str] = []
        self.values: list[Tensor] = []
        self.tokens: list[int] = []
        self.num_tokens = 0
        start_lap(device)
        self.began = time.perf_counter()

    def add(self, values: Mapping[str, Tensor], fed: Fed, tokens: int) -> None:
        """A step's losses and gradient norm, float32 scalars, after `tokens` of the steps before it."""
        self.names = list(values)
        self.values.append(torch.stack(list(values.values())))
        for name, value in (("flops", fed.flops), ("needed", fed.flops), ("slots", fed.slots),
                            ("attended", fed.attended), ("data_seconds", fed.waited / self.world.size)):  # fmt: skip
            self.host[name] += value
        self.tokens.append(tokens)
        self.num_tokens += fed.step.num_tokens

    def read(self) -> None:
        """Brings `progress` up to date. Raises NotFiniteError, in all workers alike."""
        if not self.tokens:
            return
        progress, spent = self.progress, self.progress.spent
        values = torch.stack(self.values).cpu().numpy().astype(np.float64)
        before = [self.before.get(name, 0.0) for name in self.names]
        # One after another, so that a training that went on from a rung has the sums of one that was never stopped.
        summed = np.add.accumulate(np.vstack([before, values / self.world.size]))[-1]
        finite = int(np.logical_and.accumulate(np.isfinite(values).all(1)).sum())
        # The least of all workers: the steps before the first that is not finite, and the highest peak of memory.
        sums = torch.tensor([*summed, *self.host.values()], dtype=torch.float64, device=self.device)
        least = torch.tensor([finite, -read_lap(self.device)], device=self.device)
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        found = dict(zip([*self.names, *self.host], sums.tolist(), strict=True))
        good, memory = least.tolist()
        now = time.perf_counter()
        if good < len(self.tokens):
            step = progress.step - len(self.tokens) + good + 1
            raise NotFiniteError(
                f"loss or gradient not finite at step {step} ({self.tokens[good]} tokens): "
                "lower pretrain.learning_rate or raise warmup_fraction"
            )
        progress.sums |= {name: found[name] for name in self.names}
        progress.flops, progress.data_seconds = found["flops"], found["data_seconds"]
        progress.spent = {
            "seconds": spent.get("seconds", 0.0) + now - self.began,
            "tokens": spent.get("tokens", 0.0) + self.num_tokens,
            "memory": max(spent.get("memory", 0.0), -memory),
        } | {name: found[name] for name in ("needed", "slots", "attended", "peak")}


def _sum_counts(fed: Fed, world: World, device: torch.device) -> tuple[Tensor, Tensor]:
    """Masked tokens and texts with a category of a whole step, on the device."""
    counts: Tensor = move(fed.counts, device)
    if world.size > 1:
        torch.distributed.all_reduce(counts)
    selected, categories = counts.unbind()
    return selected, categories


def train(
    training: Training,
    units: Units,
    data: Data,
    pretrain: Pretrain,
    seed: int,
    until: int,
    world: World = ALONE,
    *,
    chunk_tokens: int | None = None,
) -> None:
    """Steps until `until` tokens have entered the encoder, over all workers; changes `training` in place.

    At most `chunk_tokens` pass through the encoder at once (None: a worker's whole share of a part of a step).
    The host never waits for the device but at points of the curves and at the end: a loss or gradient that is not
    finite is found there (NotFiniteError, which names its step).
    """
    learner, optimizer, progress = training.learner, training.optimizer, training.progress
    device = next(learner.parameters()).device
    half = is_half(pretrain.precision, learner.encoder)
    model: nn.Module = learner
    if world.size > 1:
        model = DistributedDataParallel(
            learner,
            # A head whose loss weighs nothing has no gradients.
            find_unused_parameters=not pretrain.mlm.weight,
            broadcast_buffers=False,
            bucket_cap_mb=BUCKET_MB,
            gradient_as_bucket_view=True,
        )
    learner.train()
    # As a list: to look for them in all modules at every step would cost the host more than to clip them.
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    weights = loss_weights(pretrain)
    asked = {name: torch.tensor(weight, device=device) for name, weight in weights.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an evaluation left would count for the training
    with precision(device, half):
        peak = measure_peak(device)
    meter = Meter(progress, world, device, peak)
    capacity = None
    if learner.dropout is not None:
        share = -(-pretrain.batch_tokens // (pretrain.accumulation * world.size))
        capacity = min(share, chunk_tokens or share)
    feeds = feed(
        units,
        data.categories,
        pretrain,
        seed,
        Place(progress.epoch, progress.position, tuple(progress.ahead)),
        until - progress.tokens,
        world,
        flop_counter(learner),
        chunk_tokens=chunk_tokens,
        rows=Rows(half and fits_kernel(learner.encoder, device), capacity, units.longest),
        pad_id=data.vocabulary.pad_id,
        pinned=device.type == "cuda",
    )
    for fed in feeds:
        step = fed.step
        totals = Totals(*_sum_counts(fed, world, device), len(fed.parts), world.size)
        parts = move(fed.parts, device)
        rate = learning_rate(pretrain, progress.tokens + step.num_tokens / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Dropout's numbers come from the step, not from a state that a checkpoint would have to carry.
        dropout = derive_seed(seed, "dropout", progress.step, world.rank)
        values = _backward(model, learner, parts, totals, asked, dropout)
        values["gradient_norm"] = nn.utils.clip_grad_norm_(trained, pretrain.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add(values, fed, progress.tokens)
        progress.step += 1
        before, progress.tokens = progress.tokens, progress.tokens + step.num_tokens
        progress.epoch, progress.position, progress.ahead = step.after.epoch, step.after.position, [*step.after.ahead]
        counted = {"learning_rate": rate, "documents": float(len(step.units))}
        for name, value in (counted if fed.negatives is None else counted | {"negatives": fed.negatives}).items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.num_summed += 1
        point = pretrain.num_tokens / CURVE_POINTS
        if before // point < progress.tokens // point:
            meter.read()
            means = {name: value / progress.num_summed for name, value in sorted(progress.sums.items())}
            means["loss"] = sum(weight * means.get(f"{name}_loss", 0.0) for name, weight in weights.items())
            means |= describe_speed(progress.spent) | {"data_seconds": progress.data_seconds}
            _note(progress, {f"train_{name}": value for name, value in means.items()})
            progress.sums, progress.num_summed, progress.data_seconds, progress.spent = {}, 0, 0.0, {}
            meter = Meter(progress, world, device, peak)
    meter.read()


def _backward(
    model: nn.Module,
    learner: Learner,
    parts: tuple[Part, ...],
    totals: Totals,
    weights: Mapping[str, Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """Gradients of the step's loss, the weighted sum of all; returns each, this worker's sum over its parts.

    `model` is the learner, or what trains it with other workers; `weights` are scalars on the device; `seed` is that of
    dropout.
    """
    device, half = next(learner.parameters()).device, is_half(learner.pretrain.precision, learner.encoder)
    sums: dict[str, Tensor] = {}
    left = sum(len(part.chunks) for part in parts)
    for index, part in enumerate(parts):
        seeds = [derive_seed(seed, index, chunk) for chunk in range(len(part.chunks))]
        cache = None
        if part.chunked and is_contrastive(learner.pretrain):
            cache = cache_gradients(learner, part.chunks, totals, seeds)
        for chunk, batch in enumerate(part.chunks):
            left -= 1
            # Workers exchange gradients once a step, in the last backward pass.
            with model.no_sync() if isinstance(model, DistributedDataParallel) and left else nullcontext():
                seed_dropout(learner.dropout, seeds[chunk])
                with precision(device, half):
                    losses = model(batch, totals, None if cache is None else cache.gradients[chunk])
                # The gradient of the weighted sum, which itself nobody needs here.
                torch.autograd.backward(list(losses.values()), [weights[name] for name in losses])
            if cache is not None:
                # What stood for the contrastive loss has its gradients, not its value.
                losses[learner.pretrain.objective] = cache.loss / len(part.chunks)
            for name, value in losses.items():
                found = value.detach()
                sums[f"{name}_loss"] = sums[f"{name}_loss"] + found if f"{name}_loss" in sums else found
    return sums
