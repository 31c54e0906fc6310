# SPDX-License-Identifier: Apache-2.0
"""Decoupled knowledge distillation: how sure of the label, and what about the other classes, as two terms."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.distillation.losses import SampleDistillationLoss, compare
from lightning_robust.distillation.non_target import label_mask, non_target
from lightning_robust.losses.target import Reduction, Target
from lightning_robust.schedules import Constant, Schedule, as_schedule

__all__ = ["DKD", "dkd_loss"]


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The two parts of the divergence from the teacher, with a weight each.

    .. math:: \alpha\,T^2\,\mathrm{KL}\big((q_y, 1-q_y)\,\|\,(p_y, 1-p_y)\big)
              + \beta\,T^2\,\mathrm{KL}\big(\hat q\,\|\,\hat p\big)

    with the softmaxes :math:`p, q` of student and teacher at temperature :math:`T`, and :math:`\hat p, \hat q` those
    over the classes other than the label. KD weighs the second part by :math:`1 - q_y`, little where the teacher is
    sure. The gradient also reaches ``teacher_logits`` if they ask for one.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_logits: Scores of the teacher, of the same shape.
        target: Class indices ``[B, ...]``; -100 does not count.
        alpha: Weight of the part about the label.
        beta: Weight of the part about the other classes.
        temperature: Temperature of all softmaxes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If an argument is out of range, shapes do not fit, or the target is soft.

    References:
        Zhao et al., arXiv:2203.08679.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import dkd_loss
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), beta=1.0, temperature=1.0)
        tensor(0.4621)
    """
    _check(alpha, beta, temperature)

    def losses(student: Tensor, teacher: Tensor, seen: Target) -> Tensor:
        is_label = label_mask(seen, student, "DKD")
        p, q = (non_target(logits / temperature, is_label, "DKD") for logits in (student, teacher))
        about_label = q.label.exp() * (q.label - p.label) + q.rest.exp() * (q.rest - p.rest)
        about_others = (q.probabilities * (q.conditional - p.conditional)).sum(1)
        return temperature**2 * (alpha * about_label + beta * about_others)

    return compare(student_logits, teacher_logits, target, losses, reduction)


class DKD(SampleDistillationLoss):
    r"""Decoupled knowledge distillation: KD whose part about the classes other than the label has its own weight.

    .. math:: w(e)\,T^2 \Big[ \alpha\,\mathrm{KL}\big((q_y, 1-q_y)\,\|\,(p_y, 1-p_y)\big)
              + \beta\,\mathrm{KL}\big(\hat q\,\|\,\hat p\big) \Big]

    See :func:`dkd_loss`. The published training adds it to the cross-entropy with weight 1
    (``Distillation(teacher, DKD(), weight=1.0, base_weight=1.0)``); on CIFAR-100 it grows over the first 20 epochs,
    which is ``warmup=Linear(start=0.05, end=1.0, epochs=20)``.

    Cost: two softmaxes more than KD.

    Args:
        alpha: Weight of the part about the label.
        beta: Weight of the part about the other classes; 8, 6 or 2 on CIFAR-100 depending on the pair of networks, the
            larger the surer the teacher, 0.5 on ImageNet.
        temperature: Temperature of all softmaxes; 4 on CIFAR-100, 1 on ImageNet.
        warmup: The factor :math:`w`, a number or a schedule over epochs. A schedule has to be told the epoch:
            ``Distillation`` does, a loop of your own calls ``epoch_starts(epoch, max_epochs)``.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]``, ``target`` ``[B, ...]``; a scalar.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`dkd_loss` refuses.
        RuntimeError: If the warm-up is a schedule that was not told the epoch.

    References:
        Zhao et al., arXiv:2203.08679. Their code takes the label out of the softmax by subtracting 1000 from its
        logit, and the logarithm of sums of probabilities, which is infinite for very sure networks; here both are exact
        in the logarithm, equal elsewhere.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import DKD
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> DKD(beta=1.0, temperature=1.0)(student, teacher, torch.tensor([0]))
        tensor(0.4621)
    """

    name: ClassVar[str] = "dkd"
    needs_target: ClassVar[bool] = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup: float | Schedule = 1.0,
    ) -> None:
        super().__init__()
        _check(alpha, beta, temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.warmup = as_schedule("warmup", warmup)
        self._factor = self.warmup.value if isinstance(self.warmup, Constant) else None

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        self._factor = self.warmup.at(epoch, max_epochs)

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        if self._factor is None:
            raise RuntimeError(
                "The warm-up of DKD is a schedule that was not told the epoch; call `epoch_starts(epoch, max_epochs)` "
                "at the start of every epoch, as Distillation does."
            )
        losses = dkd_loss(
            student_logits,
            teacher_logits,
            self.labels(target),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            reduction="none",
        )
        return self._factor * losses

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, warmup={self.warmup}"


def _check(alpha: float, beta: float, temperature: float) -> None:
    check_non_negative("alpha", alpha)
    check_non_negative("beta", beta)
    check_positive("temperature", temperature)
