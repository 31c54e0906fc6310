"""Raised logits of new classes."""

import math

import pytest
import torch

from lightning_robust.losses import CrossEntropy, Focal, MarginBias, cross_entropy

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, -100])


@pytest.mark.parametrize("bias", [4.0, -1.5, 0.0])
def test_adds_to_the_classes_behind_the_old_ones(bias):
    raised = LOGITS + torch.tensor([0, 0, bias, bias, bias])
    torch.testing.assert_close(MarginBias(old_classes=2, bias=bias)(LOGITS, LABELS), cross_entropy(raised, LABELS))


def test_another_base_and_its_reduction():
    criterion = MarginBias(old_classes=2, base=Focal(gamma=2.0, reduction="none"))
    raised = LOGITS + torch.tensor([0, 0, 4.0, 4.0, 4.0])
    torch.testing.assert_close(criterion(LOGITS, LABELS), Focal(gamma=2.0, reduction="none")(raised, LABELS))
    assert criterion.reduction == "none"


def test_the_callers_logits_stay_as_they_are():
    given = LOGITS.clone()
    MarginBias(old_classes=2)(given, LABELS)
    assert torch.equal(given, LOGITS)


def test_positions():
    volume, labels = LOGITS.view(2, 3, 5).movedim(2, 1), LABELS.view(2, 3)
    criterion = MarginBias(old_classes=2)
    torch.testing.assert_close(criterion(volume, labels), criterion(LOGITS, LABELS))


def test_learns_a_margin():
    logits = torch.zeros(2, 2, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        MarginBias(old_classes=1, bias=4.0)(logits, torch.tensor([0, 1])).backward()
        optimizer.step()
    old, new = logits.detach().diff(dim=1).squeeze(1)
    assert old < -new - 3.5  # sure of the old class by a few units more than of the new one


def test_refusals():
    with pytest.raises(ValueError, match="`old_classes` to be an integer >= 1 but got 0"):
        MarginBias(old_classes=0)
    with pytest.raises(ValueError, match="`bias` to be a finite number but got inf"):
        MarginBias(old_classes=1, bias=math.inf)
    with pytest.raises(ValueError, match="more classes than `old_classes` = 5 but the logits have 5"):
        MarginBias(old_classes=5)(LOGITS, LABELS)


def test_repr():
    assert repr(MarginBias(old_classes=2)).startswith("MarginBias(\n  old_classes=2, bias=4.0")
    assert isinstance(MarginBias(old_classes=2).base, CrossEntropy)
