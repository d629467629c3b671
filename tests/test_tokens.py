"""Tokens: a tokenizer of the given texts alone, and stores that hold just what it makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from raylab.base.mistakes import JobError
from raylab.data import tokens
from raylab.data.corpus import digest_column
from raylab.data.tokens import SPECIAL, Vocabulary, copy_tokenizer, open_tokens, store_tokens, train_tokenizer
from raylab.store.stages import FOLDER, Stage

TRAINING = ["the patient was seen in clinic", "the patient denies pain", "Pain was rated 3/10, naïve to opioids"] * 20
TEXTS = ["the patient", "x", " ", "\n", "", "unseen: 𝄞 漢字 é", "a longer text about a patient " * 50, "the patient"]


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def train(results: Path, texts: list[str], vocab_size: int = 320) -> Stage:
    return train_tokenizer(results, column(texts), digest_column(column(texts)), vocab_size)


def store(results: Path, texts: list[str], tokenizer: Stage) -> Stage:
    return store_tokens(results, column(texts), digest_column(column(texts)), tokenizer)


def rows_of(stage: Stage) -> list[list[int]]:
    found = open_tokens(stage.path)
    return [found.values[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def trained(results: Path) -> Stage:
    return train(results, TRAINING)


@pytest.fixture(scope="module")
def fast(trained: Stage) -> Any:
    return AutoTokenizer.from_pretrained(trained.path)


def test_trained_tokenizer_has_the_special_tokens_of_roberta(trained: Stage, fast: Any) -> None:
    assert fast.convert_ids_to_tokens(list(range(5))) == list(SPECIAL)
    assert Vocabulary(**trained.info) == Vocabulary(0, 2, 1, 4, [0, 1, 2, 3, 4], len(fast))
    assert fast("the patient")["input_ids"] == [0, *fast("the patient", add_special_tokens=False)["input_ids"], 2]


def test_tokenizer_depends_on_the_given_texts_and_size(results: Path, trained: Stage, tmp_path: Path) -> None:
    found = train(results, list(TRAINING))
    assert (found.stage_id, found.info, found.reused) == (trained.stage_id, trained.info, True)
    assert train(results, TRAINING, 330).stage_id != trained.stage_id
    assert train(results, [*TRAINING, "one more"]).stage_id != trained.stage_id
    again = train(tmp_path, TRAINING)  # elsewhere, from the start: the same file
    assert not again.reused
    assert (again.path / "tokenizer.json").read_bytes() == (trained.path / "tokenizer.json").read_bytes()


def test_batches_do_not_matter(trained: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH", 7)
    assert (train(tmp_path, TRAINING).path / "tokenizer.json").read_bytes() == (
        trained.path / "tokenizer.json"
    ).read_bytes()


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(fast: Any, text: str) -> None:
    ids = fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert fast.decode(ids) == text
    assert fast.unk_token_id not in ids


def test_store_holds_what_the_tokenizer_makes(
    results: Path, trained: Stage, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH", 3)
    seen: list[int] = []
    stage = store_tokens(results, column(TEXTS), digest_column(column(TEXTS)), trained, seen.append)
    assert rows_of(stage) == [fast(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert seen == [3, 3, 2]
    found = open_tokens(stage.path)
    assert found.lengths.tolist() == [len(row) for row in rows_of(stage)]
    assert found.lengths[4] == 0
    assert stage.info == {
        "rows": len(TEXTS),
        "tokens": len(found.values),
        "words": sum(len(text.split()) for text in TEXTS),
    }
    assert not (stage.path / "raw").exists()


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_store_of_nothing(results: Path, trained: Stage, texts: list[str]) -> None:
    assert rows_of(store(results, texts, trained)) == [[] for _ in texts]


def test_special_tokens_spelt_out_in_a_text_are_text(results: Path, trained: Stage, fast: Any) -> None:
    texts = ["before <mask> after", "</s><s>", "<pad>"]
    stored = rows_of(store(results, texts, trained))
    assert not {token for row in stored for token in row} & set(trained.info["special_ids"])
    assert [fast.decode(row) for row in stored] == texts


def test_stored_tokens_are_mapped_not_read(results: Path, trained: Stage) -> None:
    found = open_tokens(store(results, TEXTS, trained).path)
    for array in (found.values, found.offsets):
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert found.values.dtype == np.int32
    assert found.offsets.dtype == np.int64
    address = found.values.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        ranges = [line.split("-", 1) for line in maps if line.rstrip().endswith("tokens.arrow")]
    assert any(int(low, 16) <= address < int(rest.split()[0], 16) for low, rest in ranges)


def test_stores_are_shared_by_content(results: Path, trained: Stage) -> None:
    first = store(results, ["shared text"], trained)
    chunks = pa.chunked_array([pa.array(["other", "shared text"], pa.large_string())[1:]])
    again = store_tokens(results, chunks, digest_column(chunks), trained)
    assert (first.reused, again.reused, again.stage_id) == (False, True, first.stage_id)
    other = train(results, [*TRAINING, "another tokenizer"])
    assert store(results, ["shared text"], other).stage_id != first.stage_id


def write_bert(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "patient", "##s", "pain"]
    BertTokenizerFast(vocab={word: code for code, word in enumerate(words)}).save_pretrained(folder)
    return folder


def test_a_bert_directory_is_copied_whole(results: Path, tmp_path: Path) -> None:
    stage = copy_tokenizer(results, str(write_bert(tmp_path / "bert")), None, "bert")
    assert Vocabulary(**stage.info) == Vocabulary(2, 3, 0, 4, [0, 1, 2, 3, 4], 9)
    assert rows_of(store(results, ["the patients", "unseen pain", "[SEP]"], stage)) == [[5, 6, 7], [1, 8], [1, 1, 1]]
    assert copy_tokenizer(results, "not looked at", None, "bert").reused


@pytest.mark.parametrize(
    ("special", "surrounded"),
    [
        ({"pad_token": "[PAD]"}, True),
        ({"mask_token": "[MASK]"}, True),
        ({"pad_token": "[PAD]", "mask_token": "[MASK]"}, False),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(
    results: Path, tmp_path: Path, special: dict[str, str], surrounded: bool
) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "[CLS]": 3, "[SEP]": 4}, unk_token="[UNK]")
    )
    if surrounded:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(tmp_path)
    before = sorted((results / FOLDER).glob("tokenizer-*"))
    with pytest.raises(JobError, match="must have a mask and a padding token and put one token around"):
        copy_tokenizer(results, str(tmp_path), None, f"wrong {special} {surrounded}")
    assert sorted((results / FOLDER).glob("tokenizer-*")) == before


@pytest.mark.parametrize("content", [None, "{", '{"a": 1}', '{"version": "1.0", "model": {"type": "Odd"}}'])
def test_a_directory_without_a_tokenizer_is_refused(results: Path, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(JobError, match=r"encoder\.pretrained: no tokenizer loads from"):
        copy_tokenizer(results, str(folder), None, f"broken {content}")
