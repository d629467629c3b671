import copy

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from scipy.stats import binomtest, chisquare
from torch import nn

from raylab.training.dropout import HashedDropout, QuickDropout, draw_keys, hash_places, quicken, replace_dropout
from raylab.training.encoder import load_encoder


def reference_hash(place, keys):
    """The same in Python's own integers."""
    word = 2**32 - 1
    x = (place ^ keys[0]) & word
    x = ((x ^ (x >> 16)) * 0x7FEB352D & word) ^ (keys[1] & word)
    x = (x ^ (x >> 15)) * 0x846CA68B & word
    return (x ^ (x >> 16)) & (2**31 - 1)


def test_hash_is_that_of_whole_numbers():
    keys = draw_keys(5, 1)[0]
    found = hash_places(5000, keys).tolist()
    assert found == [reference_hash(place, keys.tolist()) for place in range(5000)]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_share_dropped_and_what_is_kept(p):
    layer, x = HashedDropout(p, draw_keys(1, 1)[0]).train(), torch.rand(400, 500) + 1
    out = layer(x)
    dropped = out == 0
    assert binomtest(int(dropped.sum()), x.numel(), p).pvalue > 1e-4
    torch.testing.assert_close(out[~dropped], x[~dropped] / (1 - p))
    assert torch.equal(out, layer(x))
    assert torch.equal(layer.eval()(x), x)


def test_masks_of_places_and_keys_are_independent():
    keys = draw_keys(3, 40)
    masks = torch.stack([hash_places(2**16, pair) for pair in keys]).numpy() < 0.1 * 2**31
    # Neighbours in a row, rows of 768, powers of two apart, and other layers or steps.
    for shift in (1, 2, 64, 768, 1024, 2**15):
        both = masks[:, shift:] & masks[:, :-shift]
        assert abs(both.mean() - 0.01) < 5 * np.sqrt(0.01 / both.size)
    for other in range(1, 40):
        both = masks[0] & masks[other]
        assert abs(both.mean() - 0.01) < 5 * np.sqrt(0.01 / both.size)
    # No place is dropped more often than others.
    counts = np.bincount(masks.sum(0), minlength=41)[:10]
    chances = [float(np.exp(_log_binomial(40, k, 0.1))) for k in range(10)]
    expected = np.array(chances) / sum(chances) * counts.sum()
    assert chisquare(counts, expected).pvalue > 1e-4


def _log_binomial(n, k, p):
    from scipy.stats import binom

    return binom.logpmf(k, n, p)


def test_keys_are_of_the_seed():
    assert torch.equal(draw_keys(7, 25), draw_keys(7, 25))
    assert not torch.equal(draw_keys(7, 25), draw_keys(8, 25))
    assert len({tuple(pair) for pair in draw_keys(7, 1000).tolist()}) == 1000


def test_an_encoders_dropout_is_replaced(encoder_folders):
    model = load_encoder(str(encoder_folders["roberta"]))[0].train()
    names = set(model.state_dict())
    found = sum(type(module) is nn.Dropout for module in model.base_model.modules())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    keys = replace_dropout(model.base_model)
    assert len(keys) == found > 0
    assert not any(type(module) is nn.Dropout for module in model.base_model.modules())
    assert set(model.state_dict()) == names
    ids = torch.randint(5, 40, (2, 12))

    def run(seed):
        keys.copy_(draw_keys(seed, len(keys)))
        return model.base_model(input_ids=ids).last_hidden_state

    # Attention's own dropout is outside of this: its numbers are torch's.
    for layer in model.base_model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_units_are_dropped_at_their_share_and_the_rest_grows(p):
    torch.manual_seed(0)
    x = torch.rand(1001, 301) + 0.5
    y = QuickDropout(p)(x)
    kept = y != 0
    # Four standard deviations of a share of 301,301 draws.
    assert kept.float().mean() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=2e-4, atol=0)
    for rows in (kept[::2], kept[1::2], kept[:, ::4], kept[:, 1::4], kept[:, 3::4]):
        assert rows.float().mean() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / rows.numel()) ** 0.5)


def test_the_gradient_passes_where_the_unit_does():
    torch.manual_seed(0)
    x = torch.randn(50, 7, requires_grad=True)
    y = QuickDropout(0.3)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_seeded_and_off_in_evaluation():
    x, layer = torch.ones(9, 33, dtype=torch.bfloat16), QuickDropout(0.2)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(layer(x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(QuickDropout(0.0)(x), x)
    assert not QuickDropout(1.0)(x).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dropout_of_an_encoder_is_replaced(family, encoder_folders):
    model = load_encoder(str(encoder_folders[family]))[0].eval()
    before = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    quick = copy.deepcopy(model)
    quicken(quick)
    after = [m for m in quick.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in after] == before
    assert all(type(m) is QuickDropout and not m.training for m in after)
    assert before or family == "modernbert"
