# SPDX-License-Identifier: Apache-2.0
"""Learning from one number of the teacher per sample: the logarithm of its probability of the label."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.distillation.losses import SampleDistillationLoss, check_shapes
from lightning_robust.losses import MixedTarget, Target, autocast_off, full_precision
from lightning_robust.losses.target import Reduction

__all__ = ["SquaredErrorLogit", "squared_error_logit_loss"]


def squared_error_logit_loss(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor | MixedTarget,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Half the squared difference of the log-probabilities that student and teacher give to the label.

    .. math:: \tfrac12 \big( \log p_y - \log q_y \big)^2

    The gradient also reaches ``teacher_log_probs`` if they ask for one.

    Args:
        student_logits: Scores of the student before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        teacher_log_probs: What the teacher said about the label, :math:`\log q_y`, ``[B, ...]``: all that has to be
            stored of it.
        target: Class indices ``[B, ...]``; -100 does not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes do not fit or the target is soft.

    References:
        Zhao and Zhu, arXiv:2310.07838.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import squared_error_logit_loss
        >>> squared_error_logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([-0.1]), torch.tensor([0]))
        tensor(0.1759)
    """
    with autocast_off(student_logits):
        log_p = full_precision(student_logits).log_softmax(1)
        seen = Target.of(log_p, target)
        seen.labels("SquaredErrorLogit")  # refuses soft targets
        picked = seen.pick(log_p)
        if teacher_log_probs.shape != picked.shape:
            raise ValueError(
                f"Expected `teacher_log_probs` to have one value per sample, shape {tuple(picked.shape)}, but got "
                f"{tuple(teacher_log_probs.shape)}."
            )
        return seen.reduce((picked - full_precision(teacher_log_probs)).square() / 2, reduction)


class SquaredErrorLogit(SampleDistillationLoss):
    r"""Squared error of the label's log-probability: distillation when only that number of the teacher is known.

    .. math:: \tfrac12 \big( \log p_y - \log q_y \big)^2

    See :func:`squared_error_logit_loss`, which takes the stored numbers. A cross-entropy with the label weighed by
    :math:`q_y` does not converge to the teacher but to :math:`q^2 / \sum q^2`; this does. It pulls the label's
    probability down, too, where the teacher's is smaller.

    Cost: one softmax each.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]``, ``target`` ``[B, ...]``; a scalar.

    Raises:
        ValueError: For what :func:`squared_error_logit_loss` refuses.

    References:
        Zhao and Zhu, arXiv:2310.07838.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import SquaredErrorLogit
        >>> SquaredErrorLogit()(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1603)
    """

    name: ClassVar[str] = "squared_error_logit"
    needs_target: ClassVar[bool] = True

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        check_shapes(student_logits, teacher_logits)
        labels = self.labels(target)
        with autocast_off(teacher_logits):
            log_q = full_precision(teacher_logits).log_softmax(1)
            seen = Target.of(log_q, labels)
            seen.labels("SquaredErrorLogit")
            return squared_error_logit_loss(student_logits, seen.pick(log_q), labels, reduction="none")
