# SPDX-License-Identifier: Apache-2.0
"""Distillation of relations: the student's probabilities shall correlate with the teacher's, not equal them."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.distillation.losses import DistillationLoss, check_shapes
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["DIST", "dist_loss"]


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    r"""One minus the correlation of class probabilities, of each sample over classes and of each class over samples.

    .. math:: T^2 \Big[ \beta \Big(1 - \frac1B \sum_i \rho(p_{i\cdot}, q_{i\cdot})\Big)
              + \gamma \Big(1 - \frac1C \sum_c \rho(p_{\cdot c}, q_{\cdot c})\Big) \Big]

    with Pearson's :math:`\rho` and softmaxes at temperature :math:`T`. The positions of ``[B, C, ...]`` logits count as
    samples. The gradient also reaches ``teacher_logits`` if they ask for one.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, of the same shape.
        beta: Weight of the correlation over classes.
        gamma: Weight of the correlation over samples.
        temperature: Temperature of both softmaxes.
        eps: Added to the product of the norms: probabilities that do not vary have correlation 0.

    Shape:
        A scalar; float32, or float64 for float64 logits.

    Raises:
        ValueError: If an argument is out of range or the shapes differ.

    References:
        Huang et al., arXiv:2205.10536.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import dist_loss
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
        >>> dist_loss(teacher.roll(1, dims=1), teacher)
        tensor(2.8333)
    """
    _check(beta, gamma, temperature)
    check_positive("eps", eps)
    check_shapes(student_logits, teacher_logits)
    with autocast_off(student_logits):
        p, q = (
            (full_precision(logits) / temperature).softmax(1).movedim(1, -1).flatten(0, -2)
            for logits in (student_logits, teacher_logits)
        )
        over_classes = 1 - _correlations(p, q, eps).mean()
        over_samples = 1 - _correlations(p.T, q.T, eps).mean()
        return beta * temperature**2 * over_classes + gamma * temperature**2 * over_samples


def _correlations(first: Tensor, second: Tensor, eps: float) -> Tensor:
    """Pearson's correlation of each row of one with that of the other."""
    first, second = (values - values.mean(1, keepdim=True) for values in (first, second))
    norms: Tensor = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    return (first * second).sum(1) / (norms + eps)


class DIST(DistillationLoss):
    r"""Distillation from a stronger teacher: match how its probabilities vary over classes and over the batch.

    .. math:: T^2 \big[ \beta\,(1 - \rho_{classes}) + \gamma\,(1 - \rho_{samples}) \big]

    See :func:`dist_loss`. A correlation forgives a teacher that is surer than the student can be, as the divergence of
    KD does not. The published training adds it to the cross-entropy with weight 1
    (``Distillation(teacher, DIST(), weight=1.0, base_weight=1.0)``).

    The correlation over samples is one of the batch that this process sees: with few samples per process it says
    little, and with one it is constant. So there are no per-sample values, and accumulating gradients is not a larger
    batch.

    Probabilities that do not vary have no correlation, and where they nearly do not its gradient is huge, as that of
    the published code: a student that starts with a last layer of zeros needs another start or gradient clipping.

    Cost: that of KD.

    Args:
        beta: Weight of the correlation over classes; 1 on ImageNet (2 with strong augmentation), 2 on CIFAR-100.
        gamma: Weight of the correlation over samples; the same values.
        temperature: Temperature of both softmaxes; 1 on ImageNet, 4 on CIFAR-100.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If an argument is out of range or the shapes differ.

    References:
        Huang et al., arXiv:2205.10536, and their code in image_classification_sota.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import DIST
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
        >>> DIST()(teacher.roll(1, dims=1), teacher)
        tensor(2.8333)
    """

    name: ClassVar[str] = "dist"

    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        _check(beta, gamma, temperature)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    @override
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return dist_loss(
            student_logits, teacher_logits.detach(), beta=self.beta, gamma=self.gamma, temperature=self.temperature
        )

    @override
    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"


def _check(beta: float, gamma: float, temperature: float) -> None:
    check_non_negative("beta", beta)
    check_non_negative("gamma", gamma)
    check_positive("temperature", temperature)
