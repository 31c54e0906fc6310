"""Normalised distillation against probabilities in float64, one sample at a time."""

import numpy as np
import pytest
import torch

from lightning_robust.distillation import NKD, nkd_loss
from lightning_robust.losses import MixedTarget
from support.distillation_losses import labels, logits

STUDENT, TEACHER, LABELS = logits(0, 6, 5), logits(1, 6, 5), labels(2, 5, 6)


def softmax(row):
    exponentials = np.exp(row - row.max())
    return exponentials / exponentials.sum()


def reference(student, teacher, target, gamma, temperature):
    total = 0.0
    for z, t, y in zip(student.numpy(), teacher.numpy(), target.tolist(), strict=True):
        others = [c for c in range(len(z)) if c != y]
        p, q = (softmax(row[others] / temperature) for row in (z, t))
        total -= softmax(t)[y] * np.log(softmax(z)[y]) + gamma * temperature**2 * (q * np.log(p)).sum()
    return total / len(student)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0), (0.0, 2.0)])
def test_equals_a_naive_loop(gamma, temperature):
    expected = reference(STUDENT, TEACHER, LABELS, gamma, temperature)
    found = nkd_loss(STUDENT, TEACHER, LABELS, gamma=gamma, temperature=temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    found = NKD(gamma=gamma, temperature=temperature)(STUDENT, TEACHER, LABELS)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_largest_class_of_a_soft_target_is_the_label():
    expected = NKD()(STUDENT, TEACHER, LABELS)
    soft = 0.6 * torch.eye(5, dtype=torch.float64)[LABELS] + 0.08
    mixture = MixedTarget(LABELS.flip(0), LABELS, torch.tensor(0.3))
    torch.testing.assert_close(NKD()(STUDENT, TEACHER, soft), expected)
    torch.testing.assert_close(NKD()(STUDENT, TEACHER, mixture), expected)


def test_the_best_student_has_the_teachers_other_classes():
    at_teacher = nkd_loss(TEACHER, TEACHER, LABELS, reduction="none")
    label = torch.nn.functional.one_hot(LABELS, 5) * 1.0
    for step in (0.1 * logits(3, 6, 5), 0.1 * logits(4, 6, 5)):
        moved = TEACHER + step * (1 - label)
        # only the term about the other classes, whose minimum is there
        first = nkd_loss(moved, TEACHER, LABELS, gamma=0.0, reduction="none")
        first_at_teacher = nkd_loss(TEACHER, TEACHER, LABELS, gamma=0.0, reduction="none")
        assert (nkd_loss(moved, TEACHER, LABELS, reduction="none") - first > at_teacher - first_at_teacher).all()


def test_the_function_lets_gradients_through_to_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: nkd_loss(STUDENT, t, LABELS), teacher)


@pytest.mark.parametrize(("argument", "value", "message"), [("gamma", -1.0, ">= 0"), ("temperature", 0.0, "> 0")])
def test_refuses_values_out_of_range(argument, value, message):
    with pytest.raises(ValueError, match=f"`{argument}` to be a finite number {message}"):
        NKD(**{argument: value})
    with pytest.raises(ValueError, match=f"`{argument}` to be a finite number {message}"):
        nkd_loss(STUDENT, TEACHER, LABELS, **{argument: value})


def test_refuses_a_single_class():
    with pytest.raises(ValueError, match="NKD needs at least 2 classes but the logits have 1"):
        nkd_loss(STUDENT[:, :1], TEACHER[:, :1], 0 * LABELS)
