# SPDX-License-Identifier: Apache-2.0
"""Self-distillation against noisy labels: the target lies between the label and the teacher, or beyond the teacher."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_positive
from lightning_robust.distillation.losses import SampleDistillationLoss, compare
from lightning_robust.losses import MixedTarget
from lightning_robust.losses.target import Reduction, Target

__all__ = ["SelfDistillation", "self_distillation_loss"]


def self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    xi: float = 1.5,
    probability_floor: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with a mixture of teacher and label, whose weights may leave the interval from 0 to 1.

    .. math:: -\sum_c \tau_c \log \tilde p_c, \qquad \tau = \xi\,q + (1 - \xi)\,e_y, \qquad
              \tilde p_c = \begin{cases} p_c & \tau_c \ge 0 \\ \max(p_c, \epsilon) & \tau_c < 0 \end{cases}

    With :math:`\xi > 1` a label that the teacher does not believe has a negative weight, and pushing its probability
    towards 0 lowers the loss without end. With the floor :math:`\epsilon` the push ends there, and the loss is at least
    :math:`(\xi - 1) \log \epsilon`. The gradient also reaches ``teacher_logits`` if they ask for one.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, of the same shape.
        target: Class indices ``[B, ...]``, -100 does not count; class probabilities; or a mixture.
        xi: Weight of the teacher; above 1 the target moves away from the label.
        probability_floor: Probability at which pushing a label away ends; 0 for the formula as published.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Das and Sanghavi, arXiv:2301.13304; the floor is ours.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import self_distillation_loss
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[-5.0, 5.0]])
        >>> self_distillation_loss(student, teacher, torch.tensor([0]), xi=1.5)  # -log(0.5)
        tensor(0.6931)
        >>> self_distillation_loss(torch.tensor([[-60.0, 0.0]]), teacher, torch.tensor([0]), xi=1.5)
        tensor(-3.4534)
    """
    _check(xi, probability_floor)

    def losses(student: Tensor, teacher: Tensor, seen: Target) -> Tensor:
        soft = xi * teacher.softmax(1) + (1 - xi) * seen.probabilities(student)
        log_p = student.log_softmax(1)
        if xi > 1 and probability_floor > 0:
            log_p = torch.where(soft < 0, log_p.clamp(min=math.log(probability_floor)), log_p)
        return -(soft * log_p).sum(1)

    return compare(student_logits, teacher_logits, target, losses, reduction)


class SelfDistillation(SampleDistillationLoss):
    r"""Cross-entropy with :math:`\xi` times the teacher and :math:`1 - \xi` times the label, for noisy labels.

    .. math:: -\sum_c \tau_c \log \tilde p_c, \qquad \tau = \xi\,q + (1 - \xi)\,e_y

    See :func:`self_distillation_loss`. The teacher is a network of the same architecture that was trained on the same
    labels, whose mistakes it has partly seen through; :math:`\xi > 1` undoes more of them than the teacher did. The
    more labels are wrong, the larger the best value; on clean data it harms. The label is in the target already, so the
    loss stands alone: ``Distillation(teacher, SelfDistillation(xi=1.5), weight=1.0, base_weight=0.0)``.

    Cost: that of KD.

    Args:
        xi: Weight of the teacher, above 0. Reported best values: 1.5 for Caltech-256 and 3.5 for CIFAR-100 with half of
            the labels wrong, 1.2 for Stanford Cars with 30 %.
        probability_floor: Probability at which pushing a label away ends, without which the loss has no lower bound for
            ``xi`` above 1. A choice of ours: the paper trains linear classifiers with weight decay, which bounds them.
            0 turns it off.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]``, ``target`` ``[B, ...]`` or soft; a
        scalar.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`self_distillation_loss` refuses.

    References:
        Das and Sanghavi, arXiv:2301.13304.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import SelfDistillation
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[-5.0, 5.0]])
        >>> SelfDistillation(xi=1.5)(student, teacher, torch.tensor([0]))
        tensor(0.6931)
    """

    name: ClassVar[str] = "self_distillation"
    needs_target: ClassVar[bool] = True

    def __init__(self, *, xi: float = 1.5, probability_floor: float = 1e-3) -> None:
        super().__init__()
        _check(xi, probability_floor)
        self.xi = xi
        self.probability_floor = probability_floor

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return self_distillation_loss(
            student_logits,
            teacher_logits,
            self.labels(target),
            xi=self.xi,
            probability_floor=self.probability_floor,
            reduction="none",
        )

    @override
    def extra_repr(self) -> str:
        return f"xi={self.xi}, probability_floor={self.probability_floor}"


def _check(xi: float, probability_floor: float) -> None:
    check_positive("xi", xi)
    check_in_range("probability_floor", probability_floor, 0, 1)
