"""The training loop of pre-training: steps of a fixed number of tokens, AdamW, and checkpoints without pickle."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.data.tokens import TokenStore, Vocabulary
from raylab.job.blocks import Pretrain
from raylab.job.specs import TrialSpec
from raylab.training.batches import Inputs, Place, Units, iterate_steps
from raylab.training.encoder import choose_device, load_encoder, precision, save_encoder
from raylab.training.objectives import Batch, Learner, Totals, loss_weights

CURVE_POINTS = 50

# The parts of a rung's folder that pruning may take.
ENCODER = "encoder"
OPTIMIZER = "optimizer.safetensors"
HEAD = "head.safetensors"


class NotFiniteError(ArithmeticError):
    """A loss or gradient that is not a number: the trial fails at that step."""


@dataclass
class Progress:
    """How far a trial's pre-training is; with the weights and optimiser all that going on needs.

    Random states are no part of it: every draw is a function of the seed and the step or epoch.
    """

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    position: int = 0
    flops: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    num_summed: int = 0
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
    return torch.optim.AdamW(groups, lr=pretrain.learning_rate, betas=(0.9, 0.999), eps=1e-8)


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
    if trained and learner.head is not None:
        learner.head.load_state_dict(load_file(folder / HEAD))
    return learner


def load_training(spec: TrialSpec, data: Data, folder: Path, *, resume: bool) -> Training:
    """A training from a rung's folder; `resume` takes optimiser and heads too, else only the encoder's weights."""
    learner = load_learner(spec, data, folder, trained=resume)
    optimizer = make_optimizer(learner, spec.settings.pretrain)
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    if resume:
        tensors = load_file(folder / OPTIMIZER)
        names = {id(p): name for name, p in learner.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = {k: tensors[f"{names[id(p)]}|{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    return Training(learner, optimizer, progress)


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


def _to_batch(inputs: Inputs, data: Data, device: torch.device) -> Batch:
    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    categories = data.categories[inputs.rows] if data.categories is not None else np.full(len(inputs.rows), -1)
    return Batch(
        tensor(inputs.input_ids),
        tensor(inputs.attention_mask),
        tensor(inputs.selected),
        tensor(inputs.targets),
        tensor(inputs.positive_ids) if inputs.positive_ids is not None else None,
        tensor(inputs.positive_mask) if inputs.positive_mask is not None else None,
        tensor(categories),
    )


def _sum_over(world: World, device: torch.device, *values: float) -> list[float]:
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return [float(v) for v in total]


def train(
    training: Training, units: Units, data: Data, pretrain: Pretrain, seed: int, until: int, world: World = ALONE
) -> None:
    """Steps until `until` tokens have entered the encoder, over all workers; changes `training` in place.

    A step's texts are dealt to the workers in turn, so that the global batch is the same for any number of them.
    """
    learner, optimizer, progress = training.learner, training.optimizer, training.progress
    device = next(learner.parameters()).device
    model: nn.Module = learner
    if world.size > 1:
        model = DistributedDataParallel(learner, find_unused_parameters=True)
    learner.train()
    weights = loss_weights(pretrain)
    count_flops = flop_counter(learner)
    steps = iterate_steps(units, pretrain.batch_tokens, seed, Place(progress.epoch, progress.position))
    while progress.tokens < until:
        step = next(steps)
        shares = pretrain.accumulation * world.size
        mine = [
            # A part of the step is the same texts for any number of workers, and so are its negatives.
            units.build(step.epochs[share::shares], step.units[share::shares])
            for share in range(world.rank * pretrain.accumulation, (world.rank + 1) * pretrain.accumulation)
        ]
        batches = [_to_batch(inputs, data, device) for inputs in mine]
        selected, categories, flops = _sum_over(
            world,
            device,
            sum(int(inputs.selected.sum()) for inputs in mine),
            sum(int((batch.categories >= 0).sum()) for batch in batches),
            sum(count_flops(inputs) for inputs in mine),
        )
        totals = Totals(int(selected), int(categories), pretrain.accumulation, world.size)
        rate = learning_rate(pretrain, progress.tokens + step.num_tokens / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Dropout's numbers come from the step, not from a state that a checkpoint would have to carry.
        torch.manual_seed(derive_seed(seed, "dropout", progress.step, world.rank))
        values = _backward(model, batches, totals, weights, world, device)
        norm = nn.utils.clip_grad_norm_(learner.parameters(), pretrain.max_grad_norm)
        if not math.isfinite(values["loss"]) or not math.isfinite(float(norm)):
            raise NotFiniteError(
                f"loss or gradient not finite at step {progress.step + 1} ({progress.tokens} tokens): "
                "lower pretrain.learning_rate or raise warmup_fraction"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        before, progress.tokens = progress.tokens, progress.tokens + step.num_tokens
        progress.epoch, progress.position = step.after
        progress.flops += flops
        values |= {"learning_rate": rate, "gradient_norm": float(norm), "documents": float(len(step.units))}
        for name, value in values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.num_summed += 1
        point = pretrain.num_tokens / CURVE_POINTS
        if before // point < progress.tokens // point:
            _note(progress, {f"train_{k}": v / progress.num_summed for k, v in progress.sums.items()})
            progress.sums, progress.num_summed = {}, 0


def _backward(
    model: nn.Module,
    batches: list[Batch],
    totals: Totals,
    weights: Mapping[str, float],
    world: World,
    device: torch.device,
) -> dict[str, float]:
    """Gradients of the step's loss; returns the weighted loss and each loss, means over the whole step."""
    sums: dict[str, float] = {}
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            with precision(device):
                losses = model(batch, totals)
            loss = sum((weights[name] * value for name, value in losses.items()), torch.zeros((), device=device))
            loss.backward()
        for name, value in losses.items():
            sums[f"{name}_loss"] = sums.get(f"{name}_loss", 0.0) + float(value.detach())
        sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())
    means = _sum_over(world, device, *(sums[name] / world.size for name in sorted(sums)))
    return dict(zip(sorted(sums), means, strict=True))


def flop_counter(learner: Learner) -> Callable[[Inputs], float]:
    """Floating-point operations that a batch needs, forward and backward, padding left out.

    A token costs 2 x the weights of the layers and, in attention, 4 x layers x hidden size x its text's length; a
    masked token 2 x hidden size x vocabulary more; backward twice as much (Kaplan et al., arXiv 2001.08361, 2.1).
    """
    config: Any = learner.encoder.config
    base = cast(nn.Module, learner.encoder.base_model)
    body = sum(p.numel() for name, p in base.named_parameters() if "embeddings" not in name)
    layers, hidden, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size

    def count(inputs: Inputs) -> float:
        lengths = inputs.attention_mask.sum(1)
        if inputs.positive_mask is not None:
            lengths = np.concatenate([lengths, inputs.positive_mask.sum(1)])
        forward = 2.0 * body * lengths.sum() + 4.0 * layers * hidden * (lengths.astype(float) ** 2).sum()
        return float(3 * (forward + 2.0 * hidden * vocabulary * len(inputs.targets)))

    return count
