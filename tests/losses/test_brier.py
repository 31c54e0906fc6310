import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import Brier, MixedTarget, brier_loss
from lightning_robust.metrics import BrierScore

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def random_logits():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


def test_equals_the_metric_and_the_squared_distance():
    logits = random_logits()
    distance = F.mse_loss(logits.softmax(1), F.one_hot(LABELS, 5).double(), reduction="none").sum(1)
    torch.testing.assert_close(brier_loss(logits, LABELS), distance)
    metric = BrierScore()
    metric.update(logits.detach(), LABELS)
    torch.testing.assert_close(Brier()(logits, LABELS), metric.compute(), rtol=1e-8, atol=1e-8)


def test_soft_targets_are_compared_as_they_are():
    logits = random_logits()
    soft = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    torch.testing.assert_close(brier_loss(logits, soft), (logits.softmax(1) - soft).square().sum(1))
    same = MixedTarget(LABELS, LABELS, torch.tensor(0.3))
    torch.testing.assert_close(brier_loss(logits, same), brier_loss(logits, LABELS))
    torch.testing.assert_close(brier_loss(logits, logits.detach().softmax(1)), torch.zeros(6, dtype=torch.float64))


def test_gradients():
    assert torch.autograd.gradcheck(lambda z: brier_loss(z, LABELS), random_logits())
    assert torch.autograd.gradgradcheck(lambda z: brier_loss(z, LABELS), random_logits())


def test_extremes_and_many_classes():
    logits = torch.zeros(2, 21_000)
    logits[0, 3], logits[1, 4] = 120.0, 120.0
    torch.testing.assert_close(brier_loss(logits, torch.tensor([3, 5])), torch.tensor([0.0, 2.0]))


def test_dense_logits_and_ignored_pixels():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 3, 2], [1, 1, 255]])
    flat = brier_loss(logits.movedim(1, -1).flatten(0, 1), labels.clamp(max=3).flatten())
    torch.testing.assert_close(Brier(ignore_index=255)(logits, labels), flat[:-1].mean())


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match=r"Expected labels to be in \[0, 4\]"):
        Brier()(random_logits(), LABELS + 1)
