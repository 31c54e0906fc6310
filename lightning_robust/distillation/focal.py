# SPDX-License-Identifier: Apache-2.0
"""Focal distillation: stay close to an earlier model where that one was right, so that updates break little."""

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.distillation.focus import Focus, check_weights, class_index, focal_mean
from lightning_robust.losses.target import Reduction

__all__ = ["FocalDistillation", "focal_distillation_loss"]


def focal_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.0,
    temperature: float = 5.0,
    classes: list[int] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence from the teacher, with more weight on the samples that the teacher classifies correctly.

    .. math:: \big(\alpha + \beta\,\mathbb{1}[\arg\max t = y]\big)\,
              \mathrm{KL}\big(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(z_K/T)\big)

    with :math:`z_K` the student's logits of the classes that the teacher knows. Nothing is multiplied by ``T^2``. The
    gradient also reaches ``teacher_logits`` if they ask for one.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, ``[B, K]`` or ``[B, K, ...]`` with at most as many classes.
        target: Class indices ``[B, ...]`` of the student; -100 does not count.
        alpha: Weight of every sample.
        beta: Further weight of the samples that the teacher classifies correctly.
        temperature: Temperature of both softmaxes.
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
        >>> from lightning_robust.distillation import focal_distillation_loss
        >>> student, old = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[2.0, 0.0]])
        >>> focal_distillation_loss(student, old, torch.tensor([0]), temperature=1.0)
        tensor(1.9669)
    """
    check_weights(alpha, beta)
    check_positive("temperature", temperature)
    index = class_index(classes, student_logits)

    def distances(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergences(student, teacher, temperature)

    return focal_mean(
        student_logits, teacher_logits, target, distances, alpha=alpha, beta=beta, classes=index, reduction=reduction
    )


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p, log_q = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


class FocalDistillation(Focus):
    r"""KD for model updates: keep the earlier model's answers, above all the right ones, to avoid negative flips.

    .. math:: \big(\alpha + \beta\,\mathbb{1}[\arg\max t = y]\big)\,
              \mathrm{KL}\big(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(z_K/T)\big)

    See :func:`focal_distillation_loss`. The teacher may know fewer classes than the student: those it does not know
    are not compared. Margin-preserving training has two such terms, one with the earlier model and one with a model
    trained anew for all classes, beside the loss :class:`~lightning_robust.losses.MarginBias`. Measure with
    :class:`~lightning_robust.metrics.NegativeFlipRate`.

    Cost: that of KD.

    Args:
        alpha: Weight of every sample.
        beta: Further weight of the samples that the teacher classifies correctly.
        temperature: Temperature of both softmaxes; 5 in the published training, 100 by default in its loss function.
        classes: The student's class for each class of the teacher; the first ones when ``None``.

    Shape:
        ``student_logits`` ``[B, C]`` or ``[B, C, ...]``, ``teacher_logits`` ``[B, K]`` or ``[B, K, ...]`` with
        ``K <= C``, ``target`` ``[B, ...]``; a scalar.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`focal_distillation_loss` refuses.

    References:
        Ricci et al., arXiv:2511.08322; Yan et al., arXiv:2011.09161. Without the factor :math:`T^2` of KD, as there.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FocalDistillation
        >>> student, old = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[2.0, 0.0]])
        >>> FocalDistillation(temperature=1.0)(student, old, torch.tensor([0]))
        tensor(1.9669)
    """

    name: ClassVar[str] = "focal_distillation"

    def __init__(
        self, *, alpha: float = 1.0, beta: float = 5.0, temperature: float = 5.0, classes: list[int] | None = None
    ) -> None:
        super().__init__(alpha, beta, classes)
        check_positive("temperature", temperature)
        self.temperature = temperature

    @override
    def distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _divergences(student, teacher, self.temperature)

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, classes={self.classes}"
