"""What holds for every loss that is a mean over labels, whatever logits and targets: properties, with hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_robust.losses import (
    MixedTarget,
    comp_sum_loss,
    dual_focal_loss,
    flsd_loss,
    focal_loss,
    gce_loss,
    mae_loss,
    nce_loss,
    nfl_loss,
    ngce_loss,
    poly_loss,
    rce_loss,
)

LOSSES = {
    "focal": lambda z, y: focal_loss(z, y, gamma=2.0),
    "flsd": flsd_loss,
    "dual focal": lambda z, y: dual_focal_loss(z, y, gamma=2.0),
    "poly": lambda z, y: poly_loss(z, y, eps1=2.0),
    "poly focal": lambda z, y: poly_loss(z, y, eps1=2.0, gamma=1.5),
    "comp-sum 0.5": lambda z, y: comp_sum_loss(z, y, tau=0.5),
    "comp-sum 1.5": lambda z, y: comp_sum_loss(z, y, tau=1.5),
    "gce": gce_loss,
    "mae": mae_loss,
    "rce": rce_loss,
    "nce": nce_loss,
    "nfl": lambda z, y: nfl_loss(z, y, gamma=0.0),  # with another exponent the gradient is not that of the value
    "ngce": ngce_loss,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
shapes = st.tuples(st.integers(0, 2**16), st.integers(1, 5), st.integers(2, 7))


def drawn(shape, scale=3.0):
    seed, samples, classes = shape
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator, dtype=torch.double)
    labels = torch.randint(classes, (samples,), generator=generator)
    soft = torch.randn(samples, classes, generator=generator, dtype=torch.double).softmax(1)
    return logits, labels, soft


@every_loss
@settings(max_examples=15, deadline=None)
@given(shapes)
def test_soft_targets_are_the_mean_over_labels(name, shape):
    logits, labels, soft = drawn(shape)
    loss, classes = LOSSES[name], logits.shape[1]
    each = torch.stack([loss(logits, torch.full_like(labels, label)) for label in range(classes)], 1)
    torch.testing.assert_close(loss(logits, soft), (soft * each).sum(1))
    torch.testing.assert_close(loss(logits, F.one_hot(labels, classes).double()), loss(logits, labels))
    lam = soft[:, 0]
    expected = lam * loss(logits, labels) + (1 - lam) * loss(logits, labels.flip(0))
    torch.testing.assert_close(loss(logits, MixedTarget(labels, labels.flip(0), lam)), expected)


@every_loss
@settings(max_examples=15, deadline=None)
@given(shapes, st.floats(-50, 50))
def test_a_constant_on_all_logits_changes_nothing(name, shape, constant):
    logits, labels, soft = drawn(shape)
    for target in (labels, soft):
        torch.testing.assert_close(
            LOSSES[name](logits + constant, target), LOSSES[name](logits, target), rtol=1e-6, atol=1e-8
        )


@every_loss
@settings(max_examples=5, deadline=None)
@given(shapes)
def test_derivatives(name, shape):
    logits, labels, soft = drawn(shape)
    logits.requires_grad_()
    for target in (labels, soft):
        assert torch.autograd.gradcheck(lambda z, t=target: LOSSES[name](z, t), logits)


@every_loss
@settings(max_examples=15, deadline=None)
@given(shapes)
def test_extreme_logits_have_finite_losses_and_gradients(name, shape):
    logits, labels, soft = drawn(shape)
    extreme = (120 * logits.sign()).float().requires_grad_()
    for target in (labels, soft):
        loss = LOSSES[name](extreme, target)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), extreme)[0].isfinite().all()
