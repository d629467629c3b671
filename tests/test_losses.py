import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

from raylab.training.losses import nt_xent, sup_con

CASES = [(seed, temperature) for seed in range(8) for temperature in (0.05, 0.1, 1.0)]


def draw_points(num: int, generator: torch.Generator) -> torch.Tensor:
    """Points [num, 16] whose lengths differ, so that a loss that forgets to normalise is seen."""
    scale = 0.1 + 5 * torch.rand(num, 1, generator=generator)
    return (torch.randn(num, 16, generator=generator) * scale).requires_grad_()


def draw_size(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


@pytest.mark.parametrize(("seed", "temperature"), CASES)
def test_nt_xent_equals_metric_learning(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    num = draw_size(2, 40, generator)
    anchors, positives = draw_points(num, generator), draw_points(num, generator)
    ours = nt_xent(anchors, positives, temperature)
    theirs = NTXentLoss(temperature)(torch.cat([anchors, positives]), torch.arange(num).repeat(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for our_gradient, their_gradient in zip(
        torch.autograd.grad(ours, [anchors, positives]), torch.autograd.grad(theirs, [anchors, positives]), strict=True
    ):
        assert their_gradient.abs().max() > 1e-4
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("seed", "temperature"), CASES)
def test_sup_con_equals_metric_learning(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    num = draw_size(4, 60, generator)
    # About as many labels as points in some cases, so that some points have no positive.
    labels = torch.randint(0, draw_size(2, num, generator), (num,), generator=generator)
    labels[0] = labels[1]
    embeddings = draw_points(num, generator)
    ours = sup_con(embeddings, labels, temperature)
    theirs = SupConLoss(temperature)(embeddings, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    our_gradient, their_gradient = (torch.autograd.grad(loss, embeddings)[0] for loss in (ours, theirs))
    assert their_gradient.abs().max() > 1e-4
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_nt_xent_by_hand():
    # Two pairs on two axes: each point has its partner at cosine 1 and two others at cosine 0.
    axes = torch.eye(2)
    expected = -torch.log(torch.e**2 / (torch.tensor(torch.e**2) + 2))
    torch.testing.assert_close(nt_xent(3 * axes, 0.5 * axes, 0.5), expected)


def test_sup_con_puts_the_mean_outside_the_logarithm():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])
    e = torch.tensor(1.0).exp()
    first = -(torch.log(e / (e + 1 + 1 / e)) + torch.log(1 / (e + 1 + 1 / e))) / 2  # the second point's is the same
    third = -torch.log(1 / torch.tensor(3.0))
    torch.testing.assert_close(sup_con(embeddings, labels, 1.0), (2 * first + third) / 3)


def test_nt_xent_is_symmetric_and_equals_sup_con_of_pairs():
    generator = torch.Generator().manual_seed(0)
    anchors, positives = draw_points(9, generator), draw_points(9, generator)
    loss = nt_xent(anchors, positives, 0.1)
    torch.testing.assert_close(loss, nt_xent(positives, anchors, 0.1))
    torch.testing.assert_close(loss, sup_con(torch.cat([anchors, positives]), torch.arange(9).repeat(2), 0.1))


@pytest.mark.parametrize("num", [0, 1, 5])
def test_sup_con_without_positives_is_zero_with_gradient(num):
    embeddings = draw_points(num, torch.Generator().manual_seed(0))
    loss = sup_con(embeddings, torch.arange(num), 0.1)
    assert loss.item() == 0.0
    loss.backward()
    assert embeddings.grad is not None
    assert (embeddings.grad == 0).all()


def test_nt_xent_of_one_pair_is_zero_with_gradient():
    anchors, positives = (draw_points(1, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    loss = nt_xent(anchors, positives, 0.05)
    loss.backward()
    assert loss.item() == 0.0
    assert (anchors.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_stay_in_float32_under_autocast(dtype):
    generator = torch.Generator().manual_seed(0)
    # Half-precision points, as autocast hands over; the losses themselves must lose nothing more.
    anchors, positives = (draw_points(8, generator).detach().to(dtype) for _ in range(2))
    labels = torch.arange(8) % 3
    expected = nt_xent(anchors.float(), positives.float(), 0.05), sup_con(anchors.float(), labels, 0.05)
    with torch.autocast("cpu", dtype=dtype):
        losses = nt_xent(anchors, positives, 0.05), sup_con(anchors, labels, 0.05)
    for loss, wanted in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


def test_identical_points_and_tiny_temperatures_stay_finite():
    points = torch.ones(6, 4, requires_grad=True)
    for loss in (nt_xent(points[:3], points[3:], 1e-4), sup_con(points, torch.tensor([0, 0, 1, 1, 2, 3]), 1e-4)):
        torch.testing.assert_close(loss, torch.tensor(5.0).log())
        assert torch.isfinite(torch.autograd.grad(loss, points)[0]).all()


def test_bad_arguments_are_refused():
    points = torch.ones(3, 4)
    for anchors, positives in ((points, points[:2]), (points[0], points[0]), (points[:0], points[:0])):
        with pytest.raises(ValueError, match="anchors"):
            nt_xent(anchors, positives, 0.1)
    with pytest.raises(ValueError, match="labels"):
        sup_con(points, torch.arange(2), 0.1)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            nt_xent(points, points, temperature)
        with pytest.raises(ValueError, match="temperature"):
            sup_con(points, torch.arange(3), temperature)
