import math

import numpy as np
import pytest
import torch
from torch import nn

from raylab.base.noise import derive_seed, uniforms
from raylab.data.corpus import TRAIN, VALIDATION
from raylab.job.blocks import Retrieval
from raylab.training.encoder import load_encoder, pool
from raylab.training.heldout import HELD_OUT, compute_unigram_entropy, measure_heldout, prepare_heldout
from raylab.training.pretrain import open_data, start_rung


def prepare(spec, rows=None, retrieval=None):
    data = open_data(spec)
    rows = np.flatnonzero(data.rows["part"] == VALIDATION) if rows is None else rows
    retrieval = retrieval or spec.settings.evaluate.retrieval
    return prepare_heldout(data.store, rows, data.categories, data.vocabulary, spec.settings.corpus, retrieval)


@pytest.fixture(scope="module")
def spec(make_spec):
    return make_spec("cross_entropy")


@pytest.fixture(scope="module")
def data(spec):
    return open_data(spec)


@pytest.fixture(scope="module")
def held_out(spec):
    return prepare(spec)


@pytest.fixture
def encoder(spec, data):
    return load_encoder(str(start_rung(spec, data).path / "encoder"))[0]


def chosen_rows(data):
    """Validation rows in the order of the held-out inputs."""
    rows = np.flatnonzero(data.rows["part"] == VALIDATION)
    return rows[np.argsort(uniforms(derive_seed(HELD_OUT, "rows"), rows, 1)[:, 0], kind="stable")]


def test_the_same_for_every_seed_and_objective(held_out, make_spec):
    for other in (make_spec("cross_entropy", seed=7), make_spec("cross_entropy", {"pretrain.mlm.mask_fraction": 0.4})):
        for ours, theirs in zip(prepare(other), held_out, strict=True):
            assert np.array_equal(ours, theirs)
    for ours, theirs in zip(prepare(make_spec("declutr")), held_out[:-1], strict=False):
        assert np.array_equal(ours, theirs)


def test_masked_texts(held_out, data):
    rows = chosen_rows(data)
    assert len(rows) == len(held_out.mask) == len(held_out.categories)
    assert np.array_equal(held_out.categories, data.categories[rows])
    selected = held_out.targets >= 0
    ids = np.where(selected, held_out.targets, held_out.masked)
    for i, row in enumerate(rows):
        text = data.store.values[data.store.offsets[row] : data.store.offsets[row + 1]][:62]
        assert ids[i, : held_out.mask[i].sum()].tolist() == [0, *text, 2]
    assert set(np.unique(held_out.targets[~selected])) == {-100}
    assert selected.sum() / (held_out.mask.sum() - 2 * len(rows)) == pytest.approx(0.15, abs=0.03)


def test_masks_of_a_text_ignore_the_others(held_out, spec, data):
    rows = chosen_rows(data)
    few = prepare(spec, np.sort(rows[:10]))
    width = few.masked.shape[1]
    assert np.array_equal(few.masked, held_out.masked[:10, :width])
    assert np.array_equal(few.targets, held_out.targets[:10, :width])


def read_spans(side):
    ids, mask = side
    return [row[1 : size - 1] for row, size in zip(ids, mask.sum(1), strict=True)]


@pytest.mark.parametrize("span", [4, 16, 60])
def test_positives_follow_their_anchors(span, spec, data):
    held_out = prepare(spec, retrieval=Retrieval(span=span, candidates=8))
    anchors, positives = read_spans(held_out.anchors), read_spans(held_out.positives)
    used = chosen_rows(data)
    used = used[: len(used) // 8 * 8]
    assert len(anchors) == len(positives) == 2 * len(used)
    starts = []
    for row, anchor, positive in zip([*used, *used], anchors, positives, strict=True):
        text = data.store.values[data.store.offsets[row] : data.store.offsets[row + 1]]
        size = min(span, len(text) // 2)
        assert len(anchor) == len(positive) == size
        places = [i for i in range(len(text) - 2 * size + 1) if np.array_equal(text[i : i + size], anchor)]
        # Adjacent and without overlap: the two together stand in the text.
        together = [i for i in places if np.array_equal(text[i + size : i + 2 * size], positive)]
        assert together
        starts.append(together[0] / max(1, len(text) - 2 * size))
    assert starts[: len(used)] != starts[len(used) :]
    if span < 60:
        assert min(starts) < 0.2
        assert max(starts) > 0.8


def test_short_documents_and_small_pools(make_store, vocabulary, make_job):
    corpus = make_job().corpus
    store = make_store([7, 8, 9, 30, 3])
    held_out = prepare_heldout(store, np.arange(5), None, vocabulary, corpus, Retrieval(span=16, candidates=256))
    assert held_out.candidates == 3
    assert sorted(len(span) for span in read_spans(held_out.anchors)) == [4, 4, 4, 4, 15, 15]
    assert (held_out.categories == -1).all()
    lonely = prepare_heldout(store, np.array([0, 1]), None, vocabulary, corpus, Retrieval(span=16))
    assert lonely.anchors is None
    assert lonely.positives is None


def test_measures_of_lonely_documents(make_store, vocabulary, make_job, encoder):
    lonely = prepare_heldout(make_store([7, 8]), np.array([0, 1]), None, vocabulary, make_job().corpus, Retrieval())
    assert set(measure_heldout(encoder, None, lonely)) == {"heldout_mlm_loss", "heldout_mlm_accuracy"}


def retrieve(encoder, held_out):
    return measure_heldout(encoder, None, held_out)["heldout_retrieval_accuracy"]


def test_retrieval_of_perfect_and_wrong_pairs(held_out, encoder):
    assert held_out.candidates == 8
    # The very same spans on both sides are found; those of the next document in the pool never are.
    assert retrieve(encoder, held_out._replace(positives=held_out.anchors)) > 0.99
    order = np.arange(len(held_out.anchors[0])).reshape(-1, 8)
    shifted = tuple(side[np.roll(order, 1, axis=1).ravel()] for side in held_out.anchors)
    assert retrieve(encoder, held_out._replace(positives=shifted)) < 0.01
    # Pools stay apart: a perfect pair in another pool is no help.
    moved = tuple(side[np.roll(order, 1, axis=0).ravel()] for side in held_out.anchors)
    assert retrieve(encoder, held_out._replace(positives=moved)) < 0.5


def test_retrieval_of_a_constant_embedding(held_out, encoder):
    with torch.no_grad():
        for parameter in encoder.base_model.embeddings.parameters():
            parameter.zero_()
        encoder.base_model.embeddings.LayerNorm.bias.fill_(1.0)
    found = measure_heldout(encoder, None, held_out)
    assert found["heldout_retrieval_accuracy"] == pytest.approx(1 / 8, abs=0.02)
    assert found["heldout_retrieval_candidates"] == 8


def test_measures_equal_direct_ones(held_out, encoder, data):
    torch.manual_seed(0)
    head = nn.Linear(16, data.num_categories)
    held_out = held_out._replace(categories=np.where(np.arange(len(held_out.mask)) % 3, held_out.categories, -1))
    encoder.train()
    found = measure_heldout(encoder, head, held_out)
    assert encoder.training
    assert measure_heldout(encoder, head, held_out) == found
    encoder.eval()
    ids, mask, targets = (torch.from_numpy(a) for a in (held_out.masked, held_out.mask, held_out.targets))
    with torch.inference_mode():
        output = encoder(input_ids=ids, attention_mask=mask, labels=targets, output_hidden_states=True)
        predicted = head(pool(output.hidden_states[-1], mask)).argmax(1).numpy()
    right = (output.logits.argmax(2) == targets)[targets >= 0]
    known = held_out.categories >= 0
    assert found["heldout_mlm_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["heldout_mlm_accuracy"] == pytest.approx(right.double().mean().item())
    assert found["heldout_category_accuracy"] == pytest.approx((predicted == held_out.categories)[known].mean())


def test_unigram_entropy(held_out, data):
    train_rows = np.flatnonzero(data.rows["part"] == TRAIN)
    counts = dict.fromkeys(range(data.vocabulary.size), 1)
    for row in train_rows:
        for token in data.store.values[data.store.offsets[row] : data.store.offsets[row + 1]].tolist():
            counts[token] += 1
    total = sum(counts.values())
    targets = [token for token in held_out.targets.ravel().tolist() if token >= 0]
    direct = -sum(math.log(counts[token] / total) for token in targets) / len(targets)
    ours = compute_unigram_entropy(data.store, train_rows, held_out, data.vocabulary)
    assert ours == pytest.approx(direct, rel=1e-9)
    assert 3 < ours < math.log(400)
