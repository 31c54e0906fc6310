# SPDX-License-Identifier: Apache-2.0
"""Negative flips: samples that an earlier model classified correctly and its successor does not."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

__all__ = ["FlipCounts", "NegativeFlipRate", "RelativeNegativeFlipRate"]


class FlipCounts(Metric):
    """Base of the negative-flip rates: counts which of two models is right about how many samples.

    The state is four integers, which processes add up. All subclasses share one state in a
    `torchmetrics.MetricCollection`.

    Args:
        **kwargs: Options of `torchmetrics.Metric`, such as ``process_group`` or ``compute_on_cpu``.
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    flip_counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("flip_counts", default=torch.zeros(4, dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, predictions: Tensor, old_predictions: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: Logits ``[B, C]`` of the new model, or its classes ``[B]`` (integers).
            old_predictions: Logits ``[B, K]`` of the earlier model, or its classes ``[B]``. Logits may have fewer
                classes, the first of the new model's; of other classes give integers.
            labels: Class indices ``[B]``.

        Raises:
            ValueError: If a shape or type is not the expected one.
        """
        old = _right("old_predictions", old_predictions, labels)
        new = _right("predictions", predictions, labels)
        counts = torch.stack([torch.ones_like(old), old, new, old & ~new])
        self.flip_counts = self.flip_counts + counts.sum(1)

    def rates(self) -> Tensor:
        """Shares of the samples in float64: where the earlier model is right, the new one is, a negative flip; ``[3]``.

        NaN if there was no sample.
        """
        counts = self.flip_counts.double()
        return counts[1:] / counts[0]


class NegativeFlipRate(FlipCounts):
    r"""Share of the samples that the earlier model classified correctly and the new one does not.

    .. math:: \text{NFR} = \frac1N \sum_i \mathbb{1}[\hat y^{old}_i = y_i \wedge \hat y^{new}_i \ne y_i]

    A model may be better on average and still break what worked. ``compute`` returns a float64 scalar, NaN if there was
    no sample.

    Cost: an arg-max per model; constant memory; nothing waits for the device.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        ``update(predictions, old_predictions, labels)`` with logits ``[B, C]`` or classes ``[B]``, and ``[B]``.

    Raises:
        ValueError: In ``update`` for wrong shapes or types.

    References:
        Yan et al., Positive-Congruent Training, arXiv:2011.09161.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import NegativeFlipRate
        >>> metric = NegativeFlipRate()
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), labels=torch.tensor([0, 0, 0, 0]))
        >>> metric.compute().item()
        0.25
    """

    @override
    def compute(self) -> Tensor:
        """The rate over all samples seen."""
        return self.rates()[2]


class RelativeNegativeFlipRate(FlipCounts):
    r"""Negative flip rate over that of two models that make their mistakes independently.

    .. math:: \frac{\text{NFR}}{\text{accuracy}_{old}\,(1 - \text{accuracy}_{new})}

    Unlike the rate itself it does not fall with the number of mistakes: 1 means that the new model's mistakes know
    nothing of what the earlier one got right. ``compute`` returns a float64 scalar; NaN if there was no sample, the
    earlier model was never right, or the new one always.

    Cost: as `NegativeFlipRate`.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        As `NegativeFlipRate`.

    References:
        Yan et al., Positive-Congruent Training, arXiv:2011.09161.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import RelativeNegativeFlipRate
        >>> metric = RelativeNegativeFlipRate()
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), labels=torch.tensor([0, 0, 0, 0]))
        >>> metric.compute().item()
        1.0
    """

    @override
    def compute(self) -> Tensor:
        """The ratio for all samples seen."""
        rates = self.rates()
        return rates[2] / (rates[0] * (1 - rates[1]))


def _right(name: str, predictions: Tensor, labels: Tensor) -> Tensor:
    logits = predictions.is_floating_point()
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"Expected `labels` to be class indices [B] but got {labels.dtype} {list(labels.shape)}.")
    if predictions.ndim != (2 if logits else 1) or len(predictions) != len(labels):
        raise ValueError(
            f"Expected `{name}` to be logits [{len(labels)}, C] or classes [{len(labels)}] but got "
            f"{predictions.dtype} {list(predictions.shape)}."
        )
    return (predictions.argmax(1) if logits else predictions) == labels
