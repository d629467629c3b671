import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from torch import nn

from raylab.training import projection
from raylab.training.encoder import load_encoder, predict_tokens, project_from
from raylab.training.projection import projected_cross_entropy


@pytest.mark.parametrize("aligned", [1, 64])
@pytest.mark.parametrize("limit", [1, 300, 2**22])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(bias, limit, aligned, monkeypatch):
    monkeypatch.setitem(projection.LOGITS, "cpu", limit)
    monkeypatch.setitem(projection.ALIGNED, "cpu", aligned)
    torch.manual_seed(0)
    layer, features, targets = nn.Linear(6, 50, bias=bias), torch.randn(31, 6) * 3, torch.randint(0, 50, (31,))
    found = []
    for compute in (
        projected_cross_entropy,
        lambda x, layer, y: F.cross_entropy(layer(x), y, reduction="sum"),
    ):
        x = features.clone().requires_grad_()
        layer.zero_grad()
        loss = compute(x, layer, targets)
        (loss * 0.3).backward()
        found.append([loss.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    assert len(found[0]) == 3 + bias
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_only_where_asked():
    torch.manual_seed(0)
    layer, targets = nn.Linear(6, 50), torch.randint(0, 50, (7,))
    layer.weight.requires_grad_(False)
    projected_cross_entropy(torch.randn(7, 6), layer, targets).backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.abs().sum() > 0


def test_no_tokens_are_no_loss():
    layer, features = nn.Linear(6, 50), torch.randn(0, 6, requires_grad=True)
    loss = projected_cross_entropy(features, layer, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not layer.weight.grad.any()


def test_half_precision_is_that_of_autocast():
    torch.manual_seed(0)
    layer, features, targets = nn.Linear(64, 500), torch.randn(40, 64), torch.randint(0, 500, (40,))
    found = []
    for whole in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if whole:
                loss = F.cross_entropy(layer(features).float(), targets, reduction="sum")
            else:
                loss = projected_cross_entropy(features, layer, targets)
        loss.backward()
        found.append((loss.detach(), layer.weight.grad.clone()))
    (loss, gradient), (other, theirs) = found
    assert loss.dtype == gradient.dtype == torch.float32
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    torch.testing.assert_close(gradient, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head(family, encoder_folders):
    model = load_encoder(str(encoder_folders[family]))[0]
    torch.manual_seed(0)
    hidden, targets = torch.randn(23, 16), torch.randint(0, 400, (23,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    found = []
    for whole in (False, True):
        model.zero_grad()
        if whole:
            loss = F.cross_entropy(predict_tokens(model, hidden), targets, reduction="sum")
        else:
            loss = projected_cross_entropy(*project_from(model, hidden), targets)
        loss.backward()
        found.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (loss, ours), (other, theirs) = found
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_form_that_is_compiled_gives_the_same():
    torch.manual_seed(0)
    logits, wanted = torch.randn(40, 64) * 4, torch.randint(0, 50, (40,))
    logits[:, 50:] = -torch.inf
    ours, theirs = projection._compare_fused(logits, wanted), projection._compare(logits.clone(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not ours[1][:, 50:].any()


def test_rows_without_a_target_count_nothing(monkeypatch):
    """As where code is compiled, but for the compiling."""
    monkeypatch.setattr(projection, "_compile", lambda: projection._compare_fused)
    monkeypatch.setitem(projection.LOGITS, "cpu", 300)
    torch.manual_seed(0)
    layer, features = nn.Linear(6, 50), torch.randn(31, 6) * 3
    targets = torch.randint(0, 50, (31,)).index_fill(0, torch.tensor([0, 7, *range(20, 31)]), projection.NO_TARGET)
    found = []
    for compute in (
        lambda x: projected_cross_entropy(x, layer, targets, compiled=True),
        lambda x: F.cross_entropy(layer(x), targets, reduction="sum", ignore_index=projection.NO_TARGET),
    ):
        x = features.clone().requires_grad_()
        layer.zero_grad()
        loss = compute(x)
        loss.backward()
        found.append([loss.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not found[0][1][20:].any()
