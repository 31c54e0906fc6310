# SPDX-License-Identifier: Apache-2.0
"""Plackett-Luce distillation: rank the classes as the teacher does, the label first."""

import math
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.distillation.losses import SampleDistillationLoss, compare
from lightning_robust.distillation.non_target import label_mask
from lightning_robust.losses.target import Reduction, Target

__all__ = ["PLD", "pld_loss"]


def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Weighted list-wise loss of drawing the classes in the teacher's order.

    .. math:: \sum_{k=1}^{C} q_{\pi_k} \Big( \log \sum_{l \ge k} e^{z_{\pi_l}} - z_{\pi_k} \Big)

    with the order :math:`\pi`: the label, then the other classes by falling logit of the teacher, and the teacher's
    softmax :math:`q` at temperature :math:`T`. The first summand is the cross-entropy with the label, weighed by the
    teacher's probability of it. The gradient also reaches ``teacher_logits``, through the weights, if they ask for one.

    Args:
        student_logits: Scores ``z`` of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, of the same shape.
        target: Class indices ``[B, ...]``; -100 does not count.
        temperature: Temperature of the teacher's weights; the student has none, and nothing is multiplied by ``T^2``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the temperature is not positive, shapes do not fit, or the target is soft.

    References:
        PLD, arXiv:2506.12542.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import pld_loss
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> pld_loss(student, teacher, torch.tensor([0]))
        tensor(0.5925)
    """
    check_positive("temperature", temperature)

    def losses(student: Tensor, teacher: Tensor, seen: Target) -> Tensor:
        is_label = label_mask(seen, student, "PLD")
        order = teacher.detach().masked_fill(is_label, math.inf).argsort(dim=1, descending=True, stable=True)
        ranked = student.gather(1, order)
        # The classes that are left at each rank: from the last one backwards.
        left = ranked.flip(1).logcumsumexp(1).flip(1)
        weights = (teacher / temperature).softmax(1).gather(1, order)
        return (weights * (left - ranked)).sum(1)

    return compare(student_logits, teacher_logits, target, losses, reduction)


class PLD(SampleDistillationLoss):
    r"""Plackett-Luce distillation: the student learns the teacher's ranking of the classes with the label on top.

    .. math:: \sum_{k=1}^{C} q_{\pi_k} \Big( \log \sum_{l \ge k} e^{z_{\pi_l}} - z_{\pi_k} \Big)

    See :func:`pld_loss`. It contains the cross-entropy with the label, so it takes the place of the loss instead of
    being added: ``Distillation(teacher, PLD(), weight=1.0, base_weight=0.0)``. Convex in the student's logits.

    Cost: a sort of the classes and a cumulative sum more than KD, which for 1000 classes is noticeable.

    Args:
        temperature: Temperature of the teacher's weights; 1 is best on ImageNet, CIFAR-100 was trained with 4.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]``, ``target`` ``[B, ...]``; a scalar.

    Raises:
        ValueError: If the temperature is not positive, or for what :func:`pld_loss` refuses.

    References:
        PLD, arXiv:2506.12542, appendix C; classes with equal logits of the teacher keep their order.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import PLD
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> PLD()(student, teacher, torch.tensor([0]))
        tensor(0.5925)
    """

    name: ClassVar[str] = "pld"
    needs_target: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return pld_loss(
            student_logits, teacher_logits, self.labels(target), temperature=self.temperature, reduction="none"
        )

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
