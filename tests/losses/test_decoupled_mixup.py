"""Decoupled mixup against its formula, class by class."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import DecoupledMixup, MixedTarget, decoupled_mixup_loss

FIRST, SECOND = torch.tensor([0, 3, 1, 2, 2]), torch.tensor([1, 0, 1, 3, 0])
LAM = torch.tensor([0.3, 0.6, 0.8, 0.95, 0.5], dtype=torch.float64)
MIXED = MixedTarget(FIRST, SECOND, LAM)


def logits(classes=4, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(5, classes, generator=generator, dtype=torch.float64)


def naive(z, eta=0.1, mode="both", weight=None):
    weight = torch.ones(z.shape[1], dtype=z.dtype) if weight is None else weight
    rows = []
    for row, a, b, lam in zip(z, FIRST.tolist(), SECOND.tolist(), LAM.tolist(), strict=True):
        value = -lam * weight[a] * row.log_softmax(0)[a] - (1 - lam) * weight[b] * row.log_softmax(0)[b]
        for label, other, share in ((a, b, lam), (b, a, 1 - lam)):
            smaller = (lam < 0.5) == (label == a)
            if a != b and (mode == "both" or smaller == (mode == "less")):
                others = torch.stack([row[k] for k in range(len(row)) if k != other])
                value = value + eta * share * weight[label] * (others.logsumexp(0) - row[label])
        rows.append(value)
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["both", "less", "more"])
@pytest.mark.parametrize("eta", [0.0, 0.1, 2.0])
def test_equals_the_formula(mode, eta):
    z = logits()
    torch.testing.assert_close(decoupled_mixup_loss(z, MIXED, eta=eta, mode=mode), naive(z, eta, mode))
    torch.testing.assert_close(DecoupledMixup(eta=eta, mode=mode)(z, MIXED), naive(z, eta, mode).mean())


def test_without_decoupling_it_is_the_cross_entropy_and_labels_get_just_that():
    z = logits()
    soft = MIXED.probabilities(4, torch.float64)
    torch.testing.assert_close(DecoupledMixup(eta=0.0)(z, MIXED), F.cross_entropy(z, soft))
    torch.testing.assert_close(DecoupledMixup(eta=5.0)(z, FIRST), F.cross_entropy(z, FIRST))
    torch.testing.assert_close(
        DecoupledMixup(eta=5.0)(z, MixedTarget(FIRST, FIRST, torch.tensor(1.0))), F.cross_entropy(z, FIRST)
    )


@pytest.mark.parametrize("mode", ["both", "less", "more"])
def test_probabilities_tell_the_pair(mode):
    z, lam = logits(), torch.tensor([0.3, 0.6, 0.8, 0.95, 0.4], dtype=torch.float64)
    mixed = MixedTarget(FIRST, SECOND, lam)
    criterion = DecoupledMixup(eta=0.7, mode=mode, weight=[0.5, 1.0, 2.0, 3.0])
    torch.testing.assert_close(criterion(z, mixed.probabilities(4, torch.float64)), criterion(z, mixed))


def test_class_weights():
    weight = [0.5, 1.0, 2.0, 3.0]
    ours = DecoupledMixup(eta=0.3, weight=weight, reduction="none")(logits(), MIXED)
    torch.testing.assert_close(ours, naive(logits(), 0.3, weight=torch.tensor(weight, dtype=torch.float64)))


def test_two_classes_have_no_others():
    first, second = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    target = MixedTarget(first, second, torch.tensor(0.3))
    loss = DecoupledMixup(eta=0.5)(z, target)
    (gradient,) = torch.autograd.grad(loss, z)
    # without its competitor a class is alone and certain
    plain = DecoupledMixup(eta=0.0)(z, target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, z)[0])


def test_gradcheck():
    z = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: DecoupledMixup(eta=0.5)(z, MIXED), z)


def test_finite_at_extremes_in_float32():
    for sign in (1.0, -1.0):
        for hot in (FIRST, SECOND):
            z = torch.zeros(5, 4)
            z[torch.arange(5), hot] = 120.0 * sign
            z.requires_grad_()
            loss = DecoupledMixup(eta=1.0)(z, MIXED)
            assert bool(loss.isfinite())
            assert bool(torch.autograd.grad(loss, z)[0].isfinite().all())


@pytest.mark.parametrize(("options", "message"), [({"eta": -0.1}, "eta"), ({"mode": "all"}, "'both', 'less', 'more'")])
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DecoupledMixup(**options)
