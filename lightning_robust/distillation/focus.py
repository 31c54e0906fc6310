# SPDX-License-Identifier: Apache-2.0
"""What focal distillation losses share: classes that the teacher knows, and weight on what it gets right."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer, check_non_negative
from lightning_robust.distillation.losses import SampleDistillationLoss
from lightning_robust.losses import Target, autocast_off, full_precision
from lightning_robust.losses.target import Reduction

__all__ = ["Focus", "check_range", "check_weights", "class_index", "focal_mean"]


def focal_mean(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    distances: Callable[[Tensor, Tensor], Tensor],
    *,
    alpha: float,
    beta: float,
    classes: Tensor | None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distances between teacher and student on the teacher's classes, weighed by whether the teacher is right.

    Args:
        student_logits: ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: ``[B, K]`` or ``[B, K, ...]``.
        target: Class indices ``[B, ...]`` of the student.
        distances: Logits of student and teacher, both of ``K`` classes in full precision, to ``[B, ...]``.
        alpha: Weight of every sample.
        beta: Further weight of those that the teacher classifies correctly.
        classes: The student's class for each class of the teacher, ``[K]``; the first ones when ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_known(student_logits, teacher_logits, classes)
    with autocast_off(student_logits):
        student, teacher = full_precision(student_logits), full_precision(teacher_logits)
        seen = Target.of(student, target)
        guess = teacher.argmax(1)
        if classes is None:
            student = student[:, : teacher.shape[1]]
        else:
            student, guess = student.index_select(1, classes), classes[guess]
        right = guess == seen.labels("Focal distillation")
        return seen.reduce((alpha + beta * right) * distances(student, teacher), reduction)


def class_index(classes: list[int] | None, like: Tensor | None = None) -> Tensor | None:
    """Return a list of different classes as a tensor.

    Args:
        classes: The student's class for each class of the teacher.
        like: The student's logits, for device and number of classes.
    """
    if classes is None:
        return None
    for each in classes:
        check_integer("classes", each, 0)
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"Expected `classes` to be different classes but got {classes}.")
    if like is not None:
        check_range(classes, like)
    return torch.tensor(classes, device=None if like is None else like.device)


def check_range(classes: list[int] | None, logits: Tensor) -> None:
    """Refuse classes that the student does not have."""
    if classes is not None and logits.ndim > 1 and max(classes) >= logits.shape[1]:
        raise ValueError(
            f"Expected `classes` to be below the student's number of classes, {logits.shape[1]}, but got {classes}."
        )


def check_weights(alpha: float, beta: float) -> None:
    """Refuse negative weights."""
    check_non_negative("alpha", alpha)
    check_non_negative("beta", beta)


def _check_known(student: Tensor, teacher: Tensor, classes: Tensor | None) -> None:
    if (
        student.ndim < 2
        or student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]
        or teacher.shape[1] > student.shape[1]
    ):
        raise ValueError(
            f"Expected `teacher_logits` of the student's shape {tuple(student.shape)} with at most as many classes but "
            f"got {tuple(teacher.shape)}."
        )
    if classes is not None and len(classes) != teacher.shape[1]:
        raise ValueError(
            f"Expected `classes` to name a class for each of the teacher's {teacher.shape[1]} but got {len(classes)}."
        )


class Focus(SampleDistillationLoss):
    """A distance from the teacher with more weight where the teacher is right; subclasses say which distance.

    Args:
        alpha: Weight of every sample.
        beta: Further weight of the samples that the teacher classifies correctly.
        classes: The student's class for each class of the teacher; the first ones when ``None``.
    """

    needs_target: ClassVar[bool] = True
    same_classes: ClassVar[bool] = False
    _index: Tensor | None

    def __init__(self, alpha: float, beta: float, classes: list[int] | None) -> None:
        super().__init__()
        check_weights(alpha, beta)
        self.alpha = alpha
        self.beta = beta
        self.classes = classes
        # It comes from an argument, so a checkpoint does not repeat it.
        self.register_buffer("_index", class_index(classes), persistent=False)

    @abstractmethod
    def distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance for each sample, ``[B, ...]``.

        Args:
            student: Logits of the teacher's classes in full precision, ``[B, K, ...]``.
            teacher: Those of the teacher.
        """

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        check_range(self.classes, student_logits)
        labels = self.labels(target)
        index = None if self._index is None else self._index.to(student_logits.device)
        return focal_mean(
            student_logits,
            teacher_logits,
            labels,
            self.distances,
            alpha=self.alpha,
            beta=self.beta,
            classes=index,
            reduction="none",
        )
