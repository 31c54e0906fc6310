# SPDX-License-Identifier: Apache-2.0
"""Dual focal loss: the focal factor sees the class below the label, too."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["DualFocal", "dual_focal_loss"]


def dual_focal_loss(logits: Tensor, target: Tensor | MixedTarget | Target, *, gamma: float = 5.0) -> Tensor:
    r"""Dual focal loss of each sample, :math:`-(1 - p_y + p_j)^\gamma \log p_y`.

    :math:`p_j` is the largest probability that is smaller than :math:`p_y`, or 0 if there is none. It carries gradient.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        gamma: Exponent; 0 is the cross-entropy.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Tao et al., arXiv:2305.13665.

    Example:
        >>> dual_focal_loss(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]), gamma=2.0)
        tensor([0.0124])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        seen = Target.of(log_p, target)
        if seen.soft:
            return seen.expected(_dual_focal(log_p, _below_each(log_p), gamma))
        of_label, below = _label_and_below(log_p, seen)
        return seen.weighted(_dual_focal(of_label, below, gamma))


def _dual_focal(log_p: Tensor, below: Tensor, gamma: float) -> Tensor:
    return (-log_p.expm1() + below).clamp(min=1e-12) ** gamma * -log_p


def _label_and_below(log_p: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Log-probability of the label, and the largest probability under it, 0 if there is none."""
    with torch.no_grad():
        smaller = log_p < target.pick(log_p).unsqueeze(1)
        top = torch.where(smaller, log_p, -torch.inf).max(1)
        both = torch.stack([target.labels("DualFocal"), top.indices], 1)
    of_label, below = log_p.gather(1, both).unbind(1)  # in one, because each lookup costs a pass backwards
    return of_label, torch.where(top.values == -torch.inf, 0.0, below.exp())


def _below_each(log_p: Tensor) -> Tensor:
    """The same for every class, by sorting."""
    rows = log_p.movedim(1, -1).contiguous()
    with torch.no_grad():
        ascending, order = rows.sort(-1)
        position = torch.searchsorted(ascending, rows)  # number of strictly smaller ones
        which = order.gather(-1, (position - 1).clamp(min=0))
    return torch.where(position == 0, 0.0, rows.gather(-1, which).exp()).movedim(-1, 1)


class DualFocal(SampleCriterion):
    r"""Dual focal loss: a label counts less only when it is clear of the next smaller probability.

    .. math:: -(1 - p_y + p_j)^\gamma \log p_y, \qquad p_j = \max \{p_k : p_k < p_y\}

    Focal loss makes models under-confident when :math:`\gamma` is large; the gap to the runner-up tempers that. For a
    wrong prediction :math:`p_j` is the class just below the label, not the predicted one. Equal probabilities do not
    count as smaller, so :math:`p_j` jumps at a tie. Soft and mixed targets take the mean over their classes.

    Cost: one more pass over the logits than the cross-entropy; soft and mixed targets sort them.

    Args:
        gamma: Exponent, which the paper tunes for each data set; 5 is about its value for CIFAR. 0 is the
            cross-entropy.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` (the authors') or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If ``gamma`` is negative, or for an argument that every criterion refuses.

    References:
        Tao et al., Dual Focal Loss for Calibration, arXiv:2305.13665. The default of their code is ``gamma=0``, plain
        cross-entropy.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import DualFocal
        >>> DualFocal(gamma=2.0)(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.0124)
    """

    def __init__(
        self,
        *,
        gamma: float = 5.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_non_negative("gamma", gamma)
        self.gamma = gamma

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return dual_focal_loss(logits, target, gamma=self.gamma)

    @override
    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, reduction={self.reduction!r}"
