import copy

import pytest
import torch
from conftest import FAMILIES
from torch import nn

from raylab.training.dropout import QuickDropout, quicken
from raylab.training.encoder import load_encoder


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
