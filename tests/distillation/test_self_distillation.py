"""Self-distillation with a target beyond the teacher."""

import math

import pytest
import torch

from lightning_robust.distillation import SelfDistillation, kd_loss, self_distillation_loss
from lightning_robust.losses import MixedTarget, cross_entropy
from support.distillation_losses import labels, logits

STUDENT, TEACHER, LABELS = logits(0, 6, 5), logits(1, 6, 5), labels(2, 5, 6)


@pytest.mark.parametrize("xi", [0.3, 1.0, 1.2, 3.5])
def test_without_floor_it_is_the_cross_entropy_with_the_mixture(xi):
    total = 0.0
    for z, t, y in zip(STUDENT, TEACHER, LABELS.tolist(), strict=True):
        p, q = z.softmax(0).tolist(), t.softmax(0).tolist()
        total -= sum((xi * q[c] + (1 - xi) * (c == y)) * math.log(p[c]) for c in range(5))
    found = self_distillation_loss(STUDENT, TEACHER, LABELS, xi=xi, probability_floor=0.0)
    assert float(found) == pytest.approx(total / 6, rel=1e-12)
    assert float(SelfDistillation(xi=xi, probability_floor=0.0)(STUDENT, TEACHER, LABELS)) == pytest.approx(total / 6)


def test_at_one_it_has_the_gradient_of_kd():
    student = STUDENT.clone().requires_grad_()
    found, expected = (
        torch.autograd.grad(loss, student)[0]
        for loss in (self_distillation_loss(student, TEACHER, LABELS, xi=1.0), kd_loss(student, TEACHER, 1.0))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("xi", [1.5, 3.5])
@pytest.mark.parametrize("floor", [1e-3, 0.1])
def test_the_floor_bounds_the_loss_from_below(xi, floor):
    teacher = torch.tensor([[-30.0, 30.0]])  # does not believe the label at all
    target = torch.tensor([0])
    for margin in (10.0, 100.0, 1000.0):
        student = torch.tensor([[-margin, 0.0]], requires_grad=True)
        free = self_distillation_loss(student, teacher, target, xi=xi, probability_floor=0.0)
        held = self_distillation_loss(student, teacher, target, xi=xi, probability_floor=floor)
        assert free < -0.4 * margin * (xi - 1)
        assert held >= (xi - 1) * math.log(floor) - 1e-4
        assert torch.autograd.grad(held, student)[0].abs().max() < 1e-3  # nothing pushes any further
    assert min(self_distillation_loss(50 * STUDENT, TEACHER, LABELS, xi=xi, reduction="none")) >= (
        (xi - 1) * math.log(1e-3)
    )


def test_the_floor_changes_nothing_above_it_or_for_labels_that_are_believed():
    for xi in (0.5, 1.5):
        soft = xi * TEACHER.softmax(1) + (1 - xi) * torch.eye(5, dtype=torch.float64)[LABELS]
        p = STUDENT.softmax(1)
        untouched = ~((soft < 0) & (p < 0.05)).any(1)
        free, held = (
            self_distillation_loss(STUDENT, TEACHER, LABELS, xi=xi, probability_floor=floor, reduction="none")
            for floor in (0.0, 0.05)
        )
        assert untouched.any()
        assert torch.equal(free == held, untouched)
        assert xi > 1 or untouched.all()


def test_soft_and_mixed_targets_are_labels_of_their_own_kind():
    mixture = MixedTarget(LABELS, LABELS.flip(0), torch.tensor(0.3))
    soft = mixture.probabilities(5, torch.float64)
    found = [self_distillation_loss(STUDENT, TEACHER, target, xi=1.5) for target in (mixture, soft)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    half = self_distillation_loss(STUDENT, TEACHER, soft, xi=0.5)
    expected = (cross_entropy(STUDENT, soft) + cross_entropy(STUDENT, TEACHER.softmax(1))) / 2
    torch.testing.assert_close(half, expected)


def test_the_function_lets_gradients_through_to_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: self_distillation_loss(STUDENT, t, LABELS), teacher)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [("xi", 0.0, "a finite number > 0"), ("probability_floor", 1.5, "in .0, 1."), ("probability_floor", -0.1, "in .0")],
)
def test_refuses_values_out_of_range(argument, value, message):
    with pytest.raises(ValueError, match=f"`{argument}` to be {message}"):
        SelfDistillation(**{argument: value})
    with pytest.raises(ValueError, match=f"`{argument}` to be {message}"):
        self_distillation_loss(STUDENT, TEACHER, LABELS, **{argument: value})
