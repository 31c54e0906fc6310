# SPDX-License-Identifier: Apache-2.0
"""How far samples of one class and classes from each other are spread, measured by angles between features."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.metrics.feature_sums import FeatureAccumulator, FeatureSums

__all__ = ["ClassSeparation", "Separation", "class_separation"]


class Separation(NamedTuple):
    """Spread of features by cosine distance.

    Args:
        d_within: mean distance of two samples of one class; higher means more variation inside the classes.
        d_total: mean distance of two samples of any classes, each class with the same weight.
        r2: ``1 - d_within / d_total``, the share of the spread that the class explains.
        d_within_per_class: the distance in each class, ``[C]``; NaN for a class without samples.
    """

    d_within: Tensor
    d_total: Tensor
    r2: Tensor
    d_within_per_class: Tensor


def class_separation(sums: FeatureSums) -> Separation:
    r"""Cosine distances within classes and among all classes, in linear time.

    .. math:: d_\text{within} = \frac1C \sum_k \frac1{N_k^2} \sum_{m,n} \big(1 - \cos(h_{km}, h_{kn})\big)
                              = 1 - \frac1C \sum_k \lVert \bar m_k\rVert^2, \qquad
              d_\text{total} = \frac1{C^2} \sum_{j,k} \frac1{N_j N_k} \sum_{m,n} \big(1 - \cos(h_{jm}, h_{kn})\big)
                             = 1 - \Big\lVert \frac1C \sum_k \bar m_k\Big\rVert^2

    with the mean :math:`\bar m_k` of the features of class :math:`k` after each was scaled to length 1. Pairs of a
    sample with itself count. A zero feature has no direction; its cosine with anything is taken as 0.

    Args:
        sums: sums over the samples.

    Returns:
        The distances and ``r2 = 1 - d_within / d_total``; NaN without samples, or where all features agree.

    References:
        Kornblith et al., arXiv:2010.16402; adopted by Zhou et al. (MaxSup), arXiv:2502.15798.

    Example:
        >>> from lightning_robust.metrics import feature_sums
        >>> h = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
        >>> spread = class_separation(feature_sums(h, torch.tensor([0, 0, 1, 1]), 2))
        >>> spread.d_within.item(), spread.d_total.item(), spread.r2.item()
        (0.0, 0.5, 1.0)
    """
    kept = sums.present
    means = sums.directions[kept] / sums.counts[kept].unsqueeze(1)
    within = 1 - means.square().sum(1)
    total = 1 - means.mean(0).square().sum()
    per_class = torch.full_like(sums.squares, torch.nan).masked_scatter(kept, within)
    return Separation(within.mean(), total, 1 - within.mean() / total, per_class)


class ClassSeparation(FeatureAccumulator):
    """The spread within classes and the separability of classes that the MaxSup paper reports, as a streaming metric.

    ``compute`` returns a `Separation`; see :func:`class_separation` for the formula.

    Cost: per sample one scaling of its features; ``2 C D * 8`` bytes.

    Args:
        num_classes: number of classes.
        num_features: number of features of a sample.
        **kwargs: options of `torchmetrics.Metric`.

    Shape:
        ``update(features, labels)`` with ``[B, D]`` and ``[B]``.

    Raises:
        ValueError: in ``update``, for wrong shapes or (on the CPU) labels out of range.

    References:
        Kornblith et al., arXiv:2010.16402; Zhou et al., arXiv:2502.15798.

    Example:
        >>> metric = ClassSeparation(num_classes=2, num_features=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0, 1]))
        >>> metric.compute().d_within_per_class.tolist()
        [0.5, 0.0]
    """

    def __init__(self, *, num_classes: int, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, num_features=num_features, covariance=False, **kwargs)

    @override
    def compute(self) -> Separation:
        """The distances of all samples seen."""
        return class_separation(self.total)
