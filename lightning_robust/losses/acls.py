# SPDX-License-Identifier: Apache-2.0
"""ACLS: squared hinges on the largest logit and on the gaps of the others to it."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.logit_penalty import logit_norm_penalty
from lightning_robust.losses.precision import full_precision
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["ACLS", "acls_penalty"]


def acls_penalty(
    logits: Tensor, *, margin: float = 10.0, positive_weight: float = 1.0, negative_weight: float = 0.1
) -> Tensor:
    r"""The penalty of :class:`ACLS` of each sample.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        margin: Largest logit, and largest gap to it, that costs nothing.
        positive_weight: Weight of the part on the largest logit.
        negative_weight: Weight of the part on the other logits.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Raises:
        ValueError: If there is one class only.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import acls_penalty
        >>> acls_penalty(torch.tensor([[5.0, 0.0, 0.0]]), margin=3.0)
        tensor([4.4000])
    """
    logits = full_precision(logits)
    if logits.shape[1] < 2:
        raise ValueError(f"Expected `logits` to have at least 2 classes but got shape {tuple(logits.shape)}.")
    top = logits.max(1, keepdim=True).values
    ties = (logits == top).sum(1)
    positive = ties * (top.squeeze(1) - margin).relu().square()
    negative = 2 * logit_norm_penalty((top.detach() - margin - logits).relu_()) / (logits.shape[1] - 1)
    return positive_weight * positive + negative_weight * negative


class ACLS(LogitRegularizer):
    r"""Adaptive and conditional label smoothing: adds :math:`\alpha\,\mathrm{mean}(r(z))` to any criterion.

    .. math:: r(z) = \lambda_1 \max(0, z_{max} - m)^2
              + \frac{\lambda_2}{C-1}\sum_{k \ne max}\max(0, \bar z_{max} - z_k - m)^2

    with :math:`\bar z_{max}` the largest logit without gradient. The first part lowers a large logit, the second one
    raises the others, each in proportion to the excess over the margin; below the margin nothing happens. The first
    part looks at the logit itself and not at a gap, so the penalty changes when a constant is added to all logits.

    Cost: about 2.5 cross-entropies on a CPU; the largest logit and the excess of every class over it.

    Args:
        alpha: Factor of the penalty.
        margin: Margin :math:`m`; 10 is the value for Tiny ImageNet.
        positive_weight: Weight :math:`\lambda_1` of the part on the largest logit.
        negative_weight: Weight :math:`\lambda_2` of the part on the other logits.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` with ``C >= 2`` give a scalar.

    Raises:
        ValueError: If ``alpha`` is not finite, or one of the others is negative.

    References:
        Park et al., arXiv:2308.11911, as in the published code: at a tie for the largest logit the first part counts
        once per tied logit, and its gradient goes to one of them. That code applies the penalty to ignored samples
        unless its ``ignore_index`` is set to zero or above; here ignored samples never count.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import ACLS
        >>> ACLS(alpha=0.1, margin=3.0)(torch.tensor([[5.0, 0.0, 0.0]]))
        tensor(0.4400)
    """

    name: ClassVar[str] = "acls"
    coefficient_name: ClassVar[str] = "alpha"

    def __init__(
        self,
        *,
        alpha: float | Schedule = 0.1,
        margin: float = 10.0,
        positive_weight: float = 1.0,
        negative_weight: float = 0.1,
    ) -> None:
        super().__init__(coefficient=alpha)
        check_non_negative("margin", margin)
        check_non_negative("positive_weight", positive_weight)
        check_non_negative("negative_weight", negative_weight)
        self.margin = margin
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight

    @override
    def penalty(self, logits: Tensor) -> Tensor:
        return acls_penalty(
            logits,
            margin=self.margin,
            positive_weight=self.positive_weight,
            negative_weight=self.negative_weight,
        )

    @override
    def extra_repr(self) -> str:
        weights = f"positive_weight={self.positive_weight}, negative_weight={self.negative_weight}"
        return f"{super().extra_repr()}, margin={self.margin}, {weights}"
