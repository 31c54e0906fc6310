import math

import pytest
import torch

from lightning_robust.losses import MMCE, cross_entropy, mmce, weighted_mmce

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def batch(samples=7, right=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(samples, generator=generator, dtype=torch.float64).to(dtype)
    return confidence.requires_grad_(), (torch.arange(samples) < right).to(dtype)


def pairs(confidence, correct, width):
    """Double loop over the samples."""
    r, c = confidence.tolist(), correct.tolist()
    terms = [
        (ci - ri) * (cj - rj) * math.exp(-abs(ri - rj) / width)
        for ri, ci in zip(r, c, strict=True)
        for rj, cj in zip(r, c, strict=True)
    ]
    return sum(terms) / len(r) ** 2


def groups(confidence, correct, width):
    """Double loops over the right and the wrong samples."""
    right = [r for r, c in zip(confidence.tolist(), correct.tolist(), strict=True) if c]
    wrong = [r for r, c in zip(confidence.tolist(), correct.tolist(), strict=True) if not c]

    def part(first, second):
        pair = [a[0] * b[0] * math.exp(-abs(a[1] - b[1]) / width) for a in first for b in second]
        count = len(first) * len(second)
        return sum(pair) / count / (count + 1e-5)

    a, b = [(1 - r, r) for r in right], [(r, r) for r in wrong]
    return math.sqrt(part(a, a) + part(b, b) - 2 * part(a, b) + 1e-10)


@pytest.mark.parametrize("width", [0.1, 0.4, 3.0])
def test_equals_double_loops(width):
    confidence, correct = batch()
    assert mmce(confidence, correct, kernel_width=width).item() == pytest.approx(pairs(confidence, correct, width))
    ours = weighted_mmce(confidence, correct, kernel_width=width)
    assert ours.item() == pytest.approx(groups(confidence, correct, width))


@pytest.mark.parametrize("function", [mmce, weighted_mmce], ids=["mmce", "weighted"])
def test_gradients(function):
    confidence, correct = batch()
    assert torch.autograd.gradcheck(lambda r: function(r, correct), confidence)
    assert torch.autograd.gradgradcheck(lambda r: function(r, correct), confidence)


@pytest.mark.parametrize("function", [mmce, weighted_mmce], ids=["mmce", "weighted"])
def test_what_is_not_kept_does_not_count(function):
    confidence, correct = batch()
    kept = torch.tensor([True, False, True, True, False, True, True])
    torch.testing.assert_close(function(confidence, correct, kept=kept), function(confidence[kept], correct[kept]))
    nothing = function(confidence, correct, kept=torch.zeros_like(kept))
    assert nothing.item() == 0.0
    assert not bool(torch.autograd.grad(nothing, confidence)[0].any())


@pytest.mark.parametrize("right", [0, 7])
def test_the_groups_of_the_weighted_error_are_both_needed(right):
    confidence, correct = batch(right=right)
    value = weighted_mmce(confidence, correct)
    assert value.item() == 0.0
    assert not bool(torch.autograd.grad(value, confidence)[0].any())


def test_the_weighted_error_is_a_number_where_the_form_is_slightly_negative():
    # two equally confident groups of different size that cancel but for the 1e-5
    confidence = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    value = weighted_mmce(confidence, torch.tensor([1, 0, 0]))
    assert bool(value.isfinite())
    assert bool(torch.autograd.grad(value, confidence)[0].isfinite().all())


def test_a_calibrated_batch_has_no_error_and_a_confident_one_does():
    half = torch.full((8,), 0.5)
    correct = torch.arange(8) % 2
    assert mmce(half, correct).item() == pytest.approx(0.0, abs=1e-8)
    assert mmce(torch.full((8,), 0.9), correct).item() == pytest.approx(0.16)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_criterion_adds_it_to_the_cross_entropy(weighted):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([logits[0].argmax(), 3, 1, -100, 2, 2])
    p, answer = logits.softmax(1).max(1)
    error = weighted_mmce if weighted else mmce
    expected = cross_entropy(logits, labels) + 3.0 * error(p, answer == labels, kernel_width=0.2, kept=labels != -100)
    ours = MMCE(weight=3.0, kernel_width=0.2, weighted=weighted)(logits, labels)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (ours, expected)))


def test_many_classes():
    logits = torch.randn(6, 21_000, generator=torch.Generator().manual_seed(2), requires_grad=True)
    MMCE()(logits, LABELS).backward()
    assert bool(logits.grad.isfinite().all())


def test_refusals():
    with pytest.raises(ValueError, match="Expected `kernel_width` to be a finite number > 0 but got 0"):
        MMCE(kernel_width=0.0)
    with pytest.raises(ValueError, match="Expected `weight` to be a finite number >= 0 but got -1"):
        MMCE(weight=-1.0)
    with pytest.raises(ValueError, match="MMCE needs class indices"):
        MMCE()(torch.zeros(2, 4), torch.full((2, 4), 0.25))
