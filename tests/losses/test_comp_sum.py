import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import GCE, MAE, CompSum, comp_sum_loss
from support.labels import logits_and_labels, same_gradients


def naive(logits, labels, tau):
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    return -p.log() if tau == 1 else ((1 / p) ** (1 - tau) - 1) / (1 - tau)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 2.0, 3.0])
def test_values_and_gradients_are_the_definition(tau):
    logits, labels = logits_and_labels()
    same_gradients(lambda z: comp_sum_loss(z, labels, tau=tau), lambda z: naive(z, labels, tau), logits)


def test_members_of_the_family():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(CompSum()(logits, labels), F.cross_entropy(logits, labels))
    torch.testing.assert_close(CompSum(tau=1.7)(logits, labels), GCE(q=0.7)(logits, labels))
    torch.testing.assert_close(CompSum(tau=2.0)(logits, labels), MAE()(logits, labels))
    sum_exponential = (logits - logits.gather(1, labels[:, None])).exp().sum(1) - 1
    torch.testing.assert_close(CompSum(tau=0.0, reduction="none")(logits, labels), sum_exponential)
    near = CompSum(tau=1 + 1e-9)(logits, labels), CompSum(tau=1 - 1e-9)(logits, labels)
    for value in near:
        torch.testing.assert_close(value, F.cross_entropy(logits, labels), rtol=1e-7, atol=0)


def test_below_one_it_goes_on_as_its_tangent_before_it_overflows():
    limit = math.log(torch.finfo(torch.float32).max) / 2
    margins = torch.tensor([limit - 1, limit + 1, 120.0, 240.0], requires_grad=True)
    # with a second logit far above, -log p is the margin
    values = comp_sum_loss(torch.stack([-margins, torch.zeros(4)], 1), torch.zeros(4, dtype=torch.long), tau=0.0)
    (slopes,) = torch.autograd.grad(values.sum(), margins)
    assert values.isfinite().all()
    torch.testing.assert_close(values[0].double(), (margins[0].double()).exp(), rtol=1e-5, atol=0)
    end = math.exp(limit)
    torch.testing.assert_close(slopes[1:].double(), torch.full((3,), end, dtype=torch.double), rtol=1e-5, atol=0)
    torch.testing.assert_close(values[3].double().item(), end * (1 + 240 - limit), rtol=1e-4, atol=0)
    # float64 has room for all of it
    wide = comp_sum_loss(torch.tensor([[-240.0, 0.0]], dtype=torch.double), torch.tensor([0]), tau=0.0)
    assert wide.item() == pytest.approx(math.exp(240), rel=1e-12)


def test_module_and_refusals():
    assert repr(CompSum(tau=1.5)) == "CompSum(tau=1.5, reduction='mean')"
    for tau in (-0.1, math.nan):
        with pytest.raises(ValueError, match="Expected `tau` to be a finite number >= 0"):
            CompSum(tau=tau)
