"""Encoders: Hugging Face masked-language models built, loaded, run and saved; mean pooling over real tokens."""

import copy
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, RobertaConfig, RobertaForMaskedLM
from transformers.utils import logging as transformers_logging

from raylab.base.mistakes import InfeasibleError, JobError
from raylab.data.tokens import Vocabulary
from raylab.job.blocks import WIDE, EncoderConfig

# Shapes: B texts, T tokens, D hidden size, V vocabulary, S selected tokens.

# The masked-language head of each family but for its last step, the projection to the vocabulary: [S, D] -> [S, D].
HEADS = {
    "roberta": lambda model, hidden: model.lm_head.layer_norm(F.gelu(model.lm_head.dense(hidden))),
    "xlm-roberta": lambda model, hidden: model.lm_head.layer_norm(F.gelu(model.lm_head.dense(hidden))),
    "bert": lambda model, hidden: model.cls.predictions.transform(hidden),
    "distilbert": lambda model, hidden: model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))),
    "modernbert": lambda model, hidden: model.head(hidden),
}

# What a processor must have for products in bf16 to be faster than in float32, by torch's names.
FAST_BF16 = ("amx_bf16", "avx512_bf16")


class Layers(NamedTuple):
    """An encoder's embeddings and its layers, bottom first."""

    embeddings: nn.Module
    layers: Sequence[nn.Module]


def choose_device() -> torch.device:
    """The GPU that Ray or the user gave this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_device(model: nn.Module) -> torch.device:
    """Where an encoder, or a part of one, is; a part may have no parameters."""
    return next((p.device for p in model.parameters()), choose_device())


def is_half(asked: str, model: nn.Module) -> bool:
    """Whether an encoder computes in bf16 where it is, its weights float32: auto, float32 or bfloat16 is asked for.

    auto: on GPUs, and on processors with instructions for it where hidden states are `WIDE` or wider. That is a
    function of the machine and the encoder, not of a measurement: the same there every time.
    """
    if asked != "auto":
        return asked == "bfloat16"
    if find_device(model).type == "cuda":
        return True
    config: Any = model.config
    capable = any(torch.cpu.get_capabilities().get(name, False) for name in FAST_BF16)
    return capable and bool(config.hidden_size >= WIDE)


def name_precision(half: bool) -> str:
    """What `is_half` says, in words."""
    return "bfloat16" if half else "float32"


def precision(device: torch.device, half: bool) -> AbstractContextManager[Any]:
    """Products in bf16 where `half` says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def inspect_encoder(path: str, revision: str | None) -> dict[str, Any]:
    """What must be known of an encoder before any worker starts, found by loading it once.

    num_layers, positions (tokens at once, special ones too; None: any), vocab_size, new_head (whether the masked-
    language head is missing). Raises JobError for an unsupported family, or weights that are not all there.
    """
    model, new_head = load_encoder(path, revision)
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    return {
        "num_layers": len(split_layers(model).layers),
        "positions": None if positions is None else positions - first_position(config),
        "vocab_size": config.vocab_size,
        "new_head": new_head,
    }


def first_position(config: Any) -> int:
    """The id of a text's first position: RoBERTa counts positions from the padding id on."""
    return (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta") else 0


def build_encoder(config: EncoderConfig, vocabulary: Vocabulary, max_length: int, seed: int) -> nn.Module:
    """A RoBERTa with random weights from `seed`."""
    torch.manual_seed(seed)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=vocabulary.size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            # RoBERTa counts positions from the padding id on.
            max_position_embeddings=max_length + vocabulary.pad_id + 1,
            type_vocab_size=1,
            bos_token_id=vocabulary.prefix_id,
            eos_token_id=vocabulary.suffix_id,
            pad_token_id=vocabulary.pad_id,
        )
    )


def load_encoder(path: str, revision: str | None = None, seed: int = 0) -> tuple[nn.Module, bool]:
    """The masked-language model of a name or directory in float32, and whether its head had to be made anew.

    A missing head is drawn from `seed`. Raises JobError for an unsupported family, or where other weights are missing.
    """
    torch.manual_seed(seed)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
        if config.model_type not in HEADS:
            raise JobError([f"encoder: family '{config.model_type}' is not supported; use {', '.join(HEADS)}"])
        model, loading = AutoModelForMaskedLM.from_pretrained(
            path, revision=revision or "main", config=config, output_loading_info=True, dtype=torch.float32
        )
    finally:
        transformers_logging.set_verbosity(before)
    base = f"{model.base_model_prefix}."
    lost = [name for name in loading["missing_keys"] if name.startswith(base) and ".pooler." not in name]
    if lost:
        raise JobError([f"encoder: {len(lost)} weights are missing from '{path}', such as {lost[0]}; get a whole copy"])
    return model, any(not name.startswith(base) for name in loading["missing_keys"])


def save_encoder(model: nn.Module, tokenizer: Path, folder: Path) -> None:
    """A normal Hugging Face directory: weights, config and the tokenizer's files."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)  # type: ignore[operator]
    for file in tokenizer.iterdir():
        if file.name != "stage.json":
            shutil.copy(file, folder / file.name)


def _find_stack(base: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name."""
    if isinstance(getattr(base, "layers", None), nn.ModuleList):
        return base, "layers"
    inner: nn.Module = next(getattr(base, name) for name in ("encoder", "transformer") if hasattr(base, name))
    return inner, "layer" if hasattr(inner, "layer") else "layers"


def split_layers(model: nn.Module) -> Layers:
    """Finds the embeddings and layers by the names that the supported families use."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    inner, name = _find_stack(base)
    return Layers(base.embeddings, list(getattr(inner, name)))  # type: ignore[arg-type]


def count_frozen(model: nn.Module, depth: str) -> int:
    """Layers that a freeze depth freezes. Raises InfeasibleError where the encoder has fewer."""
    layers = len(split_layers(model).layers)
    if depth.isdigit() and int(depth) > layers:
        raise InfeasibleError(f"evaluate.frozen_layers: '{depth}' exceeds the encoder's {layers} layers")
    return int(depth) if depth.isdigit() else layers if depth == "all" else 0


class Given(nn.Module):
    """Stands where an encoder's embeddings stood: hidden states that are given pass as they are."""

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, *others: Any, **named: Any
    ) -> Tensor:
        """`inputs_embeds`, [B, T, D]."""
        assert inputs_embeds is not None
        return inputs_embeds


def copy_above(model: nn.Module, depth: str) -> nn.Module:
    """A copy of the part above a freeze depth alone: it takes `inputs_embeds`, the hidden states at the boundary.

    none: a copy of the whole encoder, which takes `input_ids`. The masked-language head is left out.
    """
    base: nn.Module = model.base_model  # type: ignore[assignment]
    if depth == "none":
        return copy.deepcopy(base)
    parts, frozen = split_layers(model), count_frozen(model, depth)
    # What is in the memo is taken as copied already.
    memo: dict[int, Any] = {id(layer): layer for layer in parts.layers[:frozen]}
    memo[id(parts.embeddings)] = Given()
    above: nn.Module = copy.deepcopy(base, memo)
    inner, name = _find_stack(above)
    setattr(inner, name, nn.ModuleList(list(getattr(inner, name))[frozen:]))
    return above


def encode(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states of the last layer: [B, T], [B, T] -> [B, T, D]."""
    hidden: Tensor = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # type: ignore[operator]
    return hidden


def project_from(model: nn.Module, hidden: Tensor) -> tuple[Tensor, nn.Linear]:
    """What the masked-language head projects to the vocabulary, and by what: [S, D] -> [S, D], the projection."""
    features: Tensor = HEADS[model.config.model_type](model, hidden)  # type: ignore[union-attr, index]
    return features, model.get_output_embeddings()  # type: ignore[operator]


def predict_tokens(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of the masked-language head: [S, D] -> [S, V]."""
    features, projection = project_from(model, hidden)
    logits: Tensor = projection(features)
    return logits


def pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens, special ones included as sentence-transformers has it: [B, T, D], [B, T] -> [B, D]."""
    weights = attention_mask.unsqueeze(-1).to(torch.float32)
    return (hidden.float() * weights).sum(1) / weights.sum(1)
