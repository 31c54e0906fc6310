import pytest
import torch

from lightning_robust.losses import DualFocal, dual_focal_loss
from support.labels import logits_and_labels, mixed_labels, of_every_class, same_gradients, soft_labels


def naive(logits, labels, gamma):
    losses = []
    for row, label in zip(logits.softmax(1), labels, strict=True):
        below = [p for p in row if p < row[label]]
        losses.append(-((1 - row[label] + (max(below) if below else 0.0)) ** gamma) * row[label].log())
    return torch.stack(losses)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_are_the_definition(gamma, seed):
    logits, labels = logits_and_labels(seed, samples=12)
    same_gradients(lambda z: dual_focal_loss(z, labels, gamma=gamma), lambda z: naive(z, labels, gamma), logits)


def test_ties_do_not_count_as_smaller_and_the_least_class_has_nothing_below():
    logits = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 2], [3, 0, 0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 0])
    values = dual_focal_loss(logits, labels, gamma=3.0)
    p = logits.detach().softmax(1)
    of_label = p[torch.arange(4), labels]
    below = torch.tensor([p[0, 2], 0.0, 0.0, p[3, 1]])
    torch.testing.assert_close(values, -((1 - of_label + below) ** 3) * of_label.log())
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_soft_targets_are_the_mean_over_labels(tied):
    logits, _ = logits_and_labels(samples=8)
    if tied:
        logits = logits.detach().div(3).round().requires_grad_()  # many equal logits
    soft = soft_labels(samples=8)
    per_class = of_every_class(dual_focal_loss, logits)
    torch.testing.assert_close(dual_focal_loss(logits, soft), (soft * per_class).sum(1))

    def one_by_one(z):
        each = [dual_focal_loss(z, torch.full((8,), label)) for label in range(5)]
        return (soft * torch.stack(each, 1)).sum(1)

    if not tied:  # else two choices of the class below are right
        same_gradients(lambda z: dual_focal_loss(z, soft), one_by_one, logits)


def test_mixed_and_dense_targets():
    logits, labels = logits_and_labels()
    mixed = mixed_labels(labels)
    dense = mixed.probabilities(5, torch.float64)
    torch.testing.assert_close(dual_focal_loss(logits, mixed), dual_focal_loss(logits, dense))
    pixels, classes = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(5, (2, 3))
    rows = pixels.movedim(1, 2).reshape(6, 5)
    expected = dual_focal_loss(rows, classes.flatten())
    torch.testing.assert_close(dual_focal_loss(pixels, classes).flatten(), expected)
    one_hot = torch.nn.functional.one_hot(classes, 5).movedim(2, 1).double()
    torch.testing.assert_close(dual_focal_loss(pixels, one_hot).flatten(), expected)


def test_extreme_logits():
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]], requires_grad=True)
    values = dual_focal_loss(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(values, torch.tensor([0.0, 240.0]))
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


def test_module():
    logits, labels = logits_and_labels()
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    module = DualFocal(gamma=2.0, weight=weight.tolist()).double()
    expected = (naive(logits, labels, 2.0) * weight[labels]).sum() / weight[labels].sum()
    torch.testing.assert_close(module(logits, labels), expected)
    assert repr(module) == "DualFocal(gamma=2.0, reduction='mean')"
    assert DualFocal().gamma == 5.0
    with pytest.raises(ValueError, match="Expected `gamma` to be a finite number >= 0 but got -1"):
        DualFocal(gamma=-1)
