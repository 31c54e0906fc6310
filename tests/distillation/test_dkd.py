"""Decoupled distillation against probabilities in float64, one sample at a time."""

import math

import numpy as np
import pytest
import torch

from lightning_robust.distillation import DKD, dkd_loss, kd_loss
from lightning_robust.losses import Linear, MixedTarget, Piecewise
from support.distillation_losses import labels, logits

STUDENT, TEACHER, LABELS = logits(0, 6, 5), logits(1, 6, 5), labels(2, 5, 6)


def softmax(row):
    exponentials = np.exp(row - row.max())
    return exponentials / exponentials.sum()


def divergence(q, p):
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def reference(student, teacher, target, alpha, beta, temperature):
    total = 0.0
    for z, t, y in zip(student.numpy(), teacher.numpy(), target.tolist(), strict=True):
        p, q = softmax(z / temperature), softmax(t / temperature)
        about_label = divergence([q[y], 1 - q[y]], [p[y], 1 - p[y]])
        others = [c for c in range(len(z)) if c != y]
        about_others = divergence(softmax(t[others] / temperature), softmax(z[others] / temperature))
        total += temperature**2 * (alpha * about_label + beta * about_others)
    return total / len(student)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.5, 0.0, 1.0), (0.0, 2.0, 0.7)])
def test_equals_a_naive_loop(alpha, beta, temperature):
    options = {"alpha": alpha, "beta": beta, "temperature": temperature}
    expected = reference(STUDENT, TEACHER, LABELS, **options)
    assert float(dkd_loss(STUDENT, TEACHER, LABELS, **options)) == pytest.approx(expected, rel=1e-12)
    assert float(DKD(**options)(STUDENT, TEACHER, LABELS)) == pytest.approx(expected, rel=1e-12)


def test_is_kd_where_the_second_part_has_the_weight_it_has_there():
    q = (TEACHER / 4).softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    label, others = (
        dkd_loss(STUDENT, TEACHER, LABELS, alpha=alpha, beta=1 - alpha, reduction="none") for alpha in (1.0, 0.0)
    )
    torch.testing.assert_close(label + (1 - q) * others, kd_loss(STUDENT, TEACHER, 4.0, reduction="none"))


def test_is_zero_only_where_both_agree():
    assert dkd_loss(TEACHER + 3, TEACHER, LABELS).abs() < 1e-12
    assert dkd_loss(STUDENT, TEACHER, LABELS, alpha=0.01, beta=0.0) > 0


def test_two_classes_have_nothing_but_the_first_part():
    student, teacher, target = STUDENT[:, :2], TEACHER[:, :2], LABELS % 2
    torch.testing.assert_close(dkd_loss(student, teacher, target), kd_loss(student, teacher))
    gradient = torch.autograd.grad(dkd_loss(student.requires_grad_(), teacher, target), student)[0]
    assert gradient.isfinite().all()


def test_the_function_lets_gradients_through_to_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dkd_loss(STUDENT, t, LABELS, beta=2.0), teacher)
    extreme = torch.tensor([[150.0, -150.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(dkd_loss(torch.zeros(1, 3), extreme, torch.tensor([0]), temperature=1.0), extreme)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction):
    whole = [dkd_loss(STUDENT[i : i + 1], TEACHER[i : i + 1], LABELS[i : i + 1]) for i in range(6)]
    expected = torch.stack(whole)
    found = dkd_loss(STUDENT, TEACHER, LABELS, reduction=reduction)
    torch.testing.assert_close(found, expected if reduction == "none" else expected.sum())


def test_the_published_warm_up_is_a_line():
    loss = DKD(warmup=Linear(start=0.05, end=1.0, epochs=20))
    whole = DKD()(STUDENT, TEACHER, LABELS)
    for epoch in (0, 1, 10, 19, 20, 239):  # the published code counts from 1
        loss.epoch_starts(epoch, max_epochs=240)
        torch.testing.assert_close(loss(STUDENT, TEACHER, LABELS), min((epoch + 1) / 20, 1.0) * whole)
        each = loss.sample_losses(STUDENT, TEACHER, LABELS)
        torch.testing.assert_close(each.mean(), min((epoch + 1) / 20, 1.0) * whole)


def test_a_number_as_warm_up_is_a_factor():
    loss = DKD(warmup=0.25)
    torch.testing.assert_close(loss(STUDENT, TEACHER, LABELS), DKD()(STUDENT, TEACHER, LABELS) / 4)
    loss.epoch_starts(3, 10)
    torch.testing.assert_close(loss(STUDENT, TEACHER, LABELS), DKD()(STUDENT, TEACHER, LABELS) / 4)


def test_a_schedule_has_to_be_told_the_epoch():
    loss = DKD(warmup=Piecewise(values={0: 0.5, 2: 1.0}))
    with pytest.raises(RuntimeError, match="warm-up of DKD is a schedule that was not told the epoch; call `epoch_st"):
        loss(STUDENT, TEACHER, LABELS)
    assert "warmup=Piecewise(values={0: 0.5, 2: 1.0})" in repr(loss)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [("alpha", -1.0, ">= 0"), ("beta", -0.5, ">= 0"), ("temperature", 0.0, "> 0"), ("alpha", math.inf, ">= 0")],
)
def test_refuses_values_out_of_range(argument, value, message):
    with pytest.raises(ValueError, match=f"`{argument}` to be a finite number {message}"):
        DKD(**{argument: value})
    with pytest.raises(ValueError, match=f"`{argument}` to be a finite number {message}"):
        dkd_loss(STUDENT, TEACHER, LABELS, **{argument: value})


def test_refuses_a_warm_up_that_is_no_number():
    with pytest.raises(ValueError, match="`warmup` to be a finite number"):
        DKD(warmup=math.nan)


def test_refuses_soft_targets_single_classes_and_reductions():
    for soft in (TEACHER.softmax(1), MixedTarget(LABELS, LABELS.flip(0), torch.tensor(0.3))):
        with pytest.raises(ValueError, match="DKD needs class indices as targets"):
            DKD()(STUDENT, TEACHER, soft)
    with pytest.raises(ValueError, match="DKD needs at least 2 classes but the logits have 1"):
        dkd_loss(STUDENT[:, :1], TEACHER[:, :1], 0 * LABELS)
    with pytest.raises(ValueError, match="Expected `reduction` to be one of"):
        dkd_loss(STUDENT, TEACHER, LABELS, reduction="max")
