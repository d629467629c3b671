"""Fine-tuning above a frozen boundary, against the plain way: a whole copy of the encoder a cell, nothing kept."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import FAMILIES
from torch import nn

from raylab.base.mistakes import InfeasibleError
from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.evaluation.activations import join_texts, keep_states, open_states, open_texts, prune_states
from raylab.evaluation.finetune import embed_texts, fine_tune
from raylab.evaluation.heads import Heads, Order, Run, train_heads, weigh_rows
from raylab.job.blocks import Corpus, FineTune
from raylab.training.batches import cut_pieces, pad_rows, slice_piece
from raylab.training.embedding import embed
from raylab.training.encoder import copy_above, count_frozen, encode, load_encoder, pool, split_layers
from raylab.training.steps import deal

DEPTHS = ("none", "embeddings", "1", "2")
SETTINGS = FineTune(steps=10, batch_size=6, learning_rate=5e-3, head_learning_rate=5e-2, hidden_size=8)
LABELS = np.arange(24) % 3


@pytest.fixture(scope="module")
def store(make_store):
    """24 texts of 5 to 150 tokens."""
    return make_store(np.random.default_rng(0).integers(5, 151, 24))


def make_corpus(long_documents="truncate"):
    return Corpus.model_construct(max_length=64, long_documents=long_documents)


def load_still(folder):
    """An encoder without dropout: then no random number depends on how a batch is cut into parts."""
    model = load_encoder(str(folder))[0].eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def texts_at(model, depth, store, vocabulary, folder, corpus=None):
    corpus, rows = corpus or make_corpus(), np.arange(24)
    if depth == "none":
        return open_texts(store, rows, vocabulary, corpus)
    kept = keep_states(folder, {}, lambda: model, store, rows, vocabulary, corpus, ["embeddings", "1", "2"])
    return open_states(kept.path, depth)


def pool_plainly(model, store, rows, vocabulary, corpus):
    """Embeddings of rows, one batch padded to the longest; windows by their tokens."""
    pieces = cut_pieces(store.lengths, rows, corpus.max_length, corpus.long_documents)
    ids, mask = pad_rows([slice_piece(store, pieces, i) for i in range(len(pieces.row))], vocabulary)
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    weighted = pool(encode(model, ids, mask), mask) * mask.sum(1, keepdim=True)
    owners = torch.from_numpy(pieces.owner)
    sums = torch.zeros(len(rows), weighted.shape[1]).index_add(0, owners, weighted)
    return sums / torch.zeros(len(rows)).index_add(0, owners, mask.sum(1).float())[:, None]


def fine_tune_plainly(encoder, store, run, vocabulary, depth, settings, corpus, outputs=3):
    """The reference: the whole encoder copied, frozen parts by requires_grad, every step from token ids."""
    model = copy.deepcopy(encoder)
    parts = split_layers(model)
    frozen = [] if depth == "none" else [parts.embeddings, *parts.layers[: int(depth) if depth.isdigit() else 0]]
    if depth == "all":
        frozen = [model]
    head = Heads([run.seed], model.config.hidden_size, outputs, settings)
    for module in frozen:
        module.requires_grad_(False)
    base = [p for p in model.base_model.parameters() if p.requires_grad]
    groups = [(p, settings.learning_rate, p.ndim > 1) for p in base]
    groups += [(p, settings.head_learning_rate, n.startswith("weight")) for n, p in head.named_parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": lr, "weight_decay": settings.weight_decay if decays else 0.0}
            for p, lr, decays in groups
        ]
    )
    order, weights = (
        Order(run.seed, len(run.train), settings.batch_size),
        weigh_rows(run.labels, settings.class_weights),
    )
    model.train()
    for module in frozen:
        module.eval()
    for step in range(settings.steps):
        batch = order.batch(step)
        logits = head(pool_plainly(model, store, run.train[batch], vocabulary, corpus)[None], step)[0]
        rate = torch.from_numpy(weights[batch])
        y = torch.from_numpy(run.labels[batch]).long()
        if y.ndim == 1:
            loss = (F.cross_entropy(logits, y, reduction="none") * rate).mean()
        else:
            each = F.binary_cross_entropy_with_logits(logits, y.clamp(min=0).float(), reduction="none")
            loss = (each * rate)[y >= 0].sum() / (y >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p, _, _ in groups], 1.0)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        logits = head(pool_plainly(model, store, run.eval, vocabulary, corpus)[None])[0].double()
    return (logits.softmax(1) if run.labels.ndim == 1 else logits.sigmoid()).numpy()


RUN = Run(np.arange(16), LABELS[:16], np.arange(10, 24), 7)


def tune(model, depth, store, vocabulary, folder, run=RUN, settings=SETTINGS, corpus=None, world=ALONE):
    texts = texts_at(model, depth, store, vocabulary, folder, corpus)
    above = copy_above(model, depth)
    return fine_tune(above, texts, run, [settings.steps], 3, settings, world=world)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_plain_way(family, depth, encoder_folders, store, vocabulary, tmp_path):
    model = load_still(encoder_folders[family])
    [found] = tune(model, depth, store, vocabulary, tmp_path).probabilities
    expected = fine_tune_plainly(model, store, RUN, vocabulary, depth, SETTINGS, make_corpus())
    start = fine_tune_plainly(
        model, store, RUN, vocabulary, depth, SETTINGS.model_copy(update={"steps": 0}), make_corpus()
    )
    # Half precision at the boundary; without one the numbers are those of float32.
    np.testing.assert_allclose(found, expected, atol=1e-4 if depth == "none" else 5e-3)
    assert np.abs(expected - start).max() > 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_costs_little(family, encoder_folders, store, vocabulary, tmp_path):
    """Pooled embeddings, and gradients of the layers above, from kept states are those of the whole encoder."""
    model, rows, corpus = load_still(encoder_folders[family]), np.arange(24), make_corpus()
    target = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    whole = pool_plainly(model, store, rows, vocabulary, corpus)
    (whole * target).sum().backward()
    for depth in ("embeddings", "1"):
        above, texts = copy_above(model, depth), texts_at(model, depth, store, vocabulary, tmp_path)
        x = embed_texts(above, texts, rows)
        torch.testing.assert_close(x, whole, atol=3e-3, rtol=0)
        (x * target).sum().backward()
        theirs = list(split_layers(model).layers[int(depth) if depth.isdigit() else 0 :])
        for ours, other in zip(above.named_parameters(), nn.ModuleList(theirs).named_parameters(), strict=False):
            assert ours[0].split(".")[-2:] == other[0].split(".")[-2:]
            scale = float(other[1].grad.abs().max())
            torch.testing.assert_close(ours[1].grad, other[1].grad, atol=1e-2 * scale + 1e-5, rtol=0)


@pytest.mark.parametrize("long_documents", ["truncate", "windows"])
def test_the_embeddings_of_the_pass_are_embeds(long_documents, encoder_folders, store, vocabulary, tmp_path):
    model, corpus = load_still(encoder_folders["bert"]), make_corpus(long_documents)
    kept = keep_states(tmp_path, {}, lambda: model, store, np.arange(24), vocabulary, corpus, ["1"])
    x = embed(model, store, np.arange(24), vocabulary, max_length=64, long_documents=long_documents)
    assert np.array_equal(np.load(kept.path / "embeddings.npy"), x)
    assert kept.info["bytes"] == np.load(kept.path / "states-1.npy").nbytes
    texts = open_states(kept.path, "1")
    again = embed_texts(copy_above(model, "1"), texts, np.arange(24))
    np.testing.assert_allclose(again.detach().numpy(), x, atol=3e-3)
    assert (texts.first[-1] > 24) == (long_documents == "windows")


@pytest.mark.parametrize("depth", ["none", "1"])
def test_windows_several_labels_and_weights(depth, encoder_folders, store, vocabulary, tmp_path):
    model, corpus = load_still(encoder_folders["roberta"]), make_corpus("windows")
    labels = np.random.default_rng(1).integers(-1, 2, (16, 3)).astype(np.int8)
    run = RUN._replace(labels=labels)
    settings = SETTINGS.model_copy(update={"class_weights": "balanced", "dropout": 0.4})
    [found] = tune(model, depth, store, vocabulary, tmp_path, run, settings, corpus).probabilities
    expected = fine_tune_plainly(model, store, run, vocabulary, depth, settings, corpus)
    np.testing.assert_allclose(found, expected, atol=1e-4 if depth == "none" else 5e-3)


def test_depth_all_is_the_same_head_on_embeddings(encoder_folders, store, vocabulary):
    model = load_still(encoder_folders["roberta"])
    x = embed(model, store, np.arange(24), vocabulary, max_length=64, long_documents="truncate")
    [trained] = train_heads(torch.from_numpy(x), [RUN], [SETTINGS.steps], 3, SETTINGS)
    expected = fine_tune_plainly(model, store, RUN, vocabulary, "all", SETTINGS, make_corpus())
    np.testing.assert_allclose(trained.probabilities[0], expected, atol=1e-4)


@pytest.mark.parametrize("depth", [*DEPTHS, "all"])
def test_parameters_updated_and_what_stays(depth, encoder_folders, store, vocabulary, tmp_path):
    model = load_encoder(str(encoder_folders["roberta"]))[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = 16 * 8 + 8 + 8 * 3 + 3
    if depth == "all":
        [trained] = train_heads(torch.randn(24, 16), [RUN], [2], 3, SETTINGS)
        assert trained.num_parameters == head
        return
    trained = tune(model, depth, store, vocabulary, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    parts, frozen = split_layers(model), count_frozen(model, depth)
    above = sum(p.numel() for layer in parts.layers[frozen:] for p in layer.parameters())
    if depth == "none":
        above += sum(p.numel() for p in parts.embeddings.parameters())
    assert trained.num_parameters == head + above
    assert trained.seconds > 0


def test_only_the_layers_above_are_copied(encoder_folders):
    model = load_encoder(str(encoder_folders["modernbert"]))[0]
    above = copy_above(model, "1")
    mine = {id(p) for p in model.parameters()}
    assert not mine & {id(p) for p in above.parameters()}
    layer = sum(p.numel() for p in split_layers(model).layers[1].parameters())
    assert sum(p.numel() for p in above.parameters()) == layer + 16  # and the last norm
    assert len(split_layers(model).layers) == 2


def test_it_is_seeded_with_dropout_and_learns(encoder_folders, store, vocabulary, tmp_path):
    model = load_encoder(str(encoder_folders["bert"]))[0].eval()
    for depth in ("embeddings", "none"):
        first, again, other = (
            tune(model, depth, store, vocabulary, tmp_path, RUN._replace(seed=seed)).probabilities[0]
            for seed in (3, 3, 4)
        )
        assert np.array_equal(first, again)
        assert not np.allclose(first, other, atol=1e-3)
    settings = SETTINGS.model_copy(update={"steps": 80, "hidden_size": 16})
    seen = RUN._replace(eval=RUN.train)
    [found] = tune(model, "none", store, vocabulary, tmp_path, seen, settings).probabilities
    assert (found.argmax(1) == RUN.labels).all()


def test_more_steps_pass_the_fewer(encoder_folders, store, vocabulary, tmp_path):
    """Probabilities on the way are those of a training that ends there."""
    model = load_encoder(str(encoder_folders["roberta"]))[0].eval()
    texts, above = texts_at(model, "1", store, vocabulary, tmp_path), copy_above(model, "1")
    run = RUN._replace(until=1)
    whole = fine_tune(above, texts, run, [2, 6], 3, SETTINGS)
    for steps, expected in zip((2, 6), whole.probabilities, strict=True):
        [found] = fine_tune(above, texts, RUN, [steps], 3, SETTINGS).probabilities
        assert np.array_equal(found, expected)


def test_values_beyond_half_precision_are_kept_in_full(encoder_folders, store, vocabulary, tmp_path):
    model = load_still(encoder_folders["modernbert"])
    with torch.no_grad():
        split_layers(model).layers[0].mlp.Wo.weight.mul_(1e10)
    texts = texts_at(model, "1", store, vocabulary, tmp_path)
    assert texts.slice(0).dtype == np.float32
    assert np.abs(texts.slice(0)).max() > 65504
    expected = embed(model, store, np.arange(24), vocabulary, max_length=64, long_documents="truncate")
    found = embed_texts(copy_above(model, "1"), texts, np.arange(24))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-3)
    # A depth that fits is kept as if it had been asked for alone.
    assert texts_at(model, "embeddings", store, vocabulary, tmp_path).slice(0).dtype == np.float16


def test_bfloat16_on_cpu_is_close_and_the_same_again(encoder_folders, store, vocabulary):
    model, how = load_still(encoder_folders["roberta"]), {"max_length": 64, "long_documents": "truncate"}
    full = embed(model, store, np.arange(24), vocabulary, **how)
    half, again = (embed(model, store, np.arange(24), vocabulary, **how, half=True) for _ in range(2))
    assert np.array_equal(half, again)
    assert not np.array_equal(half, full)
    cosines = (half * full).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
    assert cosines.min() > 0.9999


@pytest.mark.parametrize("depth", ["none", "1"])
def test_fine_tuning_in_bfloat16_is_close_and_the_same_again(depth, encoder_folders, store, vocabulary, tmp_path):
    model = load_still(encoder_folders["bert"])
    texts, above = texts_at(model, depth, store, vocabulary, tmp_path), copy_above(model, depth)
    full, half, again = (
        fine_tune(above, texts, RUN, [SETTINGS.steps], 3, SETTINGS, half=half).probabilities[0]
        for half in (False, True, True)
    )
    assert np.array_equal(half, again)
    assert not np.array_equal(half, full)
    np.testing.assert_allclose(half, full, atol=0.05)
    assert next(above.parameters()).dtype == torch.float32


def test_pruned_states_are_made_again(encoder_folders, store, vocabulary, tmp_path):
    model, calls = load_still(encoder_folders["roberta"]), []

    def keep():
        corpus = make_corpus()
        opened = lambda: calls.append(1) or model  # noqa: E731
        return keep_states(tmp_path, {"a": 1}, opened, store, np.arange(24), vocabulary, corpus, ["1"])

    first = keep()
    assert keep().reused
    values = np.array(open_states(first.path, "1").slice(3))
    assert prune_states(tmp_path, first.stage_id) == first.info["bytes"] + 128
    again = keep()
    assert not again.reused
    assert len(calls) == 2
    assert np.array_equal(open_states(again.path, "1").slice(3), values)


def test_joined_texts(encoder_folders, store, make_store, vocabulary):
    corpus, other = make_corpus("windows"), make_store([100, 7], seed=1)
    one, two = open_texts(store, np.arange(24), vocabulary, corpus), open_texts(other, np.arange(2), vocabulary, corpus)
    both = join_texts(one, two)
    assert len(both.first) == 24 + 2 + 1
    for index in range(2):
        pieces = range(both.first[24 + index], both.first[25 + index])
        ours = [both.slice(p).tolist() for p in pieces]
        assert ours == [two.slice(p).tolist() for p in range(two.first[index], two.first[index + 1])]
        assert [len(piece) for piece in ours] == both.length[pieces.start : pieces.stop].tolist()
    assert both.slice(3).tolist() == one.slice(3).tolist()


# Labels of some rows are missing, so that the workers' shares count unequally; with one row a step, a worker has none.
SHARED_LABELS = np.random.default_rng(1).integers(-1, 2, (16, 3)).astype(np.int8)
SHARED = {
    "one label": (RUN, {"batch_size": 5}),
    "one label, weighted": (RUN._replace(labels=LABELS[:16] // 2), {"batch_size": 7, "class_weights": "balanced"}),
    "several labels, weighted": (RUN._replace(labels=SHARED_LABELS), {"class_weights": "balanced", "dropout": 0.4}),
    "one row": (RUN._replace(eval=np.array([20])), {"batch_size": 1}),
}


def tune_share(folder, name, depth, store, vocabulary, states, world=ALONE):
    run, changes = SHARED[name]
    settings = SETTINGS.model_copy(update=changes)
    return tune(load_still(folder), depth, store, vocabulary, states, run, settings, make_corpus("windows"), world)


def run_worker(rank, folder, encoder, store, vocabulary):
    """One of two processes, through all that is shared."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    world = World(rank, 2, lambda value: value)
    found = {
        (name, depth): tune_share(encoder, name, depth, store, vocabulary, folder / str(rank), world)
        for name in SHARED
        for depth in ("none", "1")
    }
    torch.save({key: (torch.from_numpy(t.probabilities[0]), t.num_parameters) for key, t in found.items()},
               folder / f"{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(encoder_folders, store, vocabulary, tmp_path_factory):
    """What two workers make of each run of `SHARED` at two depths."""
    folder = tmp_path_factory.mktemp("workers")
    arguments = (folder, encoder_folders["roberta"], store, vocabulary)
    torch.multiprocessing.spawn(run_worker, arguments, nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["none", "1"])
@pytest.mark.parametrize("name", SHARED)
def test_two_workers_equal_one(name, depth, two_workers, encoder_folders, store, vocabulary, tmp_path):
    alone = tune_share(Path(encoder_folders["roberta"]), name, depth, store, vocabulary, tmp_path)
    for probabilities, num_parameters in (found[name, depth] for found in two_workers):
        np.testing.assert_allclose(probabilities.numpy(), alone.probabilities[0], atol=1e-4)
        assert num_parameters == alone.num_parameters


def test_shares_are_dealt_evenly():
    tokens = np.array([9, 1, 8, 2, 7, 3, 6])
    shares = deal(tokens, 3)
    assert [share.tolist() for share in shares] == [[0, 1, 3], [2, 5], [4, 6]]  # 12, 11 and 13 tokens
    assert np.array_equal(deal(tokens, 1)[0], np.arange(7))


def test_freezing_too_deep_is_refused(encoder_folders):
    model = load_encoder(str(encoder_folders["roberta"]))[0]
    with pytest.raises(InfeasibleError, match="'3' exceeds the encoder's 2 layers"):
        copy_above(model, "3")


def test_batches_are_epochs_of_permutations():
    order = Order(3, 10, 4)
    rows = np.concatenate([order.batch(step) for step in range(10)])
    assert [sorted(rows[start : start + 10]) for start in (0, 10, 20, 30)] == [list(range(10))] * 4
    assert np.array_equal(Order(3, 10, 4).batch(7), rows[28:32])  # without the steps before
    assert len(Order(3, 3, 16).batch(5)) == 3
    assert derive_seed(3, "order", 0) != derive_seed(4, "order", 0)
