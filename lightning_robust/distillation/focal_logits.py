# SPDX-License-Identifier: Apache-2.0
"""Focal distillation with the squared difference of logits in place of the divergence."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.distillation.focus import Focus, check_weights, class_index, focal_mean
from lightning_robust.losses.target import Reduction

__all__ = ["FocalLogitMatching", "focal_logit_matching_loss"]


def focal_logit_matching_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.0,
    classes: list[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared difference of the logits, with more weight on the samples that the teacher classifies correctly.

    .. math:: \big(\alpha + \beta\,\mathbb{1}[\arg\max t = y]\big)\,\frac{1}{2K} \sum_{k \in K} (z_k - t_k)^2

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, ``[B, K]`` or ``[B, K, ...]`` with at most as many classes.
        target: Class indices ``[B, ...]`` of the student; -100 does not count.
        alpha: Weight of every sample.
        beta: Further weight of the samples that the teacher classifies correctly.
        classes: The student's class for each class of the teacher; the first ``K`` when ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If an argument is out of range, shapes do not fit, or the target is soft.

    References:
        Ricci et al., arXiv:2511.08322; Yan et al., arXiv:2011.09161.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import focal_logit_matching_loss
        >>> student, old = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[2.0, 0.0]])
        >>> focal_logit_matching_loss(student, old, torch.tensor([0]))
        tensor(6.)
    """
    check_weights(alpha, beta)
    return focal_mean(
        student_logits,
        teacher_logits,
        target,
        _half_squares,
        alpha=alpha,
        beta=beta,
        classes=class_index(classes, student_logits),
        reduction=reduction,
    )


def _half_squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(1) / 2


class FocalLogitMatching(Focus):
    r"""As :class:`FocalDistillation`, with the squared difference of the logits in place of the divergence.

    .. math:: \big(\alpha + \beta\,\mathbb{1}[\arg\max t = y]\big)\,\frac{1}{2K} \sum_{k \in K} (z_k - t_k)^2

    See :func:`focal_logit_matching_loss`. The published training multiplies it by 0.4:
    ``Distillation(teacher, FocalLogitMatching(), weight=0.4, base_weight=1.0)``.

    Cost: one pass over the logits.

    Args:
        alpha: Weight of every sample.
        beta: Further weight of the samples that the teacher classifies correctly.
        classes: The student's class for each class of the teacher; the first ones when ``None``.

    Shape:
        As :class:`FocalDistillation`.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`focal_logit_matching_loss` refuses.

    References:
        Ricci et al., arXiv:2511.08322; Yan et al., arXiv:2011.09161.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FocalLogitMatching
        >>> student, old = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[2.0, 0.0]])
        >>> FocalLogitMatching()(student, old, torch.tensor([0]))
        tensor(6.)
    """

    name: ClassVar[str] = "focal_logit_matching"

    def __init__(self, *, alpha: float = 1.0, beta: float = 5.0, classes: list[int] | None = None) -> None:
        super().__init__(alpha, beta, classes)

    @override
    def distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _half_squares(student, teacher)

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, classes={self.classes}"
