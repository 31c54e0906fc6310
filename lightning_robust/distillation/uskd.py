# SPDX-License-Identifier: Apache-2.0
"""Universal self-distillation: a student that is its own teacher, with soft labels from its logits and a weak head."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_non_negative
from lightning_robust.distillation.head_base import HeadDistillationLoss
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["USKD", "uskd_loss"]

_EPS = 1e-6  # keeps the ranks finite where a label has all probability


def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    label_smoothing: float = 0.1,
    log_ranks: bool = True,
) -> Tensor:
    r"""The distillation terms of a network without a teacher.

    .. math:: \frac1B\sum_i \Big[ -\alpha\,\big(p_{iy}^2 + 1 - \overline{p_y^2}\big) \log p_{iy}
        - \beta \sum_{c \ne y} \zeta_{ic} \log \hat p_{ic} - \mu \sum_c \tilde y_{ic} \log w_{ic} \Big]

    with the probabilities :math:`p` of the student, those :math:`\hat p` of the classes other than the label, those
    :math:`w` of the weak head and smoothed labels :math:`\tilde y`. The values :math:`\zeta` follow Zipf's law, one
    over the rank of the class, and sum to one; classes are ranked by
    :math:`w_c / (1 - w_y) + \log p_c / (1 - \log p_y)`. No gradient flows through the factor of the first term or
    through the ranks. The mean :math:`\overline{p_y^2}` is that of the batch, on each process its own.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]``.
        weak_logits: Scores of the weak head, ``[B, C]``.
        target: Class indices ``[B]`` or class probabilities ``[B, C]``, of which the largest two are labels.
        alpha: Factor of the term of the label.
        beta: Factor of the term of the other classes.
        mu: Factor of the weak head's own loss.
        label_smoothing: Smoothing of the weak head's labels.
        log_ranks: Rank with the student's log-probabilities, as the published code does; else with probabilities, as
            the paper says.

    Shape:
        A scalar; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes do not fit.

    References:
        Yang et al., arXiv:2303.13005. As in their code the label's own rank is dropped, so that values of the others
        need not start at the first, and class probabilities always have two labels: where only one is positive, the
        first other class is left out as well.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import uskd_loss
        >>> uskd_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), beta=0.0, mu=0.0)
        tensor(0.6931)
    """
    _refuse(student_logits, weak_logits, target)
    with autocast_off(student_logits):
        z, weak = full_precision(student_logits), full_precision(weak_logits)
        log_p = z.log_softmax(1)
        label, share = _labels(target, log_p)
        smoothed = label_smoothing / z.shape[1] + (1 - label_smoothing) * _dense(target, z)
        loss_of_weak = -(smoothed * weak.log_softmax(1)).sum(1).mean()
        log_p_y = log_p.gather(1, label)
        squared = log_p_y.detach().exp().square()
        factor = torch.where(share == 0, 0, squared + share - squared.mean(0, keepdim=True))
        loss_of_label = -(factor * log_p_y).sum(1).mean()
        others = torch.ones_like(z, dtype=torch.bool).scatter(1, label, False)
        ranked = log_p if log_ranks else log_p.exp()
        values = torch.where(others, _zipf(_odds(weak.softmax(1), label) + _odds(ranked, label)), 0)
        values = values / values.sum(1, keepdim=True)
        log_others = z.masked_fill(~others, -torch.inf).log_softmax(1)
        loss_of_others = -(values * torch.where(others, log_others, 0)).sum(1).mean()
        return alpha * loss_of_label + beta * loss_of_others + mu * loss_of_weak


def _labels(target: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Labels ``[B, K]`` and what each of them counts."""
    if not target.is_floating_point():
        return target.unsqueeze(1), like.new_ones(len(target), 1)
    share, label = target.to(like.dtype).sort(dim=1, descending=True, stable=True)
    return label[:, :2], share[:, :2]


def _dense(target: Tensor, like: Tensor) -> Tensor:
    if target.is_floating_point():
        return target.to(like.dtype)
    return F.one_hot(target, like.shape[1]).to(like.dtype)


def _odds(values: Tensor, label: Tensor) -> Tensor:
    values = values.detach()
    return values / (1 - values.gather(1, label).sum(1, keepdim=True) + _EPS)


def _zipf(scores: Tensor) -> Tensor:
    """One over the rank of each class, the largest score first."""
    place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return 1 / (place + 1).to(scores.dtype)


def _refuse(student: Tensor, weak: Tensor, target: Tensor) -> None:
    if student.ndim != 2 or student.shape != weak.shape:
        raise ValueError(
            f"Expected logits of student and weak head of one shape [B, C] but got {tuple(student.shape)} and "
            f"{tuple(weak.shape)}."
        )
    if target.shape != (student.shape if target.is_floating_point() else student.shape[:1]):
        raise ValueError(
            f"Expected `target` to be class indices [{len(student)}] or class probabilities {list(student.shape)} but "
            f"got shape {list(target.shape)}."
        )
    if student.shape[1] <= (2 if target.is_floating_point() else 1):
        raise ValueError(f"Expected a class besides the labels but the logits have only {student.shape[1]} classes.")


class USKD(HeadDistillationLoss):
    r"""Self-distillation without a teacher: soft labels from the student's logits and from a weak head on a layer.

    .. math:: \frac1B\sum_i \Big[ -\alpha\,\big(p_{iy}^2 + 1 - \overline{p_y^2}\big) \log p_{iy}
        - \beta \sum_{c \ne y} \zeta_{ic} \log \hat p_{ic} - \mu \sum_c \tilde y_{ic} \log w_{ic} \Big]

    See :func:`uskd_loss`. The weak head is a linear layer on the mean of the layer's map (of tokens the first), trained
    with the network, whose features get its gradient too. Add the plain cross-entropy with weight 1:
    ``Distillation(loss=USKD("backbone.layer2"), weight=1.0, base_weight=1.0)``.

    Cost: one linear layer; no teacher.

    Args:
        layer: Dotted name of a layer in the middle of the network, such as the last stage but one.
        alpha: Factor of the term of the label; 1 on ImageNet, 0.1 on CIFAR-100.
        beta: Factor of the term of the other classes.
        mu: Factor of the weak head's own loss; 0.005 on ImageNet, 0.1 on CIFAR-100.
        label_smoothing: Smoothing of the weak head's labels.
        log_ranks: Rank classes with the student's log-probabilities as the published code does; else with
            probabilities, as the paper says.
        width: Number of channels of the layer; read off the layer when ``None``.
        num_classes: Number of classes; that of the module or its data when ``None``.

    Shape:
        ``student_logits`` ``[B, C]``, no teacher logits, ``target`` ``[B]`` or ``[B, C]`` and one feature ``[B, D]``,
        ``[B, N, D]`` or ``[B, D, H, W]`` give a scalar.

    Raises:
        ValueError: If an argument is out of range, or the width or the number of classes is unknown.

    References:
        Yang et al., arXiv:2303.13005. See :func:`uskd_loss` for what their code does otherwise.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import USKD
        >>> loss = USKD("layer2", width=4, num_classes=3)
        >>> loss(torch.zeros(2, 3), None, torch.tensor([0, 2]), student_features=[torch.zeros(2, 4, 5, 5)]).ndim
        0
    """

    name: ClassVar[str] = "uskd"
    part: ClassVar[str] = "weak head"
    needs_target: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def __init__(
        self,
        layer: str,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        label_smoothing: float = 0.1,
        log_ranks: bool = True,
        width: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(layer, width, num_classes)
        for argument, factor in (("alpha", alpha), ("beta", beta), ("mu", mu)):
            check_non_negative(argument, factor)
        check_in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        self.alpha = alpha
        self.beta = beta
        self.mu = mu
        self.label_smoothing = label_smoothing
        self.log_ranks = log_ranks
        self.build_if_told()

    @override
    def make_head(self, width: int, num_classes: int) -> nn.Module:
        return nn.Linear(width, num_classes)

    @override
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None = None,
        *,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
    ) -> Tensor:
        if target is None:
            raise ValueError("USKD needs the labels of the samples; pass `target`.")
        return uskd_loss(
            student_logits,
            self.head_logits(student_features),
            target,
            alpha=self.alpha,
            beta=self.beta,
            mu=self.mu,
            label_smoothing=self.label_smoothing,
            log_ranks=self.log_ranks,
        )
