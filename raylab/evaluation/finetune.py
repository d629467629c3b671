"""Fine-tuning of the layers above a frozen boundary, with a head on the mean-pooled embedding."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.evaluation.activations import Texts
from raylab.evaluation.heads import (
    MAX_GRAD_NORM,
    Floats,
    Heads,
    Order,
    Run,
    Share,
    Trained,
    classify_loss,
    split_decay,
    to_probabilities,
    weigh_rows,
)
from raylab.job.blocks import FineTune
from raylab.training.batches import Ints
from raylab.training.dropout import quicken
from raylab.training.encoder import find_device, precision
from raylab.training.feed import move
from raylab.training.packing import encode_packed, fits_kernel, lay_out, pool_segments
from raylab.training.steps import deal

# Tokens that pass at once without gradients: few stay in a processor's cache, many keep a GPU busy.
EVAL_TOKENS = {"cpu": 2048, "cuda": 16_384}
STATE = "state.safetensors"
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def pack_pieces(texts: Texts, pieces: Ints) -> tuple[Tensor, Tensor, Ints]:
    """Pieces one after another: inputs int64 [N] or float32 [N, D], places in the pieces [N], offsets [S + 1]."""
    length = texts.length[pieces]
    offsets = np.concatenate([[0], np.cumsum(length)])
    inputs = torch.from_numpy(np.concatenate([texts.slice(int(piece)) for piece in pieces]))
    positions = torch.from_numpy(np.arange(offsets[-1]) - np.repeat(offsets[:-1], length))
    return inputs if inputs.dtype == torch.int64 else inputs.float(), positions, offsets


def embed_texts(above: nn.Module, texts: Texts, rows: Ints, *, half: bool = False) -> Tensor:
    """Mean-pooled embeddings [len(rows), D] of texts by place; windows are pooled over all their tokens.

    All their pieces go through in one row. `half`: with products in bf16.
    """
    device = find_device(above)
    counts = texts.first[rows + 1] - texts.first[rows]
    pieces = np.concatenate([np.arange(texts.first[row], texts.first[row + 1]) for row in rows])
    inputs, positions, offsets = pack_pieces(texts, pieces)
    layout = lay_out(offsets, kernel=half and fits_kernel(above, device))
    inputs, positions, layout = move((inputs, positions, layout), device)
    with precision(device, half):
        hidden = encode_packed(above, inputs, positions, layout)
    pooled = pool_segments(hidden, layout, len(hidden))
    if len(pieces) == len(rows):
        return pooled
    owner = np.repeat(np.arange(len(rows)), counts)
    tokens = np.bincount(owner, weights=texts.length[pieces], minlength=len(rows))
    shares = torch.from_numpy((texts.length[pieces] / tokens[owner]).astype(np.float32)).to(device)
    total = torch.zeros(len(rows), pooled.shape[1], device=device)
    return total.index_add(0, torch.from_numpy(owner).to(device), pooled * shares[:, None])


def count_tokens(texts: Texts) -> Ints:
    """Tokens of each text, those of all its pieces: int64 [n]."""
    return np.add.reduceat(texts.length, texts.first[:-1])


class Classifier(nn.Module):
    """The layers above a boundary, with a head on the mean-pooled embedding."""

    def __init__(self, model: nn.Module, head: Heads) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, texts: Texts, rows: Ints, *, half: bool, step: int, share: Share) -> Tensor:
        """Logits [len(rows), C] of a step of training."""
        x = embed_texts(self.model, texts, rows, half=half)
        logits: Tensor = self.head(x[None], step, share)[0]
        return logits


class Tuning:
    """A fine-tuning in memory: a copy of the layers above a boundary, a head on them, their optimiser, and how far.

    Every batch, initial weight and dropout is a function of the run's seed and the step, so that no random state is
    part of it. The workers of a trial have one each, all alike.
    """

    def __init__(self, above: nn.Module, texts: Texts, run: Run, outputs: int, settings: FineTune, half: bool) -> None:
        self.texts, self.run, self.settings, self.half, self.outputs = texts, run, settings, half, outputs
        self.model = copy.deepcopy(above).train()
        quicken(self.model)
        self.device = find_device(self.model)
        config: Any = self.model.config
        self.head = Heads([run.seed], config.hidden_size, outputs, settings).to(self.device)
        self.classifier = Classifier(self.model, self.head)
        groups = split_decay(list(self.model.named_parameters()), settings.learning_rate, settings.weight_decay)
        groups += split_decay(list(self.head.named_parameters()), settings.head_learning_rate, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.step, self.seconds = 0, 0.0
        self.found: list[Floats] = []

    def named(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return dict(self.classifier.named_parameters())

    def train(self, until: int, steps: Sequence[int], world: World = ALONE) -> None:
        """Goes on to step `until`; the probabilities of the run's rows at each of `steps` on the way are `found`.

        The workers of `world` call this together, on equal tunings: each passes its share of every batch, and of the
        rows to predict. Gradients, and so weights, are those of the whole batch's loss.
        """
        started = time.perf_counter()
        run, settings = self.run, self.settings
        trained, tokens = list(self.named().values()), count_tokens(self.texts)
        classifier: nn.Module = self.classifier
        if world.size > 1:
            # Parameters that no gradient reaches, such as a pooler's, are left as they are.
            classifier = DistributedDataParallel(classifier, find_unused_parameters=True)
        order = Order(run.seed, len(run.train), settings.batch_size)
        weights = weigh_rows(run.labels, settings.class_weights)
        labels = run.labels.astype(np.int64)
        for step in range(self.step, until):
            # Rank 0's is that of a worker alone.
            torch.manual_seed(derive_seed(run.seed, "dropout", step, *([world.rank] if world.rank else [])))
            whole = order.batch(step)
            places = deal(tokens[run.train[whole]], world.size)[world.rank]
            batch = whole[places]
            counted = weights[batch]
            if not len(batch):
                # More workers than rows: this one passes a row that counts nothing, since all have to give gradients.
                places = np.zeros(1, np.int64)
                batch = whole[places]
                counted = np.zeros_like(weights[batch])
            logits = classifier(
                self.texts, run.train[batch], half=self.half, step=step, share=Share(places, len(whole))
            )  # fmt: skip
            loss = classify_loss(
                logits[None],
                torch.from_numpy(labels[batch]).to(self.device)[None],
                torch.from_numpy(counted).to(self.device)[None],
                int((weights[whole] > 0).sum()),
            )[0]
            self.optimizer.zero_grad(set_to_none=True)
            # The mean over the workers of what each gives back is the gradient of the whole batch's loss.
            (loss * world.size).backward()
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            self.optimizer.step()
            if step + 1 in steps:
                self._predict(tokens, world)
        self.step = until
        self.seconds += time.perf_counter() - started

    def _predict(self, tokens: Ints, world: World) -> None:
        rows = self.run.eval
        share = deal(tokens[rows], world.size)[world.rank]
        logits = torch.zeros(len(rows), self.outputs, device=self.device)
        if len(share):
            places = torch.from_numpy(share).to(self.device)
            logits[places] = _predict(self.model, self.head, self.texts, rows[share], self.half)
        if world.size > 1:
            torch.distributed.all_reduce(logits)  # a row's are those of one worker, and 0 of the others
        self.found.append(to_probabilities(logits, multi=self.run.labels.ndim == 2))
        self.model.train()

    def finish(self) -> Trained:
        """What came of it; parameters that no gradient reached were not updated."""
        sizes = [p.numel() for p in self.named().values() if p in self.optimizer.state]
        return Trained(self.found, sum(sizes), self.seconds)

    def save(self, folder: Path) -> None:
        """Writes weights and optimiser to state.safetensors, the rest to progress.npz; no pickle."""
        tensors = {}
        for name, p in self.named().items():
            tensors[name] = p.detach()
            tensors |= {f"{name}|{key}": value for key, value in self.optimizer.state.get(p, {}).items()}
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / STATE)
        found = np.stack(self.found) if self.found else np.zeros(0)
        np.savez(folder / "progress.npz", found=found, step=self.step, seconds=self.seconds)

    def load(self, folder: Path) -> None:
        """Goes to where `save` was called."""
        tensors = load_file(folder / STATE)
        with torch.no_grad():
            for name, p in self.named().items():
                p.copy_(tensors[name])
                state = {key: tensors[f"{name}|{key}"] for key in OPTIMIZER_STATE if f"{name}|{key}" in tensors}
                if state:
                    self.optimizer.state[p] = {k: v.to(p.device) for k, v in state.items()}
        progress = np.load(folder / "progress.npz")
        self.found, self.step, self.seconds = list(progress["found"]), int(progress["step"]), float(progress["seconds"])


def fine_tune(
    above: nn.Module,
    texts: Texts,
    run: Run,
    steps: Sequence[int],
    outputs: int,
    settings: FineTune,
    *,
    half: bool = False,
    world: World = ALONE,
) -> Trained:
    """Trains a copy of the layers above a boundary with a head, to each of `steps` (rising) up to the run's `until`."""
    tuning = Tuning(above, texts, run, outputs, settings, half)
    tuning.train(steps[run.until], steps, world)
    return tuning.finish()


@torch.inference_mode()
def _predict(model: nn.Module, head: Heads, texts: Texts, rows: Ints, half: bool) -> Tensor:
    """Logits [len(rows), C], in batches of like length."""
    model.eval()
    order = np.argsort(-np.maximum.reduceat(texts.length, texts.first[:-1])[rows], kind="stable")
    ends, most = np.cumsum(count_tokens(texts)[rows][order]), EVAL_TOKENS[find_device(model).type]
    found, start = [], 0
    while start < len(order):
        limit = most + (ends[start - 1] if start else 0)
        batch = order[start : max(start + 1, int(np.searchsorted(ends, limit, side="right")))]
        start += len(batch)
        found.append(head(embed_texts(model, texts, rows[batch], half=half)[None])[0])
    logits = torch.cat(found)
    back = torch.empty_like(logits)
    back[torch.from_numpy(order).to(logits.device)] = logits
    return back
