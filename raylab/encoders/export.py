"""A trial's encoder as a directory that `transformers` and `sentence-transformers` load, with the same vectors."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylab.base.mistakes import JobError
from raylab.encoders.card import write_card
from raylab.runs.trials import find_trial, open_final

# Of sentence-transformers, in the form that all its versions since 2.0 read.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
# What raylab does with every text, whatever the tokenizer it started from says.
TOKENIZER = {"truncation_side": "right", "padding_side": "right", "split_special_tokens": True}
SAMPLES = ("a cough, for 3 days", "", "<mask> </s> [MASK] [SEP] <s>", " Two  spaces\nand a line ", "pain " * 10_000)


def export_trial(results: Path, trial_id: str, directory: Path, tell: Callable[[str], None]) -> None:
    """Writes a complete trial's final encoder to a new or empty directory, which appears whole.

    Weights are copied byte for byte. The tokenizer there puts the special tokens around a text, cuts it to the trial's
    max_length and reads a special token that is spelled out in a text as plain words, as raylab does; pooling is the
    mean over all tokens, not normalised. What can't be expressed is told. Raises JobError.
    """
    row = find_trial(results, trial_id, "export")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise JobError([f"export: {directory} is there already and not an empty folder; name another"])
    encoder = open_final(results, row, tell) / "encoder"
    if not (encoder / "tokenizer.json").is_file():
        raise JobError(
            [f"export: the tokenizer of {trial_id} has no tokenizer.json, so transformers would make another"]
        )
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = directory.absolute().with_name(f".{directory.absolute().name}.{os.getpid()}")
        try:
            shutil.copytree(encoder, scratch)
            _write_settings(scratch, row["corpus.max_length"])
            _check_tokenizer(encoder, scratch, row["corpus.max_length"])
            (scratch / "README.md").write_text(write_card(results, row, encoder), encoding="utf-8")
            os.replace(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise JobError([f"export: {directory} can't be written ({error.strerror}); name another place"]) from None
    if row["corpus.long_documents"] == "windows":
        tell(
            f"{trial_id} averages over windows of {row['corpus.max_length']} tokens, which sentence-transformers "
            "can't do: there, what is longer is cut off, and only shorter texts have the same vectors"
        )


def _write_settings(folder: Path, max_length: int) -> None:
    """What sentence-transformers reads beside the model, and the tokenizer's settings."""
    width = json.loads((folder / "config.json").read_text())
    pooling = {
        "word_embedding_dimension": width.get("hidden_size", width.get("dim")),
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    written: dict[str, Any] = {
        "modules.json": MODULES,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
    }
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | TOKENIZER | {"model_max_length": max_length}
    # The name of transformers 5, which 4 does not know; both know the other one.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    written["tokenizer_config.json"] = settings
    for name, value in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _check_tokenizer(encoder: Path, folder: Path, max_length: int) -> None:
    """Refuses to hand over a tokenizer that feeds the encoder otherwise than raylab does."""
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(encoder), AutoTokenizer.from_pretrained(folder)
    prefix, suffix = ours("")["input_ids"]
    for text in SAMPLES:
        ids = ours(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][: max_length - 2]
        if theirs(text, truncation=True)["input_ids"] != [prefix, *ids, suffix]:
            raise JobError([f"export: transformers would make other tokens of a text than raylab does; see {encoder}"])
