# SPDX-License-Identifier: Apache-2.0
"""Classic knowledge distillation: match the softened class probabilities of a teacher."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_choice, check_positive
from lightning_robust.distillation.losses import SampleDistillationLoss, check_shapes
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["KD", "kd_loss"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    temperature_squared: bool = True,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher at a temperature.

    .. math:: T^2\,\frac1B\sum_i \mathrm{KL}\big(\mathrm{softmax}(t_i/T)\,\|\,\mathrm{softmax}(z_i/T)\big)

    The sum runs over classes and the mean over the batch and, as in torch's cross entropy, over the positions of
    ``[B, C, ...]`` logits. The gradient also reaches ``teacher_logits`` if they ask for one, which attacks on the pair
    of networks need.

    Args:
        student_logits: Scores ``z`` of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores ``t`` of the teacher, of the same shape.
        temperature: Temperature ``T`` of both softmaxes.
        temperature_squared: Multiply by ``T^2``, which keeps the gradient's size when ``T`` changes.
        reduction: ``"mean"``, or ``"none"`` for one value per sample.

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    References:
        Hinton et al., arXiv:1503.02531.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import kd_loss
        >>> kd_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), temperature=1.0)
        tensor(0.3278)
    """
    check_positive("temperature", temperature)
    check_choice("reduction", reduction, ("mean", "none"))
    check_shapes(student_logits, teacher_logits)
    with autocast_off(student_logits):
        log_p = (full_precision(student_logits) / temperature).log_softmax(1)
        log_q = (full_precision(teacher_logits) / temperature).log_softmax(1)
        if reduction == "none":
            divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        else:
            positions = max(log_p.numel() // max(log_p.shape[1], 1), 1)
            divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True) / positions
    return divergence * temperature**2 if temperature_squared else divergence


class KD(SampleDistillationLoss):
    r"""Knowledge distillation: :math:`T^2` times the divergence between softened class probabilities.

    Runs on the logits of the training step; costs two passes over the logits, besides the teacher's forward pass.
    See :func:`kd_loss` for the formula.

    Args:
        temperature: Temperature of both softmaxes; 4 is the usual value for CIFAR-100.
        temperature_squared: Multiply by the squared temperature, as Hinton et al. do and most code does.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If the temperature is not positive.

    References:
        Hinton et al., arXiv:1503.02531.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import KD
        >>> KD(temperature=1.0)(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))
        tensor(0.3278)
    """

    name: ClassVar[str] = "kd"

    def __init__(self, *, temperature: float = 4.0, temperature_squared: bool = True) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.temperature_squared = temperature_squared

    @override
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return self._loss(student_logits, teacher_logits.detach(), "mean")

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return self._loss(student_logits, teacher_logits, "none")

    def _loss(self, student: Tensor, teacher: Tensor, reduction: Literal["mean", "none"]) -> Tensor:
        return kd_loss(
            student, teacher, self.temperature, temperature_squared=self.temperature_squared, reduction=reduction
        )

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, temperature_squared={self.temperature_squared}"
