import pytest
import torch
from torch import nn

from lightning_robust.regularization import NormLoss, filter_norms, norm_loss


def naive(weight):
    return sum((1 - sum(float(entry) ** 2 for entry in row.flatten()) ** 0.5) ** 2 for row in weight.double())


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (2, 3, 4), (1, 1)], ids=str)
def test_equals_a_loop_over_filters(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    assert norm_loss(weight).item() == pytest.approx(naive(weight), rel=1e-12)
    assert torch.autograd.gradcheck(norm_loss, weight.requires_grad_())


def test_the_gradient_draws_filters_to_unit_length():
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm_loss(weight), weight)
    # 2 (1 - 1 / |w|) w: along a long filter, against a short one, nothing at unit length
    expected = 2 * (1 - 1 / torch.tensor([[5.0], [0.5], [1.0]])) * weight.detach()
    torch.testing.assert_close(gradient, expected)


def test_a_filter_of_zeros_has_a_zero_gradient():
    weight = torch.zeros(3, 4, requires_grad=True)
    loss = norm_loss(weight)
    assert loss.item() == 3
    assert torch.equal(torch.autograd.grad(loss, weight)[0], torch.zeros(3, 4))


def test_lengths():
    weight = torch.randn(3, 2, 2, 2)
    torch.testing.assert_close(filter_norms(weight), torch.stack([row.norm() for row in weight]))


def test_works_on_convolutions_and_linear_layers():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    expected = 0.2 * (norm_loss(net[0].weight) + norm_loss(net[3].weight))
    torch.testing.assert_close(NormLoss(lam=0.2)(net), expected)
    torch.testing.assert_close(NormLoss(lam=0.2, linear=False)(net), 0.2 * norm_loss(net[0].weight))
    assert NormLoss().coefficient == 1e-4
    assert NormLoss.replaces_weight_decay
    assert NormLoss.name == "norm_loss"


def test_refuses_a_factor_that_is_not_finite():
    with pytest.raises(ValueError, match="Expected `lam` to be a finite number but got nan"):
        NormLoss(lam=float("nan"))
