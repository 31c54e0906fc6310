import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import CPC, binary_discrimination, binary_exclusion, cpc

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def random_logits(classes=5, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, classes, generator=generator, dtype=torch.float64)).requires_grad_()


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def by_hand(row, label):
    """Both terms from all pairs."""
    others = [z for k, z in enumerate(row) if k != label]
    classes = len(row)
    discrimination = sum(softplus(z - row[label]) for z in others) / (classes - 1)
    exclusion = sum(softplus(b - a) for a in others for b in others) / (2 * (classes - 1) * (classes - 2))
    return discrimination, exclusion


def test_equals_loops_over_all_pairs():
    logits = random_logits()
    rows = [by_hand(row, label) for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)]
    discrimination, exclusion = torch.tensor(rows, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(binary_discrimination(logits, LABELS), discrimination)
    torch.testing.assert_close(binary_exclusion(logits, LABELS), exclusion)
    expected = F.cross_entropy(logits, LABELS, reduction="none") + 0.7 * discrimination + 1.3 * exclusion
    ours = CPC(discrimination=0.7, exclusion=1.3, reduction="none")(logits, LABELS)
    torch.testing.assert_close(ours, expected)


def test_chunks_change_neither_value_nor_gradient(monkeypatch):
    logits = random_logits(40)
    whole = binary_exclusion(logits, LABELS)
    (expected,) = torch.autograd.grad(whole.sum(), logits, create_graph=True)
    monkeypatch.setattr(cpc, "_CHUNK", 6 * 39 * 7)
    chunked = binary_exclusion(logits, LABELS)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked.sum(), logits)[0], expected)


def test_chunks_bound_the_memory_that_the_backward_pass_needs(monkeypatch):
    monkeypatch.setattr(cpc, "_CHUNK", 6 * 39 * 7)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        binary_exclusion(random_logits(40), LABELS)
    assert max(saved) <= 6 * 40


def test_gradients():
    for function in (binary_discrimination, binary_exclusion):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, LABELS), random_logits())
        assert torch.autograd.gradgradcheck(lambda z, f=function: f(z, LABELS), random_logits())


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = random_logits()
    torch.testing.assert_close(CPC()(logits + 7, LABELS), CPC()(logits, LABELS))


def test_the_exclusion_is_least_where_the_wrong_logits_are_equal():
    equal = torch.zeros(1, 5, dtype=torch.float64)
    label = torch.tensor([2])
    assert binary_exclusion(equal, label).item() == pytest.approx(16 * math.log(2) / (2 * 4 * 3))
    assert bool((binary_exclusion(random_logits()[:1], label) > binary_exclusion(equal, label)).all())
    equal[0, 2] = 50.0
    assert binary_exclusion(equal, label).item() == pytest.approx(16 * math.log(2) / (2 * 4 * 3))


def test_dense_logits():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([[0, 3, 2], [1, 1, -100]])
    flat = CPC(reduction="none")(logits.movedim(1, -1).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(CPC(reduction="none")(logits, labels).flatten(), flat)


def test_refusals():
    for classes in (1, 2):
        with pytest.raises(ValueError, match="at least 3 classes"):
            CPC()(torch.zeros(2, classes), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="CPC needs class indices"):
        CPC()(torch.zeros(2, 4), torch.full((2, 4), 0.25))
    with pytest.raises(ValueError, match="Expected `exclusion` to be a finite number >= 0 but got -1"):
        CPC(exclusion=-1.0)
