"""Focal distillation against loops, with teachers of fewer classes."""

import math

import pytest
import torch

from lightning_robust.distillation import (
    FocalDistillation,
    FocalLogitMatching,
    focal_distillation_loss,
    focal_logit_matching_loss,
    kd_loss,
)
from support.distillation_losses import labels, logits

STUDENT, TEACHER, OLD, LABELS = logits(0, 20, 5), logits(1, 20, 5), logits(2, 20, 3), labels(3, 5, 20)
CLASSES = [4, 0, 2]  # the student's class of each of the old teacher's


def weights(teacher, classes, alpha, beta):
    return [alpha + beta * (classes[row.argmax()] == y) for row, y in zip(teacher, LABELS.tolist(), strict=True)]


def divergence(student, teacher, temperature):
    p, q = ((row / temperature).softmax(0).tolist() for row in (student, teacher))
    return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


def half_square(student, teacher, temperature):
    return sum((a - b) ** 2 for a, b in zip(student.tolist(), teacher.tolist(), strict=True)) / (2 * len(teacher))


KINDS = {
    "kl": (FocalDistillation, focal_distillation_loss, divergence, {"temperature": 2.0}),
    "lm": (FocalLogitMatching, focal_logit_matching_loss, half_square, {}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize(
    ("teacher", "classes", "told"),
    [(TEACHER, range(5), None), (OLD, range(3), None), (OLD, CLASSES, CLASSES)],
    ids=["all", "first", "named"],
)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 5.0), (0.0, 1.0), (0.5, 0.0)])
def test_equals_a_naive_loop(kind, teacher, classes, told, alpha, beta):
    build, function, distance, own = KINDS[kind]
    weighed = weights(teacher, classes, alpha, beta)
    assert kind == "lm" or beta == 0 or len(set(weighed)) == 2  # some are right, some are not
    each = [
        w * distance(z[list(classes)], t, own.get("temperature"))
        for w, z, t in zip(weighed, STUDENT, teacher, strict=True)
    ]
    options = {"alpha": alpha, "beta": beta, "classes": told, **own}
    assert function(STUDENT, teacher, LABELS, **options, reduction="none").tolist() == pytest.approx(each, rel=1e-10)
    assert float(function(STUDENT, teacher, LABELS, **options)) == pytest.approx(sum(each) / 20, rel=1e-10)
    assert float(function(STUDENT, teacher, LABELS, **options, reduction="sum")) == pytest.approx(sum(each))
    loss = build(**options)
    assert float(loss(STUDENT, teacher, LABELS)) == pytest.approx(sum(each) / 20, rel=1e-10)
    assert loss.sample_losses(STUDENT, teacher, LABELS).tolist() == pytest.approx(each, rel=1e-10)


def test_without_focus_it_is_kd_without_the_squared_temperature():
    found = focal_distillation_loss(STUDENT, TEACHER, LABELS, beta=0.0, temperature=3.0)
    torch.testing.assert_close(found, kd_loss(STUDENT, TEACHER, 3.0, temperature_squared=False))


@kinds
def test_classes_that_the_teacher_does_not_know_get_no_gradient(kind):
    student = STUDENT.clone().requires_grad_()
    KINDS[kind][0](classes=CLASSES)(student, OLD, LABELS).backward()
    assert (student.grad[:, [1, 3]] == 0).all()
    assert (student.grad[:, CLASSES] != 0).all()


@kinds
def test_positions_and_half_precision_of_a_teacher_with_fewer_classes(kind):
    loss = KINDS[kind][0](classes=CLASSES)
    volume = (tensor.view(4, 5, -1).movedim(2, 1) for tensor in (STUDENT, OLD))
    torch.testing.assert_close(loss(*volume, LABELS.view(4, 5)), loss(STUDENT, OLD, LABELS))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(STUDENT.bfloat16(), OLD.bfloat16(), LABELS)
    torch.testing.assert_close(half, loss(STUDENT.bfloat16().float(), OLD.bfloat16().float(), LABELS))


@kinds
def test_the_classes_are_no_part_of_a_checkpoint_and_follow_the_module(kind):
    loss = KINDS[kind][0](classes=CLASSES)
    assert not loss.state_dict()
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}


@kinds
def test_refusals(kind):
    build, function, _, _ = KINDS[kind]
    with pytest.raises(ValueError, match=r"with at most as many classes but got \(20, 6\)"):
        function(STUDENT, logits(5, 20, 6), LABELS)
    with pytest.raises(ValueError, match="a class for each of the teacher's 3 but got 2"):
        build(classes=[0, 1])(STUDENT, OLD, LABELS)
    for call in (
        lambda: build(classes=[0, 1, 5])(STUDENT, OLD, LABELS),
        lambda: function(STUDENT, OLD, LABELS, classes=[0, 1, 5]),
    ):
        with pytest.raises(ValueError, match="`classes` to be below the student's number of classes, 5, but got"):
            call()
    for wrong in ([0, 0, 1], []):
        with pytest.raises(ValueError, match="`classes` to be different classes but got"):
            build(classes=wrong)
    with pytest.raises(ValueError, match="`classes` to be an integer >= 0 but got -1"):
        build(classes=[0, -1, 2])
    with pytest.raises(ValueError, match="`alpha` to be a finite number >= 0"):
        build(alpha=-1.0)
    with pytest.raises(ValueError, match="`beta` to be a finite number >= 0"):
        function(STUDENT, OLD, LABELS, beta=-1.0)
    with pytest.raises(ValueError, match="Focal distillation needs class indices"):
        build()(STUDENT, TEACHER, TEACHER.softmax(1))
    with pytest.raises(ValueError, match="`reduction` to be one of"):
        function(STUDENT, OLD, LABELS, reduction="max")


def test_refuses_a_temperature_that_is_not_positive():
    with pytest.raises(ValueError, match="`temperature` to be a finite number > 0"):
        FocalDistillation(temperature=0.0)
    with pytest.raises(ValueError, match="`temperature` to be a finite number > 0"):
        focal_distillation_loss(STUDENT, OLD, LABELS, temperature=-1.0)
