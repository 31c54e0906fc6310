"""Plackett-Luce distillation against the likelihood of a ranking, drawn class by class."""

import math

import pytest
import torch

from lightning_robust.distillation import PLD, pld_loss
from lightning_robust.losses import cross_entropy
from support.distillation_losses import labels, logits

STUDENT, TEACHER, LABELS = logits(0, 6, 5), logits(1, 6, 5), labels(2, 5, 6)


def reference(student, teacher, target, temperature):
    total = 0.0
    for z, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        order = [y, *sorted((c for c in range(len(z)) if c != y), key=lambda c: -t[c])]
        normaliser = sum(math.exp(value / temperature) for value in t)
        for rank, c in enumerate(order):
            drawn = math.exp(z[c]) / sum(math.exp(z[other]) for other in order[rank:])
            total -= math.exp(t[c] / temperature) / normaliser * math.log(drawn)
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_equals_a_naive_loop(temperature):
    expected = reference(STUDENT, TEACHER, LABELS, temperature)
    assert float(pld_loss(STUDENT, TEACHER, LABELS, temperature=temperature)) == pytest.approx(expected, rel=1e-12)
    assert float(PLD(temperature=temperature)(STUDENT, TEACHER, LABELS)) == pytest.approx(expected, rel=1e-12)


def test_a_teacher_that_knows_nothing_but_the_label_gives_the_cross_entropy():
    sure = 200 * torch.nn.functional.one_hot(LABELS, 5).double()
    torch.testing.assert_close(pld_loss(STUDENT, sure, LABELS), cross_entropy(STUDENT, LABELS))


def test_is_convex_in_the_student():
    other = logits(5, 6, 5)
    ends = [pld_loss(z, TEACHER, LABELS, reduction="none") for z in (STUDENT, other)]
    for share in (0.1, 0.5, 0.8):
        between = pld_loss(share * STUDENT + (1 - share) * other, TEACHER, LABELS, reduction="none")
        assert (between <= share * ends[0] + (1 - share) * ends[1] + 1e-12).all()


def test_the_label_comes_first_however_little_the_teacher_thinks_of_it():
    teacher, student = torch.tensor([[3.0, 2.0, -4.0]]), torch.zeros(1, 3)
    q = teacher.softmax(1)[0]
    expected = q[2] * math.log(3) + q[0] * math.log(2)
    torch.testing.assert_close(pld_loss(student, teacher, torch.tensor([2])), expected)


def test_equal_logits_keep_their_order():
    teacher, student = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])
    in_order = sum(student[0, k:].logsumexp(0) - student[0, k] for k in range(3)) / 3
    torch.testing.assert_close(pld_loss(student, teacher, torch.tensor([0])), in_order)


def test_the_function_lets_gradients_through_to_the_teachers_weights():
    teacher = TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: pld_loss(STUDENT, t, LABELS), teacher)


def test_refuses_a_temperature_that_is_not_positive_and_soft_targets():
    with pytest.raises(ValueError, match="`temperature` to be a finite number > 0"):
        PLD(temperature=0.0)
    with pytest.raises(ValueError, match="`temperature` to be a finite number > 0"):
        pld_loss(STUDENT, TEACHER, LABELS, temperature=-1.0)
    with pytest.raises(ValueError, match="PLD needs class indices as targets"):
        PLD()(STUDENT, TEACHER, TEACHER.softmax(1))
