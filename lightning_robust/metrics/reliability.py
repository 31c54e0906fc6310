# SPDX-License-Identifier: Apache-2.0
"""The bin table behind a reliability diagram, and the numbers that are read off it."""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_robust.checks import check_choice, check_integer

__all__ = ["Closed", "Norm", "ReliabilityTable", "bin_index", "reliability_table"]

Closed = Literal["left", "right"]
Norm = Literal["l1", "l2", "max"]


class ReliabilityTable(NamedTuple):
    r"""Per-bin sums of a classifier's confidences: everything that a reliability diagram shows.

    The bins have equal width; bin :math:`b` of :math:`B` covers the confidences from :math:`b/B` to :math:`(b+1)/B`.
    Per-bin properties are NaN for an empty bin, and scalars are NaN for an empty table.

    Args:
        counts: Number of samples per bin, int64 ``[B]``.
        correct: Number of correctly classified samples per bin, int64 ``[B]``.
        confidence_sum: Sum of the confidences per bin, float64 ``[B]``.
        correct_confidence_sum: The same sum over the correctly classified samples, float64 ``[B]``.
        brier_sum: Sum of the Brier scores per bin, float64 ``[B]``; NaN if only confidences are known.
        nll_sum: Sum of the negative log-likelihoods per bin, float64 ``[B]``; NaN if only confidences are known.

    Example:
        >>> table = reliability_table(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, True]), n_bins=2)
        >>> table.counts.tolist(), table.correct.tolist()
        ([1, 2], [1, 1])
        >>> round(table.error("l1").item(), 4), round(table.confidence_gap.item(), 4)
        (0.4667, 0.0)
    """

    counts: Tensor
    correct: Tensor
    confidence_sum: Tensor
    correct_confidence_sum: Tensor
    brier_sum: Tensor
    nll_sum: Tensor

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return self.counts.numel()

    @property
    def accuracy(self) -> Tensor:
        """Share of correct samples per bin ``[B]``."""
        return self.correct.double() / self.counts

    @property
    def confidence(self) -> Tensor:
        """Mean confidence per bin ``[B]``."""
        return self.confidence_sum / self.counts

    @property
    def gap(self) -> Tensor:
        """Mean confidence minus accuracy per bin ``[B]``; above zero where the classifier is over-confident."""
        return self.confidence - self.accuracy

    @property
    def total(self) -> Tensor:
        """Number of samples."""
        return self.counts.sum()

    @property
    def overall_accuracy(self) -> Tensor:
        """Share of correct samples."""
        return self.correct.sum().double() / self.total

    @property
    def mean_confidence(self) -> Tensor:
        """Mean confidence of all samples."""
        return self.confidence_sum.sum() / self.total

    @property
    def confidence_gap(self) -> Tensor:
        """Mean confidence minus accuracy: above zero is over-confident, below zero under-confident."""
        return self.mean_confidence - self.overall_accuracy

    @property
    def overconfidence(self) -> Tensor:
        """Mean confidence of the wrong answers; NaN if there are none."""
        wrong = self.total - self.correct.sum()
        return (self.confidence_sum.sum() - self.correct_confidence_sum.sum()) / wrong

    @property
    def underconfidence(self) -> Tensor:
        """Mean of one minus the confidence of the right answers; NaN if there are none."""
        return 1 - self.correct_confidence_sum.sum() / self.correct.sum()

    @property
    def brier(self) -> Tensor:
        """Mean Brier score, in [0, 2]."""
        return self.brier_sum.sum() / self.total

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood."""
        return self.nll_sum.sum() / self.total

    def error(self, norm: Norm = "l1") -> Tensor:
        """Calibration error: ``"l1"`` = ECE, ``"max"`` = MCE over the non-empty bins, ``"l2"`` = root mean square."""
        check_choice("norm", norm, ("l1", "l2", "max"))
        gap = torch.where(self.counts > 0, self.gap, 0.0).abs()
        if norm == "max":
            return torch.where(self.total > 0, gap.amax(), torch.nan)
        weight = self.counts.double() / self.total  # two integers would divide to float32
        if norm == "l1":
            return (weight * gap).sum()
        return (weight * gap.square()).sum().sqrt()


def bin_index(confidence: Tensor, n_bins: int, closed: Closed) -> Tensor:
    """Bin of each confidence; 0 belongs to the first bin and 1 to the last one."""
    edges = _interior_edges(n_bins, confidence.dtype, confidence.device)
    return torch.bucketize(confidence, edges, right=closed == "left")


@functools.cache
def _interior_edges(n_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Computed in float64 and then rounded, so that a float32 0.3 equals the edge 3/10 (float32 arithmetic is off).
    return (torch.arange(1, n_bins, dtype=torch.float64, device="cpu") * (1 / n_bins)).to(dtype).to(device)


def reliability_table(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 15, closed: Closed = "right"
) -> ReliabilityTable:
    """Bin confidences and correctness that are already at hand; for logits see `TopLabelReliability`.

    Args:
        confidence: Confidence of each answer, in [0, 1].
        correct: Whether each answer is right (bool, or 0 and 1).
        n_bins: Number of bins of equal width.
        closed: Which edge belongs to a bin: ``"right"`` for (lower, upper], ``"left"`` for [lower, upper).

    Shape:
        ``confidence`` and ``correct``: ``[N]``.

    Raises:
        ValueError: If a confidence is outside [0, 1] or the shapes differ.

    Example:
        >>> table = reliability_table(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([0, 1, 1]), n_bins=4)
        >>> table.counts.tolist()
        [1, 0, 1, 1]
    """
    check_integer("n_bins", n_bins, 1)
    check_choice("closed", closed, ("left", "right"))
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(
            "Expected `confidence` and `correct` to be of one shape [N] "
            f"but got {list(confidence.shape)} and {list(correct.shape)}."
        )
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("Expected `confidence` to be in [0, 1] but got a value outside.")
    index = bin_index(confidence, n_bins, closed)
    right = (correct != 0).double()
    value = confidence.double()

    def total(weight: Tensor) -> Tensor:
        return torch.zeros(n_bins, dtype=torch.float64, device=value.device).index_add_(0, index, weight)

    unknown = torch.full((n_bins,), torch.nan, dtype=torch.float64, device=value.device)
    return ReliabilityTable(
        counts=total(torch.ones_like(value)).long(),
        correct=total(right).long(),
        confidence_sum=total(value),
        correct_confidence_sum=total(value * right),
        brier_sum=unknown,
        nll_sum=unknown,
    )
