"""Tokens of a corpus: a tokenizer kept by content, and memory-mapped Arrow stores that all trials share."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylab.base.mistakes import JobError
from raylab.store.stages import Stage, build_stage

BATCH = 1000
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class Vocabulary(NamedTuple):
    """What batches need to know of a tokenizer."""

    prefix_id: int
    suffix_id: int
    pad_id: int
    mask_id: int
    special_ids: list[int]
    size: int


class TokenStore(NamedTuple):
    """Token ids of a table without special ones: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens a row."""
        return np.diff(self.offsets)


def _batches(texts: pa.ChunkedArray) -> Iterator[list[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts.slice(start, BATCH).to_pylist()


def train_tokenizer(results: Path, texts: pa.ChunkedArray, texts_digest: str, vocab_size: int) -> Stage:
    """A byte-level BPE tokenizer from training texts, with RoBERTa's special tokens, as a Hugging Face directory."""

    def build(folder: Path) -> dict[str, Any]:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_batches(texts), trainer)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            cls_token="<s>",
            sep_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            mask_token="<mask>",
        )
        fast.save_pretrained(folder)
        return _describe(fast, "the trained tokenizer")

    return build_stage(results, "tokenizer", {"vocab_size": vocab_size, "texts": texts_digest}, build)


def copy_tokenizer(results: Path, path: str, revision: str | None, encoder_digest: str) -> Stage:
    """The tokenizer of a Hugging Face name or directory. Raises JobError where it can't serve."""

    def build(folder: Path) -> dict[str, Any]:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise JobError([f"encoder.pretrained: no tokenizer loads from '{path}' ({type(error).__name__})"]) from None
        tokenizer.save_pretrained(folder)
        return _describe(tokenizer, path)

    return build_stage(results, "tokenizer", {"encoder": encoder_digest}, build)


def _describe(tokenizer: Any, name: str) -> dict[str, Any]:
    around = tokenizer("", add_special_tokens=True)["input_ids"]
    if len(around) != 2 or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise JobError(
            [f"encoder: the tokenizer of {name} must have a mask and a padding token and put one token around a text"]
        )
    return {
        "prefix_id": around[0],
        "suffix_id": around[1],
        "pad_id": tokenizer.pad_token_id,
        "mask_id": tokenizer.mask_token_id,
        "special_ids": sorted(tokenizer.all_special_ids),
        "size": len(tokenizer),
    }


def store_tokens(
    results: Path,
    texts: pa.ChunkedArray,
    texts_digest: str,
    tokenizer: Stage,
    advance: Callable[[int], None] = lambda rows: None,
) -> Stage:
    """Tokenises texts once, whole and without special tokens, into one memory-mapped Arrow record.

    `advance` is called with the number of rows done. Holds one batch of texts in memory.
    """

    def build(folder: Path) -> dict[str, Any]:
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(tokenizer.path)
        fast.model_max_length = int(1e18)  # texts are cut later, by max_length: no warning about long ones
        raw, lengths, num_words = folder / "raw", [np.zeros(1, np.int64)], 0
        with raw.open("wb") as stream:
            for batch in _batches(texts):
                # A text that spells out "<mask>" has the pieces of that word, not the mask token.
                rows = fast(batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)[
                    "input_ids"
                ]
                np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]).tofile(stream)
                lengths.append(np.array([len(row) for row in rows], dtype=np.int64))
                num_words += sum(len(text.split()) for text in batch)
                advance(len(batch))
        offsets = np.cumsum(np.concatenate(lengths))
        values = np.memmap(raw, dtype=np.int32, mode="r") if offsets[-1] else np.zeros(0, np.int32)
        array = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
        record = pa.record_batch({"tokens": array})
        with pa.ipc.new_file(folder / "tokens.arrow", record.schema) as writer:
            writer.write_batch(record)  # also where a table has no rows: write_table would write nothing
        raw.unlink()
        return {"rows": len(texts), "tokens": int(offsets[-1]), "words": num_words}

    return build_stage(results, "tokens", {"tokenizer": tokenizer.stage_id, "texts": texts_digest}, build)


def open_tokens(folder: Path) -> TokenStore:
    """Maps a stored table; nothing is read until it is used."""
    column = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow"))).get_batch(0)["tokens"]
    return TokenStore(column.values.to_numpy(), column.offsets.to_numpy())
