# SPDX-License-Identifier: Apache-2.0
"""Brier score as a training loss."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import full_precision
from lightning_robust.losses.target import MixedTarget, Target

__all__ = ["Brier", "brier_loss"]


def brier_loss(logits: Tensor, target: Tensor | MixedTarget | Target) -> Tensor:
    r"""Squared distance of the predicted probabilities from the target, :math:`\lVert p - t\rVert^2`, of each sample.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import brier_loss
        >>> brier_loss(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.7500])
    """
    logits = full_precision(logits)
    target = Target.of(logits, target)
    p = logits.softmax(1)
    if target.soft:
        return target.weighted((p - target.probabilities(logits)).square().sum(1))
    # The same without a one-hot copy of the logits.
    return target.weighted(torch.linalg.vector_norm(p, dim=1).square() - 2 * target.pick(p) + 1)


class Brier(SampleCriterion):
    r"""Brier score, :math:`\frac{1}{N}\sum_n \lVert p_n - t_n\rVert^2`, in [0, 2].

    A proper scoring rule, hence a calibrated alternative to the cross-entropy; bounded, so a mislabelled sample costs
    little, but its gradient also vanishes on samples that are confidently wrong.

    Cost: one pass over the logits more than the cross-entropy.

    Args:
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        As :class:`~lightning_robust.losses.SampleCriterion`.

    References:
        Brier, 1950, "Verification of forecasts expressed in terms of probability". The sum runs over all classes, as
        in :class:`~lightning_robust.metrics.BrierScore`.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import Brier
        >>> Brier()(torch.zeros(2, 4), torch.tensor([2, 0]))
        tensor(0.7500)
    """

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return brier_loss(logits, target)
