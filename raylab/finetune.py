"""Fine-tuning of the layers above a frozen boundary, with a head on the mean-pooled embedding."""

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.activations import Texts
from raylab.batches import Ints
from raylab.blocks import FineTune
from raylab.encoder import choose_device, precision
from raylab.heads import (
    MAX_GRAD_NORM,
    Floats,
    Heads,
    Order,
    Run,
    Trained,
    classify_loss,
    split_decay,
    to_probabilities,
    weigh_rows,
)
from raylab.noise import derive_seed

EVAL_TOKENS = 16_384
# On CPU a training batch passes in so many parts of like length: padding costs more there than small products do.
CPU_PARTS = 4


def find_device(above: nn.Module) -> torch.device:
    """Where a part of an encoder is; it may have no parameters."""
    return next((p.device for p in above.parameters()), choose_device())


def embed_texts(above: nn.Module, texts: Texts, rows: Ints, *, pad_id: int, parts: int = 1) -> Tensor:
    """Mean-pooled embeddings [len(rows), D] of texts by place; windows are pooled over all their tokens."""
    device = find_device(above)
    counts = texts.first[rows + 1] - texts.first[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    pieces = np.concatenate([np.arange(texts.first[row], texts.first[row + 1]) for row in rows])
    order = np.argsort(texts.length[pieces], kind="stable")
    sums, places = [], []
    for part in np.array_split(order, min(parts, len(order))):
        ids, mask = pad_pieces(texts, pieces[part], pad_id)
        mask_t, inputs = torch.from_numpy(mask).to(device), torch.from_numpy(ids).to(device)
        name = "input_ids" if inputs.ndim == 2 else "inputs_embeds"
        with precision(device):
            hidden = above(attention_mask=mask_t, **{name: inputs}).last_hidden_state
        sums.append((hidden.float() * mask_t.unsqueeze(-1)).sum(1))
        places.append(owner[part])
    summed, place = torch.cat(sums), torch.from_numpy(np.concatenate(places)).to(device)
    total = torch.zeros(len(rows), summed.shape[1], device=device).index_add(0, place, summed)
    tokens = np.bincount(owner, weights=texts.length[pieces], minlength=len(rows)).astype(np.float32)
    return total / torch.from_numpy(tokens).to(device)[:, None]


def pad_pieces(texts: Texts, pieces: Ints, pad_id: int) -> tuple[NDArray[Any], Ints]:
    """Inputs [B, T] int64 (or [B, T, D] float32) padded on the right, and their mask int64 [B, T]."""
    lengths = texts.length[pieces]
    rows = [texts.slice(int(piece)) for piece in pieces]
    if rows[0].ndim == 1:
        inputs: NDArray[Any] = np.full((len(rows), int(lengths.max())), pad_id, np.int64)
    else:
        inputs = np.zeros((len(rows), int(lengths.max()), rows[0].shape[1]), np.float32)
    for index, row in enumerate(rows):
        inputs[index, : len(row)] = row
    return inputs, (np.arange(inputs.shape[1]) < lengths[:, None]).astype(np.int64)


def fine_tune(
    above: nn.Module, texts: Texts, run: Run, steps: Sequence[int], outputs: int, settings: FineTune, *, pad_id: int
) -> Trained:
    """Trains a copy of the layers above a boundary with a head, to each of `steps` (rising) up to the run's `until`.

    Every batch, initial weight and dropout is a function of the run's seed and the step. `above` is left as it is.
    """
    started, multi = time.perf_counter(), run.labels.ndim == 2
    model = copy.deepcopy(above).train()
    device = find_device(model)
    config: Any = model.config
    head = Heads([run.seed], config.hidden_size, outputs, settings).to(device)
    groups = split_decay(list(model.named_parameters()), settings.learning_rate, settings.weight_decay)
    groups += split_decay(list(head.named_parameters()), settings.head_learning_rate, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    trained = [*model.parameters(), *head.parameters()]
    order = Order(run.seed, len(run.train), settings.batch_size)
    weights = weigh_rows(run.labels, settings.class_weights)
    labels = run.labels.astype(np.int64)
    parts = CPU_PARTS if device.type == "cpu" else 1
    found: list[Floats] = []
    for step in range(steps[run.until]):
        torch.manual_seed(derive_seed(run.seed, "dropout", step))
        batch = order.batch(step)
        x = embed_texts(model, texts, run.train[batch], pad_id=pad_id, parts=parts)
        loss = classify_loss(
            head(x[None], step),
            torch.from_numpy(labels[batch]).to(device)[None],
            torch.from_numpy(weights[batch]).to(device)[None],
        )[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        if step + 1 in steps:
            found.append(to_probabilities(_predict(model, head, texts, run.eval, pad_id), multi=multi))
            model.train()
    used = [p for p in trained if p.grad is not None]
    return Trained(found, sum(p.numel() for p in used), time.perf_counter() - started)


@torch.inference_mode()
def _predict(model: nn.Module, head: Heads, texts: Texts, rows: Ints, pad_id: int) -> Tensor:
    """Logits [len(rows), C], in batches of like length."""
    model.eval()
    longest = np.maximum.reduceat(texts.length, texts.first[:-1])[rows]
    counts = (texts.first[1:] - texts.first[:-1])[rows]
    order = np.argsort(-longest, kind="stable")
    found, start = [], 0
    while start < len(order):
        size = np.cumsum(counts[order[start:]]) * longest[order[start]]
        batch = order[start : start + max(1, int(np.searchsorted(size, EVAL_TOKENS, side="right")))]
        start += len(batch)
        found.append(head(embed_texts(model, texts, rows[batch], pad_id=pad_id)[None])[0])
    logits = torch.cat(found)
    back = torch.empty_like(logits)
    back[torch.from_numpy(order).to(logits.device)] = logits
    return back
