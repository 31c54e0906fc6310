"""Attack losses against plain loops in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import losses

B, C = 6, 5


@pytest.fixture
def logits():
    return torch.randn(B, C, dtype=torch.float64) * 3


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 3, 4, 4])


def test_cross_entropy(logits, y):
    expected = [
        math.log(sum(math.exp(v) for v in row)) - row[k] for row, k in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    torch.testing.assert_close(losses.cross_entropy(logits, y), torch.tensor(expected, dtype=torch.float64))
    soft = F.one_hot(y, C).float()
    torch.testing.assert_close(losses.cross_entropy(logits, soft), losses.cross_entropy(logits, y.int()))


def test_margins(logits, y):
    def naive(values):
        return torch.tensor(
            [
                max(v for j, v in enumerate(row) if j != k) - row[k]
                for row, k in zip(values.tolist(), y.tolist(), strict=True)
            ],
            dtype=torch.float64,
        )

    torch.testing.assert_close(losses.margin(logits, y), naive(logits))
    torch.testing.assert_close(losses.probability_margin(logits, y), naive(logits.softmax(1)))


def test_dlr_is_invariant_to_shift_and_scale(logits, y):
    values = losses.dlr(logits, y)
    torch.testing.assert_close(losses.dlr(7 * logits - 3, y), values)
    correct = logits.argmax(1)
    kept = losses.dlr(logits, correct)
    assert bool(((kept >= -1) & (kept <= 0)).all())


def test_dlr_targeted(logits, y):
    wanted = (y + 2) % C
    expected = []
    for row, k, t in zip(logits.tolist(), y.tolist(), wanted.tolist(), strict=True):
        top = sorted(row, reverse=True)
        expected.append((row[t] - row[k]) / (top[0] - (top[2] + top[3]) / 2))
    torch.testing.assert_close(losses.dlr_targeted(logits, y, wanted), torch.tensor(expected, dtype=torch.float64))


def test_kl_divergence(logits):
    clean = torch.randn(B, C, dtype=torch.float64)
    p, q = clean.softmax(1), logits.softmax(1)
    torch.testing.assert_close(losses.kl_divergence(logits, clean.log_softmax(1)), (p * (p.log() - q.log())).sum(1))


def test_brier(logits, y):
    expected = ((logits.softmax(1) - F.one_hot(y, C)) ** 2).sum(1)
    torch.testing.assert_close(losses.brier(logits, y), expected)
    torch.testing.assert_close(losses.brier(logits, F.one_hot(y, C).float()), expected)


@pytest.mark.parametrize("name", losses.ATTACK_LOSSES)
def test_gradients(name, logits, y):
    target = torch.randn(B, C, dtype=torch.float64).log_softmax(1) if name in losses.PREDICTION_LOSSES else y
    assert torch.autograd.gradcheck(lambda z: losses.ATTACK_LOSSES[name](z, target), logits.requires_grad_())


def test_margin_of_two_classes():
    logits = torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    assert losses.margin(logits, torch.tensor([0, 0])).tolist() == [-3.0, 1.0]


def test_refusals(logits, y):
    with pytest.raises(ValueError, match="Expected at least 3 classes for the loss dlr but got 2; use margin"):
        losses.dlr(logits[:, :2], y.clamp(max=1))
    with pytest.raises(ValueError, match="at least 4 classes"):
        losses.dlr_targeted(logits[:, :3], y.clamp(max=2), y.clamp(max=2))
    for loss in (losses.margin, losses.probability_margin, losses.dlr):
        with pytest.raises(ValueError, match=r"Expected integer classes \[B\] for the loss"):
            loss(logits, F.one_hot(y, C).double())


def test_labels_of():
    assert losses.labels_of(torch.tensor([2, 0])).tolist() == [2, 0]
    assert losses.labels_of(torch.tensor([[0.2, 0.8], [0.6, 0.4]])).tolist() == [1, 0]
