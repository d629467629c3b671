"""What raylab's pre-training is compared with: plain padded steps, the reference recipe, libraries at their best."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from raylab.training.batches import Inputs
from raylab.training.encoder import encode, pool, predict_tokens
from raylab.training.losses import nt_xent
from raylab.training.objectives import Learner

Ints = NDArray[np.int64]
MASK, PAD = 4, 1


class Measured(NamedTuple):
    """Median seconds of a step; the most bytes at once in tensors (`memory`), and that torch held for them."""

    seconds: float
    memory: int
    held: int


def measure_steps(step: Callable[[int], Any], warm: int, repeats: int, steps: int) -> Measured:
    """Median over repeats of the mean time of `steps` steps."""
    for index in range(warm):
        step(index)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for repeat in range(repeats):
        begun = time.perf_counter()
        for index in range(steps):
            step(warm + repeat * steps + index)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / steps)
    return Measured(statistics.median(times), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def make_roberta(config: dict[str, Any]) -> nn.Module:
    """The encoder of all sides."""
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**config))


def _pad(parts: Sequence[Ints]) -> tuple[Tensor, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.from_numpy(part) for part in parts], True, PAD)
    return ids, (ids != PAD).long()


def compute_losses(learner: Learner, inputs: Inputs, pad_id: int) -> dict[str, Tensor]:
    """The losses of a batch from padded texts, as plain code has them: anchors and positives in two passes, each padded
    to its longest, logits of masked tokens alone; in the precision of the weights."""
    device = next(learner.parameters()).device
    lengths, num_texts = np.diff(inputs.offsets).tolist(), len(inputs.rows)
    segments = torch.from_numpy(inputs.input_ids).split(lengths)
    marks = torch.zeros(len(inputs.input_ids), dtype=torch.bool)
    marks[torch.from_numpy(inputs.selected)] = True

    def pad(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        ids = nn.utils.rnn.pad_sequence(list(parts), True, pad_id)
        return ids.to(device), (ids != pad_id).long().to(device)

    ids, mask = pad(segments[:num_texts])
    selected = nn.utils.rnn.pad_sequence(list(marks.split(lengths)[:num_texts]), True, False)
    hidden = encode(learner.encoder, ids, mask)
    logits = predict_tokens(learner.encoder, hidden[selected.to(device)])
    losses = {"mlm": F.cross_entropy(logits, torch.from_numpy(inputs.targets).to(device))}
    if len(lengths) == num_texts:
        return losses
    positives, seen = pad(segments[num_texts:])
    spans = pool(encode(learner.encoder, positives, seen), seen).unflatten(0, (num_texts, -1)).mean(1)
    return losses | {"declutr": nt_xent(pool(hidden, mask), spans, learner.pretrain.declutr.temperature)}


def run_declutr(
    config: dict[str, Any], batches: Sequence[tuple[list[Ints], list[Ints]]], positives: int, repeats: int, steps: int
) -> Measured:
    """DeCLUTR as its paper and code describe it: anchors and positives padded, each to its longest, in two passes; the
    masked-language model's own loss on the anchors, logits of every token; bf16 autocast, AdamW, the loss logged.

    `batches` hold the token ids of anchors and of positives, those of an anchor together.
    """
    model = make_roberta(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    data = []
    for anchors, others in batches:
        ids, mask = _pad(anchors)
        chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & (mask > 0)
        labels = ids.masked_fill(~chosen, -100)
        data.append((ids.masked_fill(chosen, MASK), mask, labels, *_pad(others)))

    def mean(hidden: Tensor, mask: Tensor) -> Tensor:
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def step(index: int) -> None:
        ids, mask, labels, other_ids, other_mask = (part.cuda() for part in data[index % len(data)])
        with torch.autocast("cuda", torch.bfloat16):
            out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
            other = model.roberta(input_ids=other_ids, attention_mask=other_mask).last_hidden_state
            spans = mean(other, other_mask).unflatten(0, (len(ids), positives)).mean(1)
            points = F.normalize(torch.cat([mean(out.hidden_states[-1], mask), spans]).float(), dim=1)
            logits = points @ points.T / 0.05
            logits.fill_diagonal_(-torch.inf)
            partner = torch.arange(len(points), device="cuda").roll(len(ids))
            loss = out.loss + F.cross_entropy(logits, partner)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return measure_steps(step, 4, repeats, steps)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """When each span of `steps` optimiser steps ended, after a warm-up."""

    def __init__(self, warm: int, steps: int) -> None:
        self.warm, self.steps, self.marks = warm, steps, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        past = state.global_step - self.warm
        if past >= 0 and past % self.steps == 0:
            torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
            if past == 0:
                torch.cuda.reset_peak_memory_stats()

    def measure(self) -> Measured:
        """Median over the spans."""
        times = np.diff(self.marks) / self.steps
        return Measured(float(np.median(times)), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Texts of one length, masked ahead: there is nothing to pad and little to collate."""

    def __init__(self, vocabulary: int, length: int, num: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(5, vocabulary, (num, length), generator=generator)
        chosen = torch.rand(self.labels.shape, generator=generator) < 0.15
        self.ids = self.labels.masked_fill(chosen, MASK)
        self.labels = self.labels.masked_fill(~chosen, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def run_trainer(config: dict[str, Any], length: int, batch: int, repeats: int, steps: int) -> Measured:
    """`transformers.Trainer` on masked language modelling: bf16, compiled, fused AdamW, texts of one length."""
    warm = 10
    total = warm + repeats * steps
    clock = _Clock(warm, steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=total, bf16=True, torch_compile=True,
            optim="adamw_torch_fused", weight_decay=0.1, learning_rate=5e-5, max_grad_norm=1.0, logging_steps=1000,
            save_strategy="no", report_to=[], dataloader_num_workers=4, dataloader_pin_memory=True, disable_tqdm=True,
            seed=0,
        )  # fmt: skip
        model = make_roberta(config)
        Trainer(
            model, arguments, train_dataset=_Rows(config["vocab_size"], length, 64 * batch), callbacks=[clock]
        ).train()
    return clock.measure()


def run_pairs(
    config: dict[str, Any], pairs: Sequence[tuple[Ints, Ints]], batch: int, repeats: int, steps: int
) -> Measured:
    """`sentence-transformers` with MultipleNegativesRankingLoss on pairs of spans, given as texts of one word a token;
    bf16, fused AdamW, tokenised by four workers' worth of Rust threads in the collator."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{index}" for index in range(5, config["vocab_size"]))]
    rust = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    rust.pre_tokenizer = WhitespaceSplit()
    rust.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    warm = 10
    clock = _Clock(warm, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "encoder")
        make_roberta(config).save_pretrained(path)
        PreTrainedTokenizerFast(
            tokenizer_object=rust, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            mask_token="<mask>", model_max_length=512, model_input_names=["input_ids", "attention_mask"],
        ).save_pretrained(path)  # fmt: skip
        encoder = Transformer(path)
        model = SentenceTransformer(modules=[encoder, Pooling(config["hidden_size"])], device="cuda")

        def write(ids: Ints) -> str:
            return " ".join(words[token] for token in ids[1:-1])

        data = Dataset.from_dict({
            "anchor": [write(anchor) for anchor, _ in pairs], "positive": [write(positive) for _, positive in pairs],
        })  # fmt: skip
        arguments = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=warm + repeats * steps, bf16=True,
            optim="adamw_torch_fused", learning_rate=5e-5, logging_steps=1000, save_strategy="no", report_to=[],
            dataloader_num_workers=4, disable_tqdm=True, seed=0,
        )  # fmt: skip
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model), callbacks=[clock]
        ).train()
    return clock.measure()
