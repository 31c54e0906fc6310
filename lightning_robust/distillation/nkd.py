# SPDX-License-Identifier: Apache-2.0
"""Normalised knowledge distillation: cross-entropies with the teacher about the label and about the other classes."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.distillation.losses import SampleDistillationLoss, compare
from lightning_robust.distillation.non_target import non_target
from lightning_robust.losses import MixedTarget
from lightning_robust.losses.target import Reduction, Target

__all__ = ["NKD", "nkd_loss"]


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the teacher's probability of the label, and with its other classes among each other.

    .. math:: -q_y \log p_y - \gamma\,T^2 \sum_{c \ne y} \hat q_c \log \hat p_c

    with :math:`\hat p, \hat q` the softmaxes over the classes other than the label, at temperature :math:`T`; the first
    term is at temperature 1. The gradient also reaches ``teacher_logits`` if they ask for one.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, of the same shape.
        target: Class indices ``[B, ...]``, -100 does not count; of class probabilities and mixtures the largest class
            is the label, as in the published code.
        gamma: Weight of the term about the other classes.
        temperature: Temperature of that term.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Yang et al., arXiv:2303.13005.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import nkd_loss
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> nkd_loss(student, teacher, torch.tensor([0]))
        tensor(1.8376)
    """
    check_non_negative("gamma", gamma)
    check_positive("temperature", temperature)

    def losses(student: Tensor, teacher: Tensor, seen: Target) -> Tensor:
        label = seen.probabilities(student).argmax(1, keepdim=True)
        is_label = torch.zeros_like(student, dtype=torch.bool).scatter_(1, label, True)
        p, q = (non_target(logits / temperature, is_label, "NKD") for logits in (student, teacher))
        log_p, log_q = (logits.log_softmax(1).gather(1, label).squeeze(1) for logits in (student, teacher))
        about_others = -(q.probabilities * p.conditional).sum(1)
        return gamma * temperature**2 * about_others - log_q.exp() * log_p

    return compare(student_logits, teacher_logits, target, losses, reduction)


class NKD(SampleDistillationLoss):
    r"""Normalised knowledge distillation: a soft loss about the label, and one about the other classes made comparable.

    .. math:: -q_y \log p_y - \gamma\,T^2 \sum_{c \ne y} \hat q_c \log \hat p_c

    See :func:`nkd_loss`. The published training adds it to the cross-entropy with weight 1
    (``Distillation(teacher, NKD(), weight=1.0, base_weight=1.0)``). It is a cross-entropy, so it is not 0 where student
    and teacher agree.

    Cost: two softmaxes more than KD.

    Args:
        gamma: Weight of the term about the other classes; 1.5 on ImageNet, 3.5 for CIFAR-100's ResNets.
        temperature: Temperature of that term; 1 on ImageNet, 3 for CIFAR-100's ResNets.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]``, ``target`` ``[B, ...]`` or soft; a
        scalar.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`nkd_loss` refuses.

    References:
        Yang et al., arXiv:2303.13005. Weighing the label's cross-entropy by the teacher's probability, used alone, is
        biased (Zhao and Zhu, arXiv:2310.07838); here the plain cross-entropy is beside it.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import NKD
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> NKD()(student, teacher, torch.tensor([0]))
        tensor(1.8376)
    """

    name: ClassVar[str] = "nkd"
    needs_target: ClassVar[bool] = True

    def __init__(self, *, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_non_negative("gamma", gamma)
        check_positive("temperature", temperature)
        self.gamma = gamma
        self.temperature = temperature

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return nkd_loss(
            student_logits,
            teacher_logits,
            self.labels(target),
            gamma=self.gamma,
            temperature=self.temperature,
            reduction="none",
        )

    @override
    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}"
