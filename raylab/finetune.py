"""Fine-tuning of the layers above a frozen boundary, with a head on the mean-pooled embedding."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from raylab.batches import Ints, cut_pieces, pad_rows, slice_piece
from raylab.blocks import Corpus, FineTune
from raylab.encoder import encode, pool, precision, split_layers
from raylab.mistakes import InfeasibleError
from raylab.tokens import TokenStore, Vocabulary

BATCH = 64


def freeze(encoder: nn.Module, depth: str) -> list[nn.Module]:
    """Freezes an encoder up to `depth` and returns the frozen modules.

    none: nothing; embeddings: the embeddings; "1" to "N": those and so many layers from below; all: everything.
    Raises InfeasibleError where the encoder has fewer layers.
    """
    parts = split_layers(encoder)
    if depth.isdigit() and int(depth) > len(parts.layers):
        raise InfeasibleError(f"evaluate.frozen_layers: '{depth}' exceeds the encoder's {len(parts.layers)} layers")
    frozen: list[nn.Module] = []
    if depth == "all":
        frozen = [encoder]
    elif depth != "none":
        frozen = [parts.embeddings, *parts.layers[: int(depth) if depth.isdigit() else 0]]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def fine_tune(
    encoder: nn.Module,
    store: TokenStore,
    train_rows: Ints,
    train_y: Ints,
    eval_rows: Ints,
    vocabulary: Vocabulary,
    *,
    depth: str,
    num_classes: int,
    corpus: Corpus,
    settings: FineTune,
    seed: int,
    eval_store: TokenStore,
) -> NDArray[np.float64]:
    """Probabilities [len(eval_rows), num_classes] of rows of `eval_store`, after `settings.steps` training steps.

    The number of steps is fixed: no split is looked at. Texts are cut to max_length. Frozen parts run without dropout,
    so that their output is one value a text. The given encoder is left as it is.
    """
    device = next(encoder.parameters()).device
    model = copy.deepcopy(encoder)
    torch.manual_seed(seed)
    width = model.config.hidden_size  # type: ignore[union-attr]
    head = nn.Sequential(
        nn.Linear(width, settings.hidden_size),  # type: ignore[arg-type]
        nn.GELU(),
        nn.Linear(settings.hidden_size, num_classes),
    ).to(device)
    frozen = freeze(model, depth)
    trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(seed)
    order: list[int] = []

    def pooled(rows: Ints, texts: TokenStore = store) -> torch.Tensor:
        pieces = cut_pieces(texts.lengths, rows, corpus.max_length, "truncate")
        ids, mask = pad_rows([slice_piece(texts, pieces, i) for i in range(len(rows))], vocabulary)
        mask_t = torch.from_numpy(mask).to(device)
        with precision(device):
            return pool(encode(model, torch.from_numpy(ids).to(device), mask_t), mask_t)

    model.train()
    for module in frozen:
        module.eval()
    for _ in range(settings.steps):
        while len(order) < min(settings.batch_size, len(train_rows)):
            order += rng.permutation(len(train_rows)).tolist()
        batch, order = np.array(order[: settings.batch_size]), order[settings.batch_size :]
        loss = F.cross_entropy(head(pooled(train_rows[batch])), torch.from_numpy(train_y[batch]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        parts = [
            head(pooled(eval_rows[start : start + BATCH], eval_store)).double().softmax(1).cpu()
            for start in range(0, len(eval_rows), BATCH)
        ]
    return torch.cat(parts).numpy()
