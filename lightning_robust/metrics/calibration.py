# SPDX-License-Identifier: Apache-2.0
"""Calibration error, Brier score, negative log-likelihood and the reliability table as streaming metrics."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.metrics.accumulator import CalibrationAccumulator
from lightning_robust.metrics.reliability import Closed, Norm, ReliabilityTable

__all__ = ["BrierScore", "CalibrationError", "NegativeLogLikelihood", "TopLabelReliability"]


class CalibrationError(CalibrationAccumulator):
    r"""Top-label calibration error with equal-width confidence bins.

    .. math:: \text{ECE} = \sum_b \tfrac{n_b}{N} |\text{conf}_b - \text{acc}_b|, \quad
              \text{MCE} = \max_{b: n_b > 0} |\text{conf}_b - \text{acc}_b|, \quad
              \text{RMS} = \Big(\sum_b \tfrac{n_b}{N} (\text{conf}_b - \text{acc}_b)^2\Big)^{1/2}

    A confidence of exactly 1 belongs to the last bin and 0 to the first one. Equals
    `torchmetrics.classification.MulticlassCalibrationError` on softmax outputs when ``closed="left"`` and no
    confidence is exactly 1 (torchmetrics puts those into a bin of their own). ``compute`` returns a float64 scalar,
    NaN if there was no sample.

    Cost: one softmax and one row maximum per batch; constant memory; nothing waits for the device until ``compute``,
    so prefer ``update`` to calling the metric, which computes a value per batch.

    Args:
        n_bins: Number of confidence bins of equal width.
        norm: ``"l1"`` for the expected (ECE), ``"max"`` for the maximum (MCE), ``"l2"`` for the root mean square error.
        closed: Which edge belongs to a bin: ``"right"`` for (lower, upper] as in the paper, ``"left"`` for
            [lower, upper) as in torchmetrics.
        from_logits: Whether ``update`` gets logits (default) or probabilities; never guessed from the values.
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        ``update(logits, labels)`` with ``[B, C]`` and ``[B]``.

    Raises:
        ValueError: In ``update`` for wrong shapes or (on the CPU) labels out of range, in ``compute`` if rows were NaN.

    References:
        Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599; their code drops a confidence of 0.

    Example:
        >>> import torch
        >>> metric = CalibrationError(n_bins=10)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> round(metric.compute().item(), 4)
        0.4469
    """

    def __init__(
        self,
        *,
        n_bins: int = 15,
        norm: Norm = "l1",
        closed: Closed = "right",
        from_logits: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_bins=n_bins, closed=closed, from_logits=from_logits, **kwargs)
        check_choice("norm", norm, ("l1", "l2", "max"))
        self.norm: Norm = norm

    @override
    def compute(self) -> Tensor:
        """The calibration error of all samples seen."""
        return self.table().error(self.norm)


class BrierScore(CalibrationAccumulator):
    r"""Multiclass Brier score, :math:`\frac{1}{N} \sum_i \sum_j (p_{ij} - 1\{y_i = j\})^2`, in [0, 2].

    Some papers divide by the number of classes, and binary libraries count one class only; this is the full sum.
    ``n_bins`` and ``closed`` do not change the value: they let the metric share its state with the others in a
    `torchmetrics.MetricCollection`. ``compute`` returns a float64 scalar, NaN if there was no sample.

    Cost: as `CalibrationError`.

    Args:
        n_bins: Number of confidence bins of the shared state.
        closed: Which edge belongs to a bin of the shared state.
        from_logits: Whether ``update`` gets logits (default) or probabilities; never guessed from the values.
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        ``update(logits, labels)`` with ``[B, C]`` and ``[B]``.

    Example:
        >>> import torch
        >>> metric = BrierScore(from_logits=False)
        >>> metric.update(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> metric.compute().item()
        1.25
    """

    @override
    def compute(self) -> Tensor:
        """The mean Brier score of all samples seen."""
        return self.table().brier


class NegativeLogLikelihood(CalibrationAccumulator):
    r"""Mean negative log-likelihood, :math:`\frac{1}{N} \sum_i \big(\log \sum_j e^{z_{ij}} - z_{iy_i}\big)`.

    Infinite as soon as one sample has a probability of zero for its label (or more than :math:`2^{32}` nats).
    ``n_bins`` and ``closed`` do not change the value: they let the metric share its state with the others in a
    `torchmetrics.MetricCollection`. ``compute`` returns a float64 scalar, NaN if there was no sample.

    Cost: as `CalibrationError`.

    Args:
        n_bins: Number of confidence bins of the shared state.
        closed: Which edge belongs to a bin of the shared state.
        from_logits: Whether ``update`` gets logits (default) or probabilities; never guessed from the values.
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        ``update(logits, labels)`` with ``[B, C]`` and ``[B]``.

    Example:
        >>> import torch
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> round(metric.compute().item(), 4)
        1.3863
    """

    @override
    def compute(self) -> Tensor:
        """The mean negative log-likelihood of all samples seen."""
        return self.table().nll


class TopLabelReliability(CalibrationAccumulator):
    """The whole bin table: counts, accuracy and confidence per bin, and every calibration number that follows.

    ``compute`` returns a `ReliabilityTable`, whose properties are the gaps per bin, the signed gap (mean confidence
    minus accuracy), over- and under-confidence, Brier score and negative log-likelihood. Feed it to
    `lightning_robust.calibration.reliability_figure` for a diagram.

    Cost: as `CalibrationError`.

    Args:
        n_bins: Number of confidence bins of equal width.
        closed: Which edge belongs to a bin: ``"right"`` for (lower, upper], ``"left"`` for [lower, upper).
        from_logits: Whether ``update`` gets logits (default) or probabilities; never guessed from the values.
        **kwargs: Options of `torchmetrics.Metric`.

    Shape:
        ``update(logits, labels)`` with ``[B, C]`` and ``[B]``; the table has ``[n_bins]`` entries per column.

    Example:
        >>> import torch
        >>> metric = TopLabelReliability(n_bins=2, from_logits=False)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> table = metric.compute()
        >>> table.counts.tolist(), round(table.confidence_gap.item(), 4)
        ([0, 2], 0.25)
    """

    higher_is_better = None

    @override
    def compute(self) -> ReliabilityTable:
        """The bin table of all samples seen."""
        return self.table()
