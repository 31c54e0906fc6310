# SPDX-License-Identifier: Apache-2.0
"""Dual-head distillation: the teacher teaches a second head, so that its wishes do not pull at the first."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range, check_positive
from lightning_robust.distillation.head_base import HeadDistillationLoss
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["DHKD", "align_gradients", "binary_kl", "binary_kl_norm"]

_HIDDEN = 200  # of the head with two layers, as published
_DROPOUT = 0.1


def binary_kl_norm(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, *, eps: float = 1e-8
) -> Tensor:
    r"""How far each logit of the student is from the teacher's, as the divergence of a coin from a fair one.

    .. math:: \frac{T^2}{B}\sum_{i,c} \mathrm{KL}\big(C(\tfrac12)\,\|\,C(\sigma((z_{ic} - t_{ic})/T))\big)

    with a coin :math:`C(p)` of probability :math:`p`. It is least, zero, where the logits agree.

    Args:
        student_logits: Scores ``z`` of the student's second head, ``[B, C]``.
        teacher_logits: Scores ``t`` of the teacher.
        temperature: Temperature ``T``.
        eps: Probabilities are held in :math:`[\epsilon, 1 - \epsilon]`, where a logit that is further away has no
            gradient; 0 holds none.

    Shape:
        A scalar; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes differ or an argument is out of range.

    References:
        Yang et al., "Dual-Head Knowledge Distillation", arXiv:2411.08937. Logarithms are taken of the sigmoid itself,
        so that float32 has no infinite values.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import binary_kl_norm
        >>> binary_kl_norm(torch.ones(1, 2), torch.ones(1, 2))
        tensor(0.)
    """
    bound = _checked(student_logits, teacher_logits, temperature, eps)
    with autocast_off(student_logits):
        apart = full_precision(student_logits) - full_precision(teacher_logits)
        u = (apart / temperature).clamp(-bound, bound)
        # -log(2) - (log s(u) + log s(-u)) / 2, written so that it is zero at zero
        divergence = u.abs() / 2 + torch.log1p(torch.exp(-u.abs())) - math.log(2)
        return temperature**2 * divergence.sum() / len(u)


def binary_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, *, eps: float = 1e-8) -> Tensor:
    r"""The divergence of the student from the teacher, each class a coin of its own.

    .. math:: \frac{T^2}{B}\sum_{i,c} \mathrm{KL}\big(C(\sigma(t_{ic}/T))\,\|\,C(\sigma(z_{ic}/T))\big)

    Args:
        student_logits: Scores ``z`` of the student's second head, ``[B, C]``.
        teacher_logits: Scores ``t`` of the teacher.
        temperature: Temperature ``T``.
        eps: Probabilities are held in :math:`[\epsilon, 1 - \epsilon]`; 0 holds none.

    Shape:
        A scalar; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes differ or an argument is out of range.

    References:
        Yang et al., "Dual-Head Knowledge Distillation", arXiv:2411.08937.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import binary_kl
        >>> binary_kl(torch.ones(1, 2), torch.ones(1, 2))
        tensor(0.)
    """
    bound = _checked(student_logits, teacher_logits, temperature, eps)
    with autocast_off(student_logits):
        u = (full_precision(student_logits) / temperature).clamp(-bound, bound)
        v = (full_precision(teacher_logits) / temperature).clamp(-bound, bound)
        yes = v.sigmoid() * (F.logsigmoid(v) - F.logsigmoid(u))
        no = (-v).sigmoid() * (F.logsigmoid(-v) - F.logsigmoid(-u))
        return temperature**2 * (yes + no).sum() / len(u)


def align_gradients(gradient: Tensor, reference: Tensor) -> Tensor:
    r"""Take out of a gradient what points against another one.

    .. math:: g + \max\Big(0, -\frac{g^\top r}{\|r\|^2}\Big)\,r

    Args:
        gradient: The gradient ``g`` of the teacher's term, of all parameters in one vector, 0 where there is none.
        reference: The gradient ``r`` of the labels' loss, in the same order; under DDP both are to be means over the
            processes.

    Shape:
        That of ``gradient``.

    References:
        Yang et al., "Dual-Head Knowledge Distillation", arXiv:2411.08937. As in their code the vectors hold the heads
        too: where gradients conflict, the gradient of the main head grows by the factor in front of ``r``.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import align_gradients
        >>> align_gradients(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor([0., 1.])
    """
    return gradient + conflict(torch.dot(gradient, reference), torch.dot(reference, reference)) * reference


def conflict(product: Tensor, squared: Tensor) -> Tensor:
    """How much of the reference has to be added, given its product with the gradient and with itself."""
    share = -product / torch.where(squared > 0, squared, 1)
    # Not finite where scaled losses overflow, a step that the scaler leaves out.
    return torch.where((product < 0) & share.isfinite(), share, 0)


class DHKD(HeadDistillationLoss):
    r"""A second head on the student's features learns the teacher's logits, while the first learns the labels.

    .. math:: \frac{T^2}{B}\sum_{i,c} \mathrm{KL}\big(C(\tfrac12)\,\|\,C(\sigma((z'_{ic} - t_{ic})/T))\big)

    with the logits :math:`z'` of the second head and a coin :math:`C(p)` of probability :math:`p`. The head is trained
    with the student and belongs to no checkpoint of it.
    Plug it in with ``Distillation(teacher, DHKD(), weight=1.0, base_weight=1.0)``; for teachers of another family the
    paper adds ``DHKD(head="nonlinear")`` and ``Distillation(..., align_gradients=True)``.

    Cost: a small head; with aligned gradients two more backward passes.

    Args:
        temperature: Temperature ``T``.
        compare: ``"norm"``, or ``"binary"`` for the divergence of the student's coins from the teacher's.
        head: ``"linear"``, or ``"nonlinear"``: two layers of 200 units with dropout and a batch norm.
        layer: Dotted name of the layer of the student that the head stands on; the input of the classifier when
            ``None``.
        width: Number of features of the layer; read off the classifier or the layer when ``None``.
        num_classes: Number of classes; that of the module or its data when ``None``.
        eps: Probabilities are held in :math:`[\epsilon, 1 - \epsilon]`.

    Shape:
        ``student_logits`` ``[B, C]``, which are not looked at, ``teacher_logits`` ``[B, C]`` and one feature of the
        student, ``[B, D]``, ``[B, N, D]`` or ``[B, D, H, W]``, give a scalar.

    Raises:
        ValueError: If an argument is out of range, or the width or the number of classes is unknown.

    References:
        Yang et al., "Dual-Head Knowledge Distillation", arXiv:2411.08937.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import DHKD
        >>> loss = DHKD(width=4, num_classes=3)
        >>> logits = torch.zeros(2, 3)
        >>> loss(logits, logits, student_features=[torch.zeros(2, 4)]).ndim
        0
    """

    name: ClassVar[str] = "dhkd"
    part: ClassVar[str] = "second head"

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        compare: Literal["norm", "binary"] = "norm",
        head: Literal["linear", "nonlinear"] = "linear",
        layer: str | None = None,
        width: int | None = None,
        num_classes: int | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(layer, width, num_classes)
        check_positive("temperature", temperature)
        check_choice("compare", compare, ("norm", "binary"))
        check_choice("head", head, ("linear", "nonlinear"))
        check_in_range("eps", eps, 0.0, 0.5)
        self.temperature = temperature
        self.compare = compare
        self.form = head
        self.eps = eps
        self.build_if_told()

    @override
    def make_head(self, width: int, num_classes: int) -> nn.Module:
        if self.form == "linear":
            return nn.Linear(width, num_classes)
        first = [nn.Linear(width, _HIDDEN), nn.Dropout(_DROPOUT), nn.BatchNorm1d(_HIDDEN), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(_HIDDEN, num_classes))

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
        if teacher_logits is None:
            raise ValueError("DHKD compares a head with a teacher; pass `teacher_logits`.")
        logits = self.head_logits(student_features)
        function = binary_kl_norm if self.compare == "norm" else binary_kl
        return function(logits, teacher_logits.detach(), self.temperature, eps=self.eps)


def _checked(student: Tensor, teacher: Tensor, temperature: float, eps: float) -> float:
    """The largest logit whose probability is within the bounds."""
    check_positive("temperature", temperature)
    check_in_range("eps", eps, 0.0, 0.5)
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected `teacher_logits` of the student's shape {tuple(student.shape)} but got {tuple(teacher.shape)}."
        )
    return math.log((1 - eps) / eps) if eps > 0 else math.inf
