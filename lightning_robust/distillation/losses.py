# SPDX-License-Identifier: Apache-2.0
"""Base classes of the losses that compare a student's logits with a teacher's."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.losses import MixedTarget, Target, autocast_off, full_precision
from lightning_robust.losses.target import Reduction

__all__ = ["DistillationLoss", "SampleDistillationLoss", "check_shapes", "compare", "reduce_samples"]


class DistillationLoss(nn.Module):
    """A loss ``loss(student_logits, teacher_logits, target=None) -> scalar``; subclasses implement :meth:`forward`.

    Implementations compute in float32 (float64 for float64 logits) with autocast disabled, and let no gradient reach
    the teacher. :class:`SampleDistillationLoss` does that for a loss that is a mean over samples.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import DistillationLoss
        >>> class LogitMSE(DistillationLoss):
        ...     name = "logit_mse"
        ...     def forward(self, student_logits, teacher_logits, target=None):
        ...         return (student_logits - teacher_logits.detach()).square().mean()
        >>> LogitMSE()(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(1.)
    """

    name: ClassVar[str] = "distillation"  # the callback logs the term under this name
    needs_target: ClassVar[bool] = False  # whether the labels of the batch are read and passed on
    same_classes: ClassVar[bool] = True  # whether the teacher has to have the student's classes, all of them

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            student_logits: Scores of the student before the softmax, ``[B, C]``.
            teacher_logits: Scores of the teacher, of the same shape.
            target: Labels of the batch, for losses that declare ``needs_target``.
        """
        raise NotImplementedError

    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        """Learn the epoch (counted from 0) and the number of epochs (-1: unknown), before its first batch."""


class SampleDistillationLoss(DistillationLoss, ABC):
    """A mean of per-sample losses; subclasses implement :meth:`sample_losses` and nothing else.

    Shapes, precision, the gradient of the teacher and the mean are taken care of here. Samples whose label is -100 do
    not count, as in torch's cross entropy; a batch without any gives 0.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar; float32, or float64 for
        float64 logits.

    Raises:
        ValueError: If the shapes differ, or labels that are needed are missing or do not fit.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import SampleDistillationLoss
        >>> class TotalVariation(SampleDistillationLoss):
        ...     name = "total_variation"
        ...     def sample_losses(self, student_logits, teacher_logits, target=None):
        ...         return (student_logits.softmax(1) - teacher_logits.softmax(1)).abs().sum(1) / 2
        >>> student, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [20.0, 0.0]])
        >>> TotalVariation()(student, teacher)
        tensor(0.2500)
        >>> TotalVariation().sample_losses(student, teacher)
        tensor([0.0000, 0.5000])
    """

    @abstractmethod
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss of each sample, ``[B, ...]``; for methods that weigh samples themselves.

        Gradients flow to both networks here; :meth:`forward` cuts those of the teacher.

        Args:
            student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
            teacher_logits: Scores of the teacher, of the same shape.
            target: Labels of the batch, for losses that declare ``needs_target``.
        """

    @override
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        if self.same_classes:
            check_shapes(student_logits, teacher_logits)
        seen = Target.of(student_logits, self.labels(target)) if self.needs_target else None
        with autocast_off(student_logits):
            student, teacher = full_precision(student_logits), full_precision(teacher_logits.detach())
            return reduce_samples(self.sample_losses(student, teacher, target), seen, "mean")

    def labels(self, target: Tensor | None) -> Tensor:
        """Return the labels, or refuse that there are none.

        Args:
            target: What the loss was called with.
        """
        if target is None:
            raise ValueError(f"{type(self).__name__} needs the labels of the samples; pass `target`.")
        return target


def check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits that are none, or not of the same shape.

    Args:
        student_logits: Scores of the student.
        teacher_logits: Scores of the teacher.
    """
    if student_logits.ndim < 2:
        raise ValueError(
            f"Expected `student_logits` to be [B, C] or [B, C, ...] but got shape {tuple(student_logits.shape)}."
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Expected `teacher_logits` of the student's shape {tuple(student_logits.shape)} but got "
            f"{tuple(teacher_logits.shape)}."
        )


def compare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | MixedTarget,
    losses: Callable[[Tensor, Tensor, Target], Tensor],
    reduction: Reduction,
) -> Tensor:
    """Check, widen and reduce around the formula of a loss that sees labels.

    Args:
        student_logits: ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Of the same shape.
        target: Class indices, class probabilities or a mixture.
        losses: The formula: logits in full precision and the target to values ``[B, ...]``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_shapes(student_logits, teacher_logits)
    with autocast_off(student_logits):
        student, teacher = full_precision(student_logits), full_precision(teacher_logits)
        seen = Target.of(student, target)
        return seen.reduce(losses(student, teacher, seen), reduction)


def reduce_samples(losses: Tensor, target: Target | None, reduction: Reduction) -> Tensor:
    """Reduce per-sample losses, without ignored samples where labels are known; nothing gives 0.

    Args:
        losses: ``[B, ...]``.
        target: The labels, for losses that see them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    if target is not None:
        return target.reduce(losses, reduction)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(losses.numel(), 1)
