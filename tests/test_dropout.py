import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from torch import nn

from raylab.training.dropout import HashedDropout, draw_keys, hash_places, replace_dropout
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
