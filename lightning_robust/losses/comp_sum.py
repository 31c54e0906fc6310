# SPDX-License-Identifier: Apache-2.0
"""Comp-sum losses: one parameter from the sum-exponential loss over the cross-entropy to the mean absolute error."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["CompSum", "comp_sum_loss"]


def comp_sum_loss(logits: Tensor, target: Tensor | MixedTarget | Target, *, tau: float = 1.0) -> Tensor:
    r"""Comp-sum loss of each sample, :math:`(p_y^{\tau - 1} - 1) / (1 - \tau)`, or :math:`-\log p_y` at 1.

    For ``tau < 1`` it grows like the exponential of the margin. Where that reaches the square root of the largest
    number (:math:`(1 - \tau)(-\log p_y) > 44` in float32, 355 in float64) it goes on as its tangent and stays finite.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        tau: Member of the family, at least 0.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Mao et al., arXiv:2304.07288.

    Example:
        >>> comp_sum_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), tau=2.0)
        tensor([0.1192])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return Target.of(log_p, target).expected(log_p, lambda picked: _comp_sum(picked, tau))


def _comp_sum(log_p: Tensor, tau: float) -> Tensor:
    if tau == 1:
        return -log_p
    exponent = (tau - 1) * log_p
    if tau > 1:
        return exponent.expm1() / (1 - tau)
    inside = exponent.clamp(max=math.log(torch.finfo(log_p.dtype).max) / 2)
    return (inside.expm1() + (exponent - inside) * inside.exp()) / (1 - tau)


class CompSum(SampleCriterion):
    r"""Comp-sum losses, the family of the cross-entropy: :math:`\tau` sets how much hard samples count.

    .. math:: \ell_\tau = \begin{cases} -\log p_y & \tau = 1 \\
              \big(p_y^{\tau - 1} - 1\big) / (1 - \tau) & \text{otherwise} \end{cases}

    ``tau=0`` is the sum-exponential loss, 1 the cross-entropy, 1 to 2 the generalised cross-entropy with
    :math:`q = \tau - 1`, 2 the mean absolute error. Below 1 a confident mistake weighs exponentially, so clip the
    gradient; before the loss would overflow it goes on as its tangent (see :func:`comp_sum_loss`). Soft and mixed
    targets take the mean over their classes.

    Cost: that of the cross-entropy.

    Args:
        tau: Member of the family, at least 0.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If ``tau`` is negative, or for an argument that every criterion refuses.

    References:
        Mao et al., Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv:2304.07288. No official
        code is known; this is the formula of the paper, without its adversarial term.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CompSum
        >>> CompSum(tau=2.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1192)
    """

    def __init__(
        self,
        *,
        tau: float = 1.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_non_negative("tau", tau)
        self.tau = tau

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return comp_sum_loss(logits, target, tau=self.tau)

    @override
    def extra_repr(self) -> str:
        return f"tau={self.tau}, reduction={self.reduction!r}"
