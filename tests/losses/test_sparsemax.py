import itertools

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import MixedTarget, Sparsemax, sparsemax, sparsemax_loss
from lightning_robust.losses.sparsemax import _by_narrowing, _by_sorting

LABELS = torch.tensor([0, 3, 2, 2, 1, 3])


def random_logits(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()


def naive(z):
    """The nearest of the projections onto all faces of the simplex."""
    candidates = []
    for size in range(1, len(z) + 1):
        for face in itertools.combinations(range(len(z)), size):
            p = torch.zeros_like(z)
            face = list(face)
            p[face] = z[face] - (z[face].sum() - 1) / size
            if bool((p >= 0).all()):
                candidates.append(p)
    return min(candidates, key=lambda p: float((p - z).square().sum()))


@pytest.mark.parametrize("scale", [0.05, 1.0, 50.0])
def test_it_is_the_nearest_point_of_the_simplex(scale):
    logits = random_logits(scale).detach()
    torch.testing.assert_close(sparsemax(logits), torch.stack([naive(z) for z in logits]), rtol=1e-10, atol=1e-12)


def test_both_ways_to_the_support_agree():
    logits = 3 * torch.randn(64, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shifted = logits - logits.amax(1, keepdim=True)
    assert torch.equal(_by_narrowing(shifted), _by_sorting(shifted))
    pixels = shifted.view(4, 16, 50).transpose(1, 2)
    assert torch.equal(_by_narrowing(pixels), _by_sorting(pixels))


def test_ties():
    tied = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    expected = [[1 / 3] * 3, [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    torch.testing.assert_close(sparsemax(tied), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", ["hard", "soft", "mixed"])
def test_the_gradient_of_the_loss_is_the_error(form):
    logits = random_logits(2.0)
    soft = random_logits().detach().roll(1, 0).softmax(1)
    mixed = MixedTarget(LABELS, LABELS.roll(1), torch.linspace(0, 1, 6, dtype=torch.float64))
    target, t = {
        "hard": (LABELS, F.one_hot(LABELS, 4).double()),
        "soft": (soft, soft),
        "mixed": (mixed, mixed.probabilities(4, torch.float64)),
    }[form]
    losses, p = sparsemax_loss(logits, target), sparsemax(logits.detach())
    reference = ((p - t) * logits).sum(1) + (t.square().sum(1) - p.square().sum(1)) / 2
    torch.testing.assert_close(losses, reference)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logits)[0], p - t, rtol=1e-9, atol=1e-12)
    assert bool((losses >= -1e-12).all())


def test_first_and_second_derivatives_are_the_true_ones():
    logits = random_logits()
    assert torch.autograd.gradcheck(lambda z: sparsemax_loss(z, LABELS), logits)
    assert torch.autograd.gradcheck(sparsemax, logits)
    assert torch.autograd.gradgradcheck(lambda z: sparsemax_loss(z, LABELS), logits)


def test_a_margin_of_one_is_enough():
    logits = torch.tensor([[3.0, 2.0, 1.9], [3.0, 2.1, 0.0]], requires_grad=True)
    losses = Sparsemax(reduction="none")(logits, torch.tensor([0, 0]))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist()[0] == 0.0
    assert losses.tolist()[1] > 0.0
    assert not bool(gradient[0].any())


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_a_constant_changes_nothing(shift):
    logits = random_logits()
    torch.testing.assert_close(sparsemax_loss(logits + shift, LABELS), sparsemax_loss(logits, LABELS))


def test_pixels_are_samples():
    pixels = torch.stack([random_logits(scale).detach() for scale in (0.5, 1.0, 2.0)], 2)
    labels = torch.stack([LABELS, LABELS.roll(1), LABELS.roll(2)], 1)
    flat = sparsemax(pixels.movedim(1, -1).reshape(-1, 4)).view(6, 3, 4).movedim(-1, 1)
    torch.testing.assert_close(sparsemax(pixels), flat)
    columns = [sparsemax_loss(pixels[..., i], labels[:, i]) for i in range(3)]
    torch.testing.assert_close(sparsemax_loss(pixels, labels), torch.stack(columns, 1))


def test_twenty_one_thousand_classes():
    logits = torch.randn(4, 21_000, requires_grad=True)
    p = sparsemax(logits)
    torch.testing.assert_close(p.sum(1), torch.ones(4))
    loss = Sparsemax()(logits, torch.arange(4))
    loss.backward()
    torch.testing.assert_close(logits.grad * 4, p.detach() - F.one_hot(torch.arange(4), 21_000), rtol=0, atol=1e-5)
