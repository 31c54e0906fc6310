# SPDX-License-Identifier: Apache-2.0
"""One streaming pass over features and labels: the sums from which separation and collapse of the classes follow."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_robust.checks import check_integer

__all__ = ["FeatureAccumulator", "FeatureSums", "GlobalMean", "feature_sums"]

GlobalMean = Literal["classes", "samples"]


class FeatureSums(NamedTuple):
    r"""Sums over features :math:`h` of samples with class labels; those of several batches or processes are added.

    The properties leave out classes without a sample; :math:`C'` classes are left.

    Args:
        counts: number of samples per class, int64 ``[C]``.
        sums: :math:`\sum h` per class, float64 ``[C, D]``.
        directions: :math:`\sum h/\lVert h\rVert` per class, float64 ``[C, D]``; a zero feature adds zero.
        squares: :math:`\sum\lVert h\rVert^2` per class, float64 ``[C]``.
        outer: :math:`\sum h h^\top` over all samples, float64 ``[D, D]``; ``None`` if it was not wanted.

    Example:
        >>> sums = feature_sums(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]), 3)
        >>> sums.counts.tolist(), sums.means.tolist()
        ([2, 1, 0], [[2.0, 0.0], [0.0, 2.0]])
    """

    counts: Tensor
    sums: Tensor
    directions: Tensor
    squares: Tensor
    outer: Tensor | None

    @property
    def present(self) -> Tensor:
        """Which classes have samples, bool ``[C]``."""
        return self.counts > 0

    @property
    def means(self) -> Tensor:
        """Mean feature of each class that has samples, ``[C', D]``."""
        kept = self.present
        return self.sums[kept] / self.counts[kept].unsqueeze(1)

    @property
    def variances(self) -> Tensor:
        r"""Mean of :math:`\lVert h-\mu_c\rVert^2` in each class that has samples, ``[C']``."""
        kept = self.present
        return (self.squares[kept] / self.counts[kept] - self.means.square().sum(1)).clamp(min=0)

    def global_mean(self, of: GlobalMean = "classes") -> Tensor:
        """Mean ``[D]`` of the class means, or of the samples; the same if all classes are equally frequent.

        Args:
            of: ``"classes"`` or ``"samples"``.
        """
        return self.means.mean(0) if of == "classes" else self.sums.sum(0) / self.counts.sum()

    def finite(self) -> bool:
        """Whether no feature was NaN or infinite; waits for the device."""
        return bool(self.squares.isfinite().all())


@torch.no_grad()
def feature_sums(features: Tensor, labels: Tensor, num_classes: int, *, covariance: bool = True) -> FeatureSums:
    """Sum one batch in float64, whatever the dtype of the features.

    Cost: ``B D (D + 2)`` multiplications without waiting for the device; ``2 B D`` without ``covariance``. On devices
    that have no float64 (MPS) the sums are on the CPU.

    Args:
        features: features.
        labels: class indices; samples with a negative one (ignored) are left out.
        num_classes: number of classes.
        covariance: whether to sum the outer products, a ``D x D`` matrix.

    Shape:
        ``features`` ``[B, D]``, ``labels`` ``[B]``.

    Raises:
        ValueError: a shape or dtype is not the expected one, or a label on the CPU is ``num_classes`` or more.
    """
    _check_inputs(features, labels, num_classes)
    if features.device.type == "mps":
        features, labels = features.cpu(), labels.cpu()
    h, kept = features.double(), labels >= 0
    row = torch.where(kept, labels, num_classes)  # one more row, for the ignored ones

    def per_class(values: Tensor) -> Tensor:
        return values.new_zeros(num_classes + 1, *values.shape[1:]).index_add_(0, row, values)[:-1]

    weighted = torch.where(kept.unsqueeze(1), h, 0.0)
    return FeatureSums(
        counts=per_class(kept.long()),
        sums=per_class(h),
        directions=per_class(torch.nn.functional.normalize(h, dim=1)),
        squares=per_class(h.square().sum(1)),
        outer=weighted.T @ weighted if covariance else None,
    )


def _check_inputs(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"Expected `features` to be a floating point tensor [B, D] but got {features.dtype} {list(features.shape)}."
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"Expected `labels` to be class indices [B] with B = {len(features)} but got {labels.dtype} "
            f"{list(labels.shape)}; class probabilities (of mixed samples, say) name no class."
        )
    # on an accelerator the check would wait for the device
    if labels.device.type == "cpu" and labels.numel() > 0 and int(labels.max()) >= num_classes:
        raise ValueError(f"Expected `labels` below {num_classes}, the number of classes, but got {int(labels.max())}.")


class FeatureAccumulator(Metric):
    """Base of the metrics of labelled features: its states are sums, so any sharding of the samples gives the same.

    Cost: ``(2 C D + D^2) * 8`` bytes, reduced once per ``compute``; see :func:`feature_sums`.

    Args:
        num_classes: number of classes.
        num_features: number of features of a sample.
        covariance: whether to sum the outer products, a ``D x D`` matrix.
        **kwargs: options of `torchmetrics.Metric`, such as ``process_group``.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    counts: Tensor
    sums: Tensor
    directions: Tensor
    squares: Tensor
    outer: Tensor

    def __init__(self, *, num_classes: int, num_features: int, covariance: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("num_classes", num_classes, 2)
        check_integer("num_features", num_features, 1)
        self.num_classes = num_classes
        self.num_features = num_features
        self.covariance = covariance
        c, d = num_classes, num_features
        shapes = {"sums": (c, d), "directions": (c, d), "squares": (c,), **({"outer": (d, d)} if covariance else {})}
        self.add_state("counts", torch.zeros(c, dtype=torch.int64), dist_reduce_fx="sum")
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def total(self) -> FeatureSums:
        """The sums of this process; inside ``compute`` those of all."""
        return FeatureSums(
            self.counts, self.sums, self.directions, self.squares, self.outer if self.covariance else None
        )

    @override
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: features ``[B, D]``.
            labels: class indices ``[B]``; samples with a negative one are left out.
        """
        if features.ndim == 2 and features.shape[1] != self.num_features:
            raise ValueError(f"Expected {self.num_features} features per sample but got {features.shape[1]}.")
        batch = feature_sums(features, labels, self.num_classes, covariance=self.covariance)
        # Not in place: a state that was reset in inference mode could not be changed outside of it.
        for name, value in batch._asdict().items():
            if value is not None:
                setattr(self, name, getattr(self, name) + value)

    @override
    def compute(self) -> Any:
        """What the subclass makes of the sums."""
        return self.total

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Do nothing: the sums are float64 in every precision.

        Args:
            dst_type: ignored.
        """
        return self
