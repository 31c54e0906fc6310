import math

import pytest
import torch
from torch.distributions import Categorical

from lightning_robust.losses import ConfidencePenalty, Linear, negative_entropy


def random_logits(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()


def test_is_the_negative_entropy():
    logits = random_logits()
    torch.testing.assert_close(negative_entropy(logits), -Categorical(logits=logits).entropy())
    torch.testing.assert_close(ConfidencePenalty(beta=0.3)(logits), -0.3 * Categorical(logits=logits).entropy().mean())


def test_gradients():
    assert torch.autograd.gradcheck(negative_entropy, random_logits())
    assert torch.autograd.gradgradcheck(negative_entropy, random_logits())


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = random_logits()
    torch.testing.assert_close(negative_entropy(logits + 7), negative_entropy(logits))


def test_extreme_logits_in_float32():
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, -120.0, -120.0]], requires_grad=True)
    values = negative_entropy(logits)
    values.sum().backward()
    torch.testing.assert_close(values, torch.tensor([0.0, -math.log(3)]))
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3))


def test_dense_logits_and_masked_samples():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = -Categorical(logits=logits.movedim(1, -1)).entropy()
    torch.testing.assert_close(negative_entropy(logits), expected)
    torch.testing.assert_close(ConfidencePenalty(beta=1.0)(logits, mask), expected[mask].mean())
    assert float(ConfidencePenalty()(logits, torch.zeros_like(mask))) == 0.0


def test_follows_a_schedule():
    penalty = ConfidencePenalty(beta=Linear(start=0.0, end=0.2))
    penalty.set_progress(1, 3)
    torch.testing.assert_close(penalty(torch.zeros(2, 4)), torch.tensor(-0.1 * math.log(4)))


def test_refuses_a_weight_that_is_not_finite():
    with pytest.raises(ValueError, match="Expected `beta` to be a finite number but got inf"):
        ConfidencePenalty(beta=math.inf)
