"""The classifier on embeddings, one hidden layer on the mean: many trained at once, each as if it were alone."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.base.noise import derive_seed
from raylab.job.blocks import FineTune

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Shapes: K classifiers, B rows of a batch, D width of an embedding, H hidden units, C classes (or labels).

MAX_GRAD_NORM = 1.0
# Weights of classifiers that train in one batch: bounds the memory, changes no number.
MAX_WEIGHTS = 16_000_000


class Run(NamedTuple):
    """One training: rows by their places in a table of inputs, and the rows whose probabilities are asked for.

    train int64 [n]; labels int64 [n], or int8 [n, C] of 1, 0 and -1 (missing) for several labels a row; eval int64
    [m]; `until`: the last of the candidates that is asked for.
    """

    train: Ints
    labels: NDArray[Any]
    eval: Ints
    seed: int
    until: int = 0


class Trained(NamedTuple):
    """Probabilities [m, C] at each candidate up to the run's `until`, parameters updated, and seconds of training."""

    probabilities: list[Floats]
    num_parameters: int
    seconds: float


class Share(NamedTuple):
    """The rows of a batch that one worker has: their places int64 [B] in the batch, and its size."""

    places: Ints
    size: int


class Heads(nn.Module):
    """K classifiers [K, B, D] -> logits [K, B, C]: each its own weights, drawn from its own seed."""

    def __init__(self, seeds: Sequence[int], width: int, outputs: int, settings: FineTune) -> None:
        super().__init__()
        self.seeds, self.dropout = list(seeds), settings.dropout
        parts: list[list[Tensor]] = [[], [], [], []]
        for seed in seeds:
            generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
            for index, (fan_in, fan_out) in enumerate([(width, settings.hidden_size), (settings.hidden_size, outputs)]):
                bound = fan_in**-0.5  # as nn.Linear draws them
                for place, shape in ((0, (fan_in, fan_out)), (1, (1, fan_out))):
                    values = torch.rand(shape, generator=generator) * (2 * bound) - bound
                    parts[2 * index + place].append(values)
        self.weight_1, self.bias_1, self.weight_2, self.bias_2 = (nn.Parameter(torch.stack(p)) for p in parts)

    def forward(self, x: Tensor, step: int | None = None, share: Share | None = None) -> Tensor:
        """Logits; with a step, as in training: hidden units are dropped by the seed, the step and the row's place."""
        hidden = F.gelu(torch.baddbmm(self.bias_1, x, self.weight_1))
        if step is not None and self.dropout:
            masks = []
            for seed in self.seeds:
                generator = torch.Generator().manual_seed(derive_seed(seed, "head dropout", step))
                rows = x.shape[1] if share is None else share.size
                mask = torch.rand((rows, hidden.shape[2]), generator=generator) >= self.dropout
                masks.append(mask if share is None else mask[torch.from_numpy(share.places)])
            hidden = hidden * (torch.stack(masks).to(hidden.device) / (1 - self.dropout))
        return torch.baddbmm(self.bias_2, hidden, self.weight_2)


class Order:
    """Batches without end: every epoch a permutation of `num` rows, each a function of the seed alone."""

    def __init__(self, seed: int, num: int, size: int) -> None:
        self.seed, self.num, self.size = seed, num, min(size, num)
        self.epochs: dict[int, Ints] = {}

    def batch(self, step: int) -> Ints:
        """The rows of a step, int64 [size]; they may run over the end of an epoch."""
        first, last = step * self.size, (step + 1) * self.size
        found = []
        for epoch in range(first // self.num, -(-last // self.num)):
            if epoch not in self.epochs:
                rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
                self.epochs = {
                    epoch - 1: self.epochs.get(epoch - 1, np.zeros(0, np.int64)),
                    epoch: rng.permutation(self.num),
                }
            start = epoch * self.num
            found.append(self.epochs[epoch][max(first - start, 0) : last - start])
        return np.concatenate(found)


def weigh_rows(labels: NDArray[Any], class_weights: str) -> NDArray[np.float32]:
    """What each training label counts: 1; balanced: rows / (classes x rows of its class); a missing one 0.

    labels [n] gives float32 [n]; [n, C] gives [n, C], where a label's classes are its 0 and its 1.
    """
    columns = labels.reshape(len(labels), -1)
    weights = (columns >= 0).astype(np.float32)
    if class_weights == "balanced":
        for column in range(columns.shape[1]):
            known = columns[:, column] >= 0
            values, codes, counts = np.unique(columns[known, column], return_inverse=True, return_counts=True)
            weights[known, column] = known.sum() / (len(values) * counts[codes])
    return weights.reshape(labels.shape)


def classify_loss(logits: Tensor, labels: Tensor, weights: Tensor, there: int | None = None) -> Tensor:
    """Mean loss of each classifier [K], over the labels that are there.

    logits [K, B, C]; labels [K, B] (cross-entropy) or [K, B, C] (sigmoid); weights as labels, 0 where nothing counts.
    Of a share of a batch: its part of the mean over the `there` labels of the whole one.
    """
    if labels.ndim == 2:
        losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0).long(), reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
    counted = (weights > 0).flatten(1).sum(1).clamp(min=1) if there is None else max(there, 1)
    return (losses * weights).flatten(1).sum(1) / counted


def to_probabilities(logits: Tensor, *, multi: bool) -> Floats:
    """Softmax over the classes, or each label's own sigmoid: float64."""
    logits = logits.double()
    found: Floats = (logits.sigmoid() if multi else logits.softmax(-1)).cpu().numpy()
    return found


def split_decay(named: Sequence[tuple[str, nn.Parameter]], rate: float, decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases and norms do not."""
    matrices = [p for name, p in named if p.ndim > 1 and not name.startswith("bias")]
    others = [p for name, p in named if p.ndim < 2 or name.startswith("bias")]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group | {"lr": rate} for group in groups if group["params"]]


def train_heads(
    x: Tensor, runs: Sequence[Run], steps: Sequence[int], outputs: int, settings: FineTune
) -> list[Trained]:
    """Trains the classifiers of all runs together on embeddings x [n, D], to each of `steps` (rising).

    A run's numbers are those that it has alone: its own weights, batches, clipping and dropout, by its own seed.
    """
    found: list[Trained] = []
    share = max(1, MAX_WEIGHTS // (x.shape[1] * settings.hidden_size))
    for first in range(0, len(runs), share):
        found += _train_together(x, runs[first : first + share], steps, outputs, settings)
    return found


def _train_together(
    x: Tensor, runs: Sequence[Run], steps: Sequence[int], outputs: int, settings: FineTune
) -> list[Trained]:
    started, multi, device = time.perf_counter(), runs[0].labels.ndim == 2, x.device
    heads = Heads([run.seed for run in runs], x.shape[1], outputs, settings).to(device)
    optimizer = torch.optim.AdamW(
        split_decay(list(heads.named_parameters()), settings.head_learning_rate, settings.weight_decay)
    )
    orders = [Order(run.seed, len(run.train), settings.batch_size) for run in runs]
    counts = [weigh_rows(run.labels, settings.class_weights) for run in runs]
    size = max(order.size for order in orders)
    places = np.zeros((len(runs), size), np.int64)
    shape = (len(runs), size, outputs) if multi else (len(runs), size)
    labels, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    found: list[list[Floats]] = [[] for _ in runs]
    parameters = list(heads.parameters())
    last = max(run.until for run in runs)
    for step in range(steps[last]):
        for k, (run, order) in enumerate(zip(runs, orders, strict=True)):
            batch = order.batch(step)
            places[k, : order.size] = run.train[batch]
            labels[k, : order.size], weights[k, : order.size] = run.labels[batch], counts[k][batch]
        inputs = x[torch.from_numpy(places).to(device)]
        loss = classify_loss(
            heads(inputs, step), torch.from_numpy(labels).to(device), torch.from_numpy(weights).to(device)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        norm = sum(p.grad.square().sum((1, 2)) for p in parameters if p.grad is not None)
        scale = (MAX_GRAD_NORM / (torch.as_tensor(norm).sqrt() + 1e-6)).clamp(max=1.0)[:, None, None]
        for p in parameters:
            assert p.grad is not None
            p.grad *= scale
        optimizer.step()
        if step + 1 in steps:
            asked = steps.index(step + 1)
            for k, run in enumerate(runs):
                if asked <= run.until:
                    found[k].append(to_probabilities(_predict(heads, k, x, run.eval), multi=multi))
    seconds = (time.perf_counter() - started) / len(runs)
    num_parameters = sum(p[0].numel() for p in parameters)
    return [Trained(probabilities, num_parameters, seconds) for probabilities in found]


@torch.inference_mode()
def _predict(heads: Heads, k: int, x: Tensor, rows: Ints) -> Tensor:
    hidden = F.gelu(torch.addmm(heads.bias_1[k], x[torch.from_numpy(rows).to(x.device)], heads.weight_1[k]))
    return torch.addmm(heads.bias_2[k], hidden, heads.weight_2[k])
