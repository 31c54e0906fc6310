"""Distances between distributions against plain loops, and where they are 0 or extreme."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import probability_distance
from lightning_robust.losses.probability_distance import DISTANCES

Y = torch.tensor([0, 1, 2, 0])


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def naive(q, p, distance):
    gaps = [abs(a - b) for a, b in zip(q, p, strict=True)]
    middle = [(a + b) / 2 for a, b in zip(q, p, strict=True)]
    js = (kl(q, middle) + kl(p, middle)) / 2
    return {
        "lse": sum(gap**2 for gap in gaps),
        "l2": math.sqrt(sum(gap**2 for gap in gaps)),
        "l1": sum(gaps),
        "l1-squared": sum(gaps) ** 2,
        "kl": kl(p, q),
        "kl-sqrt": math.sqrt(kl(p, q)),
        "js": js,
        "js-sqrt": math.sqrt(js),
    }[distance]


@pytest.fixture
def logits():
    return [2 * torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_values_and_gradients(logits, distance, hard):
    z, other = logits
    reference = F.one_hot(Y, 3).double().log() if hard else other.log_softmax(1)
    rows = zip(z.softmax(1).tolist(), reference.exp().tolist(), strict=True)
    expected = torch.tensor([naive(q, p, distance) for q, p in rows], dtype=torch.float64)
    torch.testing.assert_close(probability_distance(z, reference, distance), expected)
    inputs = (z.requires_grad_(),) if hard else (z.requires_grad_(), other.requires_grad_())

    def value(z, other=None):
        return probability_distance(z, reference if hard else other.log_softmax(1), distance)

    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_distributions_have_a_finite_gradient(distance):
    z = torch.randn(4, 3, requires_grad=True)
    values = probability_distance(z, z.detach().log_softmax(1), distance)
    values.sum().backward()
    assert float(values.detach().abs().max()) < 1e-3
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("distance", DISTANCES)
def test_extreme_logits(distance, dtype):
    z = torch.tensor([[120.0, -120.0], [120.0, -120.0], [-120.0, 120.0]], dtype=dtype, requires_grad=True)
    other = torch.tensor([[-120.0, 120.0], [120.0, -120.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    for reference in (other.float().log_softmax(1), torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]).log()):
        values = probability_distance(z, reference, distance)
        assert values.dtype == torch.float32
        assert values.tolist()[:2] == pytest.approx(
            [naive([1.0, math.exp(-240)], [math.exp(-240), 1.0], distance), 0.0], rel=1e-3
        )
        for gradient in torch.autograd.grad(values.sum(), [z, other], allow_unused=True):
            assert gradient is None or bool(gradient.isfinite().all())


def test_refusal():
    with pytest.raises(ValueError, match="Expected `distance` to be one of 'lse', 'l1'"):
        probability_distance(torch.zeros(1, 2), torch.zeros(1, 2), "rkl")
