# SPDX-License-Identifier: Apache-2.0
"""Base class of the losses that compare a student's logits with a teacher's."""

from typing import ClassVar

from torch import Tensor, nn

__all__ = ["DistillationLoss"]


class DistillationLoss(nn.Module):
    """A loss ``loss(student_logits, teacher_logits, target=None) -> scalar``; subclasses implement :meth:`forward`.

    Implementations compute in float32 (float64 for float64 logits) with autocast disabled, and let no gradient reach
    the teacher.

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

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            student_logits: Scores of the student before the softmax, ``[B, C]``.
            teacher_logits: Scores of the teacher, of the same shape.
            target: Labels of the batch, for losses that declare ``needs_target``.
        """
        raise NotImplementedError
