# SPDX-License-Identifier: Apache-2.0
"""Generalised cross-entropy, between cross-entropy and mean absolute error."""

import math

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_positive
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["GCE", "check_min_probability", "check_q", "gce_loss", "gce_of", "power_minus_one"]


def gce_loss(
    logits: Tensor, target: Tensor | MixedTarget | Target, *, q: float = 0.7, min_probability: float = 0.0
) -> Tensor:
    r"""Generalised cross-entropy of each sample, :math:`(1 - p_y^q) / q`.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        q: In (0, 1]; towards 0 the cross-entropy, at 1 the mean absolute error.
        min_probability: Floor of :math:`p_y`; there is no gradient below it.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Zhang & Sabuncu, arXiv:1805.07836.

    Example:
        >>> import torch
        >>> gce_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.1215])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return Target.of(log_p, target).expected(log_p, lambda picked: gce_of(picked, q, min_probability))


def gce_of(log_p: Tensor, q: float, min_probability: float = 0.0) -> Tensor:
    """Generalised cross-entropy as a function of the logarithm of the probability.

    Args:
        log_p: Logarithms of probabilities.
        q: In (0, 1].
        min_probability: Floor of the probabilities.

    Example:
        >>> import torch
        >>> gce_of(torch.tensor([0.25]).log(), 1.0)
        tensor([0.7500])
    """
    return power_minus_one(log_p, q, min_probability) / -q


def power_minus_one(log_p: Tensor, q: float, min_probability: float = 0.0) -> Tensor:
    """``p ** q - 1``, exact where p is close to one.

    Args:
        log_p: Logarithms of probabilities.
        q: In (0, 1].
        min_probability: Floor of the probabilities.

    Example:
        >>> import torch
        >>> power_minus_one(torch.tensor([0.25]).log(), 0.5)
        tensor([-0.5000])
    """
    floored = log_p.clamp(min=math.log(min_probability)) if min_probability > 0 else log_p
    return (q * floored).expm1()


class GCE(SampleCriterion):
    r"""Generalised cross-entropy: bounded, so that a wrong label pulls less the more the model doubts it.

    .. math:: (1 - p_y^q) / q

    Soft and mixed targets take the mean over their classes, :math:`\sum_k t_k\, \ell(z, k)`.

    Cost: that of the cross-entropy.

    Args:
        q: In (0, 1]; towards 0 the cross-entropy, which learns fast, at 1 the mean absolute error, which stands noise.
        min_probability: Floor of :math:`p_y`, without gradient below it; 1e-7 reproduces the code of Ma et al. The
            formula needs none.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If ``q`` or ``min_probability`` is out of range, or for an argument that every criterion refuses.

    References:
        Zhang & Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels,
        arXiv:1805.07836. Ma et al., arXiv:2006.13554.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import GCE
        >>> GCE()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1215)
    """

    def __init__(
        self,
        *,
        q: float = 0.7,
        min_probability: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_q(q)
        check_min_probability(min_probability)
        self.q = q
        self.min_probability = min_probability

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return gce_loss(logits, target, q=self.q, min_probability=self.min_probability)

    @override
    def extra_repr(self) -> str:
        return f"q={self.q}, min_probability={self.min_probability}, reduction={self.reduction!r}"


def check_q(q: float) -> None:
    """Raise ``ValueError`` unless ``q`` is above zero and at most one."""
    check_positive("q", q)
    check_in_range("q", q, 0, 1)


def check_min_probability(value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a probability."""
    check_in_range("min_probability", value, 0, 1)
