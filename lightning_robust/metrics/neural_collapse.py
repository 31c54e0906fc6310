# SPDX-License-Identifier: Apache-2.0
"""Neural collapse: how close features are to one point per class, and these points to a simplex."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.metrics.feature_sums import FeatureAccumulator, FeatureSums, GlobalMean
from lightning_robust.metrics.simplex import equiangularity, equinorm, row_blocks, simplex_error

__all__ = [
    "Collapse",
    "NeuralCollapse",
    "centred_means",
    "class_distance_variance",
    "nearest_mean_disagreement",
    "within_class_variability",
]


def centred_means(sums: FeatureSums, *, center: GlobalMean = "classes") -> Tensor:
    """Class means minus the global mean, ``[C', D]``, for the classes that have samples.

    Args:
        sums: sums over the samples.
        center: global mean: of the class means, or of the samples.
    """
    return sums.means - sums.global_mean(center)


def within_class_variability(
    sums: FeatureSums, *, method: Literal["pinv", "trace"] = "pinv", center: GlobalMean = "classes"
) -> Tensor:
    r"""NC1, the spread inside the classes relative to that of the class means: 0 for collapsed features.

    .. math:: \frac1C \operatorname{tr}(S_W S_B^+) \quad\text{or}\quad
              \frac{\operatorname{tr} S_W}{\operatorname{tr} S_B}, \qquad
              S_W = \frac1N \sum_i (h_i-\mu_{y_i})(h_i-\mu_{y_i})^\top, \quad
              S_B = \frac1C \sum_c (\mu_c-\mu_G)(\mu_c-\mu_G)^\top

    The pseudo-inverse is applied in the space of the centred class means, so nothing larger than ``C x D`` is
    decomposed.

    Args:
        sums: sums over the samples.
        method: ``"pinv"`` needs the outer products, ``"trace"`` does not.
        center: global mean: of the class means, or of the samples.

    Raises:
        ValueError: ``"pinv"`` without outer products.

    References:
        Papyan et al., arXiv:2008.08186, whose notebook leaves out :math:`1/C`. The quotient of traces: Tirer et al.,
        ICML 2023.

    Example:
        >>> from lightning_robust.metrics import feature_sums
        >>> h = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> sums = feature_sums(h, torch.tensor([0, 0, 1, 1]), 2)
        >>> within_class_variability(sums).item(), within_class_variability(sums, method="trace").item()
        (0.0, 1.0)
    """
    check_choice("method", method, ("pinv", "trace"))
    means, n = centred_means(sums, center=center), sums.counts.sum()
    if method == "trace":
        spread = (sums.counts[sums.present] * sums.variances).sum() / n
        return spread / (means.square().sum() / len(means))
    if sums.outer is None:
        raise ValueError('method="pinv" needs the outer products: sum with covariance=True, or use method="trace".')
    if len(means) < 2 or not sums.finite():
        return torch.full_like(sums.squares[0], torch.nan)
    _, singular, basis = torch.linalg.svd(means, full_matrices=False)
    eigenvalues = singular.square() / len(means)
    usable = eigenvalues > eigenvalues[0] * max(means.shape) * torch.finfo(means.dtype).eps
    usable[len(means) - 1 :] = False  # centred vectors span at most one dimension less than their number
    share = sums.counts[sums.present].double() / n
    projected = sums.means @ basis.T  # [C', R]
    second = ((basis @ sums.outer) * basis).sum(1) / n
    within = (second - share @ projected.square()).clamp(min=0)
    return torch.where(usable, within / eigenvalues, 0.0).sum() / len(means)


def class_distance_variance(sums: FeatureSums) -> Tensor:
    r"""CDNV, the mean of :math:`(v_i + v_j) / (2 \lVert\mu_i-\mu_j\rVert^2)` over pairs of classes.

    Args:
        sums: sums over the samples.

    References:
        Galanti et al., arXiv:2112.15121.
    """
    means, v = sums.means, sums.variances
    count = len(means)
    total = means.new_zeros(())
    for rows in row_blocks(count):
        ratio = (v[rows].unsqueeze(1) + v) / (
            2 * torch.cdist(means[rows], means, compute_mode="donot_use_mm_for_euclid_dist").square()
        )
        ratio[torch.arange(len(ratio)), torch.arange(count)[rows]] = 0
        total = total + ratio.sum()
    return total / (count * (count - 1)) if count > 1 else torch.full_like(total, torch.nan)


def nearest_mean_disagreement(features: Tensor, predicted: Tensor, means: Tensor) -> Tensor:
    """NC4: for how many samples the nearest class mean is another class than the predicted one; a sum, not a share.

    Args:
        features: features.
        predicted: classes that the network predicts, as rows of ``means``.
        means: class means, not centred.

    Shape:
        ``[B, D]``, ``[B]`` and ``[C, D]`` -> int64 scalar.
    """
    # |h - m|^2 without |h|^2, which is the same for all classes
    distance = means.square().sum(1) - 2 * features.to(means.dtype) @ means.T
    return (distance.argmin(1) != predicted).sum()


class Collapse(NamedTuple):
    """What is known of neural collapse from features and labels; all are 0 in full collapse.

    Args:
        nc1: within-class variability with the pseudo-inverse.
        nc1_trace: the quotient of traces.
        nc2: distance of the centred class means from a simplex.
        nc2_norms: relative spread of their lengths.
        nc2_angles: mean deviation of their angles.
        cdnv: class-distance normalised variance.
    """

    nc1: Tensor
    nc1_trace: Tensor
    nc2: Tensor
    nc2_norms: Tensor
    nc2_angles: Tensor
    cdnv: Tensor


class NeuralCollapse(FeatureAccumulator):
    """Neural collapse NC1 and NC2 and the class-distance normalised variance, as a streaming metric.

    ``compute`` returns a `Collapse`. NC3 compares with a classifier and NC4 needs each sample again once the means are
    known: :func:`self_duality` and :func:`nearest_mean_disagreement`, which `FeatureMonitor` evaluates. The first pass
    is the only one: the covariance within classes follows from the sum of outer products. Classes without a sample are
    left out.

    Cost: ``B D^2`` multiplications in float64 per batch, ``(2 C D + D^2) * 8`` bytes; ``compute`` decomposes a
    ``C x D`` matrix.

    Args:
        num_classes: number of classes.
        num_features: number of features of a sample.
        center: global mean: of the class means, or of the samples.
        **kwargs: options of `torchmetrics.Metric`.

    Shape:
        ``update(features, labels)`` with ``[B, D]`` and ``[B]``.

    Raises:
        ValueError: in ``update``, for wrong shapes or (on the CPU) labels out of range.

    References:
        Papyan et al., arXiv:2008.08186; Galanti et al., arXiv:2112.15121.

    Example:
        >>> metric = NeuralCollapse(num_classes=3, num_features=3)
        >>> metric.update(torch.eye(3).repeat(4, 1), torch.arange(12) % 3)
        >>> [round(abs(value), 6) for value in map(float, metric.compute())]
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, *, num_classes: int, num_features: int, center: GlobalMean = "classes", **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, num_features=num_features, **kwargs)
        check_choice("center", center, ("classes", "samples"))
        self.center: GlobalMean = center

    @override
    def compute(self) -> Collapse:
        """The numbers for all samples seen."""
        return collapse_of(self.total, center=self.center)


def collapse_of(sums: FeatureSums, *, center: GlobalMean = "classes") -> Collapse:
    """All numbers that the sums alone give; NC1 with the pseudo-inverse is NaN without outer products.

    Args:
        sums: sums over the samples.
        center: global mean: of the class means, or of the samples.
    """
    means = centred_means(sums, center=center)
    unknown = torch.full_like(sums.squares[0], torch.nan)
    return Collapse(
        nc1=unknown if sums.outer is None else within_class_variability(sums, center=center),
        nc1_trace=within_class_variability(sums, method="trace", center=center),
        nc2=simplex_error(means),
        nc2_norms=equinorm(means),
        nc2_angles=equiangularity(means),
        cdnv=class_distance_variance(sums),
    )
