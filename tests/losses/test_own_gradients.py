"""Where a loss writes down its own gradient: that gradient, the next one, torch.func and torch.compile."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lightning_robust.losses import log_stablemax, logit_norm_penalty, maxsup_penalty

with_own_gradient = pytest.mark.parametrize(
    "function", [log_stablemax, logit_norm_penalty, maxsup_penalty], ids=lambda function: function.__name__
)


def logits(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@with_own_gradient
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3)], ids=str)
def test_first_and_second_derivatives_are_those_of_finite_differences(function, shape):
    z = logits(*shape).requires_grad_()
    assert gradcheck(function, z)
    assert gradgradcheck(function, z)


@with_own_gradient
def test_vmap_of_gradients_equals_a_loop(function):
    z = logits(6, 3, 5)
    gradient = torch.func.grad(lambda each: function(each).square().sum())
    assert torch.allclose(torch.func.vmap(gradient)(z), torch.stack([gradient(each) for each in z]))


@with_own_gradient
def test_compiles_in_one_graph(function):
    torch._dynamo.reset()
    z = logits(3, 5).requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(z)
    expected = function(z)
    assert torch.allclose(compiled, expected)
    ours, theirs = (torch.autograd.grad(value.square().sum(), z)[0] for value in (compiled, expected))
    assert torch.allclose(ours, theirs)


def test_at_zero_the_score_of_stablemax_is_as_steep_as_the_logit():
    z = torch.tensor([[0.0, -0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_stablemax(z)[0, 0], z)
    assert torch.equal(gradient, torch.tensor([[0.5, -0.5]]))


def test_of_tied_largest_logits_the_first_one_gets_the_gradient_of_maxsup():
    z = torch.tensor([[1.0, 1.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(maxsup_penalty(z).sum(), z)
    assert torch.equal(gradient, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


def test_curvature_of_the_logit_penalty_at_zero_is_one():
    z = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(logit_norm_penalty(z).sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), z)
    assert torch.equal(curvature, torch.ones(1, 2))
