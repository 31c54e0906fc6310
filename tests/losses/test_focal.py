import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import FLSD, Focal, flsd_loss, focal_loss
from support.labels import logits_and_labels, same_gradients


def naive(logits, labels, gamma):
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    return -((1 - p) ** gamma) * p.log()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_values_and_gradients_are_the_definition(gamma):
    logits, labels = logits_and_labels()
    same_gradients(lambda z: focal_loss(z, labels, gamma=gamma), lambda z: naive(z, labels, gamma), logits)


def test_gamma_zero_is_the_cross_entropy():
    logits, labels = logits_and_labels(scale=60)
    same_gradients(lambda z: Focal(gamma=0.0)(z, labels), lambda z: F.cross_entropy(z, labels), logits)


def test_detached_modulator_keeps_the_value_and_scales_the_gradient_of_the_cross_entropy():
    logits, labels = logits_and_labels()
    p = logits.detach().softmax(1)
    of_label = p.gather(1, labels[:, None])
    values = focal_loss(logits, labels, gamma=2.0, detach_modulator=True)
    torch.testing.assert_close(values, focal_loss(logits, labels, gamma=2.0))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(gradient, (1 - of_label) ** 2 * (p - F.one_hot(labels, 5)))


def test_flsd_takes_the_exponent_by_the_probability_of_the_label():
    p = torch.tensor([0.05, 0.1999, 0.2001, 0.4999, 0.5001, 0.95], dtype=torch.float64)
    gamma = torch.tensor([5, 5, 3, 3, 2.7, 2.7], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).log().requires_grad_()
    labels = torch.zeros(6, dtype=torch.long)
    same_gradients(lambda z: flsd_loss(z, labels, gamma=2.7), lambda z: naive(z, labels, gamma), logits)


@pytest.mark.parametrize("gamma", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_certain_samples_are_finite(gamma, dtype):
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.long)
    values = focal_loss(logits, labels, gamma=gamma)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(values, torch.tensor([0.0, 240.0], dtype=dtype))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0, 0], [-1, 1, 0]], dtype=dtype))


def test_modules_pass_every_argument():
    logits, labels = logits_and_labels()
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    module = Focal(gamma=1.5, detach_modulator=True, weight=weight.tolist(), ignore_index=2, reduction="sum").double()
    expected = naive(logits, labels, 1.5) * weight[labels] * (labels != 2)
    torch.testing.assert_close(module(logits, labels), expected.sum())
    torch.testing.assert_close(FLSD(gamma=1.0, reduction="none")(logits, labels), flsd_loss(logits, labels, gamma=1.0))
    assert repr(module) == "Focal(gamma=1.5, detach_modulator=True, reduction='sum')"
    assert repr(FLSD()) == "FLSD(gamma=3.0, reduction='mean')"


def test_functions_take_half_precision():
    logits, labels = logits_and_labels(dtype=torch.bfloat16)
    for loss in (focal_loss, flsd_loss):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(logits, labels), loss(logits.float(), labels))


@pytest.mark.parametrize("kind", [Focal, FLSD])
@pytest.mark.parametrize("gamma", [-1.0, float("nan")])
def test_refusals(kind, gamma):
    with pytest.raises(ValueError, match="Expected `gamma` to be a finite number >= 0"):
        kind(gamma=gamma)
