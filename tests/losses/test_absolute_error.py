import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import MAE, RCE, SCE, cross_entropy, mae_loss, rce_loss
from support.labels import logits_and_labels, mixed_labels, same_gradients, soft_labels


def reverse_cross_entropy(logits, labels, floor=0.0, tiny=1e-4):
    """Prediction and one-hot label, both clamped, in the order of the name."""
    p = logits.softmax(1).clamp(min=floor)
    return -(p * F.one_hot(labels, logits.shape[1]).double().clamp(min=tiny).log()).sum(1)


def test_mean_absolute_error_is_half_the_distance_to_the_label():
    logits, labels = logits_and_labels()
    same_gradients(
        lambda z: mae_loss(z, labels), lambda z: (z.softmax(1) - F.one_hot(labels, 5)).abs().sum(1) / 2, logits
    )


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_reverse_cross_entropy_is_the_cross_entropy_with_exchanged_arguments(floor):
    logits, labels = logits_and_labels()
    same_gradients(
        lambda z: rce_loss(z, labels, min_probability=floor),
        lambda z: reverse_cross_entropy(z, labels, floor),
        logits,
    )
    torch.testing.assert_close(
        rce_loss(logits, labels, log_zero=-4.0), reverse_cross_entropy(logits, labels, tiny=math.exp(-4))
    )


def test_soft_and_mixed_targets_are_lifted():
    logits, labels = logits_and_labels()
    soft = soft_labels()
    wrong = 1 - (soft * logits.softmax(1)).sum(1)
    torch.testing.assert_close(mae_loss(logits, soft), wrong)
    torch.testing.assert_close(rce_loss(logits, soft), -math.log(1e-4) * wrong)
    floored = logits.softmax(1).clamp(min=1e-3)
    rest = (soft * (floored.sum(1, keepdim=True) - floored)).sum(1)
    torch.testing.assert_close(rce_loss(logits, soft, min_probability=1e-3), -math.log(1e-4) * rest)
    mixed = mixed_labels(labels)
    dense = mixed.probabilities(5, torch.float64)
    for criterion in (MAE(), RCE(), SCE()):
        torch.testing.assert_close(criterion(logits, mixed), criterion(logits, dense))


def test_symmetric_cross_entropy_is_the_sum():
    logits, labels = logits_and_labels()
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    module = SCE(alpha=0.3, beta=0.7, log_zero=-4.0, min_probability=1e-3, weight=weight.tolist()).double()
    reverse = rce_loss(logits, labels, log_zero=-4.0, min_probability=1e-3)
    each = 0.3 * cross_entropy(logits, labels, reduction="none") + 0.7 * reverse
    torch.testing.assert_close(module(logits, labels), (each * weight[labels]).sum() / weight[labels].sum())


def test_extreme_logits():
    logits = torch.tensor([[120.0, -120.0], [-120.0, 120.0]], requires_grad=True)
    for criterion, wrong in ((MAE(), 1.0), (RCE(), -math.log(1e-4)), (SCE(), 24 - math.log(1e-4))):
        loss = criterion(logits, torch.tensor([0, 0]))
        assert loss.item() == pytest.approx(wrong / 2)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_modules_and_refusals():
    logits, labels = logits_and_labels()
    options = {"log_zero": -4.0, "min_probability": 1e-3}
    torch.testing.assert_close(RCE(**options)(logits, labels), rce_loss(logits, labels, **options).mean())
    assert repr(RCE()) == "RCE(log_zero=-9.21, min_probability=0.0, reduction='mean')"
    assert repr(SCE()) == "SCE(alpha=0.1, beta=1.0, log_zero=-9.21, min_probability=0.0, reduction='mean')"
    for name, value in {"alpha": -1, "beta": math.nan, "log_zero": 0.0, "min_probability": -1}.items():
        with pytest.raises(ValueError, match=f"Expected `{name}`"):
            SCE(**{name: value})
