"""Distillation of relations against scipy's correlation."""

import pytest
import torch
from scipy.stats import pearsonr

from lightning_robust.distillation import DIST, dist_loss, kd_loss
from support.distillation_losses import logits

STUDENT, TEACHER = logits(0, 8, 5), logits(1, 8, 5)


def reference(student, teacher, beta, gamma, temperature):
    p, q = ((values / temperature).softmax(1).numpy() for values in (student, teacher))
    over_classes = sum(1 - pearsonr(a, b).statistic for a, b in zip(p, q, strict=True)) / len(p)
    over_samples = sum(1 - pearsonr(a, b).statistic for a, b in zip(p.T, q.T, strict=True)) / p.shape[1]
    return temperature**2 * (beta * over_classes + gamma * over_samples)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 2.0, 4.0), (0.0, 0.3, 2.0)])
def test_equals_scipy(beta, gamma, temperature):
    options = {"beta": beta, "gamma": gamma, "temperature": temperature}
    expected = reference(STUDENT, TEACHER, **options)
    # the smallest of the norms' products bounds what eps changes
    assert float(dist_loss(STUDENT, TEACHER, **options, eps=1e-15)) == pytest.approx(expected, rel=1e-11)
    assert float(DIST(**options)(STUDENT, TEACHER)) == pytest.approx(expected, rel=1e-5)


def test_forgives_a_teacher_that_is_surer():
    student, surer = 0.3 * TEACHER, 1.5 * TEACHER
    ratio = {loss: loss(student, surer) / loss(STUDENT, surer) for loss in (dist_loss, lambda z, t: kd_loss(z, t, 1.0))}
    assert dist_loss(student, surer) < 0.25 * dist_loss(STUDENT, surer)
    assert min(ratio.values()) == ratio[dist_loss]


def test_one_sample_leaves_the_first_part():
    student = STUDENT[:1].clone().requires_grad_()
    torch.testing.assert_close(
        dist_loss(student, TEACHER[:1]).detach(), 1 + dist_loss(STUDENT[:1], TEACHER[:1], gamma=0.0)
    )
    assert torch.autograd.grad(dist_loss(student, TEACHER[:1], beta=0.0), student)[0].abs().max() == 0


def test_equal_logits_have_no_correlation_and_no_nan():
    student = torch.zeros(4, 5, requires_grad=True)
    loss = dist_loss(student, TEACHER[:4].float())
    assert loss == 2
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_the_function_lets_gradients_through_to_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dist_loss(STUDENT, t), teacher)


@pytest.mark.parametrize(
    ("argument", "value", "message"), [("beta", -1.0, ">= 0"), ("gamma", -1.0, ">= 0"), ("temperature", 0.0, "> 0")]
)
def test_refuses_values_out_of_range(argument, value, message):
    with pytest.raises(ValueError, match=f"`{argument}` to be a finite number {message}"):
        DIST(**{argument: value})
    with pytest.raises(ValueError, match=f"`{argument}` to be a finite number {message}"):
        dist_loss(STUDENT, TEACHER, **{argument: value})


def test_refuses_no_eps():
    with pytest.raises(ValueError, match="`eps` to be a finite number > 0"):
        dist_loss(STUDENT, TEACHER, eps=0.0)
