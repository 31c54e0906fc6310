# SPDX-License-Identifier: Apache-2.0
"""One streaming pass over logits: integer sums per confidence bin, from which every calibration number follows."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer
from lightning_robust.metrics.reliability import Closed, ReliabilityTable, bin_index

__all__ = ["CalibrationAccumulator", "calibration_sums", "table_from_sums"]

# Columns of the sums. The last row holds no bin: it counts what was refused (see `_REFUSED_*`).
_COUNT, _CORRECT, _CONFIDENCE, _CORRECT_CONFIDENCE, _BRIER, _NLL_WHOLE, _NLL_FRACTION, _NLL_INFINITE = range(8)
_COLUMNS = 8
_REFUSED_ROWS, _REFUSED_LABELS = 0, 1

# Fixed point with 32 fractional bits: integer addition is exact in any order and on any number of devices, a single
# value is rounded by at most 2**-33, and 2**30 samples fit.
_ONE = 2.0**32
# A probability vector in bfloat16 with many classes is off by up to a percent; logits are off by far more.
_SUM_TOLERANCE = 0.02


@torch.no_grad()
def calibration_sums(
    logits: Tensor, labels: Tensor, *, n_bins: int = 15, closed: Closed = "right", from_logits: bool = True
) -> Tensor:
    """Bin one batch; sums of several batches, devices or processes are added.

    The softmax is computed in float32 (float64 for float64 logits) whatever the dtype of the logits, also under
    autocast. Costs one softmax and one row maximum; nothing waits for the device unless the labels are on the CPU.

    Args:
        logits: Logits, or probabilities with ``from_logits=False``.
        labels: Class indices.
        n_bins: Number of bins.
        closed: Which edge belongs to a bin.
        from_logits: Whether the first argument holds logits.

    Shape:
        ``logits`` ``[B, C]``, ``labels`` ``[B]``, result int64 ``[n_bins + 1, 8]``.

    Raises:
        ValueError: If a shape or dtype is not the expected one, or a label on the CPU is out of range.
    """
    _check_inputs(logits, labels)
    values = logits if logits.dtype == torch.float64 else logits.float()
    classes = values.shape[1]
    # Not `label score >= maximum`: a collapsed model with constant logits would be 100 % right.
    top, answer = values.max(dim=1)
    mislabelled = (labels < 0) | (labels >= classes)
    labels = labels.long().clamp(0, classes - 1)
    at_label = labels.unsqueeze(1)
    if from_logits:
        probabilities = values.softmax(dim=1)
        confidence = probabilities.amax(dim=1)
        nll = top - values.gather(1, at_label).squeeze(1) - confidence.log()
        refused = ~(confidence >= 0)
    else:
        probabilities = values.clone()  # changed in place below
        confidence = top
        nll = -values.gather(1, at_label).squeeze(1).log()
        refused = ~((values.amin(dim=1) >= 0) & ((values.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE))
        confidence = confidence.clamp(max=1)
    # |p - onehot|^2 without the cancellation of sum p^2 - 2 p_y + 1
    brier = probabilities.scatter_add_(1, at_label, -torch.ones_like(nll).unsqueeze(1)).square_().sum(dim=1)
    weights = _fixed_point_columns(confidence, answer == labels, brier, nll)
    return _add_to_bins(weights, confidence, refused, mislabelled, n_bins, closed)


def _check_inputs(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            "Expected `logits` to be a floating point tensor [B, C] with C >= 2 "
            f"but got {logits.dtype} {list(logits.shape)}."
        )
    if labels.ndim != 1 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"Expected `labels` to be class indices [B] with B = {logits.shape[0]} but got {list(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Expected `labels` to be integer class indices but got {labels.dtype}.")
    # On an accelerator the check would wait for the device: there it is counted and raised in compute.
    if labels.device.type == "cpu" and labels.numel() > 0:
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"Expected `labels` to be in [0, {logits.shape[1] - 1}] but got labels from {low} to {high}."
            )


def _fixed_point_columns(confidence: Tensor, correct: Tensor, brier: Tensor, nll: Tensor) -> list[Tensor]:
    # Scaling by a power of two is exact, so float32 (the only float on some devices) suffices.
    right = correct.long()
    fixed_confidence = (confidence * _ONE).round().long()
    infinite = ~(nll < _ONE)
    nll = torch.where(infinite, 0.0, nll.clamp(min=0))
    whole = nll.floor()
    columns = [torch.ones_like(right)] * _COLUMNS
    columns[_CORRECT] = right
    columns[_CONFIDENCE] = fixed_confidence
    columns[_CORRECT_CONFIDENCE] = fixed_confidence * right
    columns[_BRIER] = (brier * _ONE).round().long()
    columns[_NLL_WHOLE] = whole.long()
    columns[_NLL_FRACTION] = ((nll - whole) * _ONE).round().long()
    columns[_NLL_INFINITE] = infinite.long()
    return columns


def _add_to_bins(
    columns: list[Tensor], confidence: Tensor, refused: Tensor, mislabelled: Tensor, n_bins: int, closed: Closed
) -> Tensor:
    outside = refused | mislabelled
    weights = torch.stack(columns, dim=1).masked_fill_(outside.unsqueeze(1), 0)
    weights[:, _REFUSED_ROWS] += refused
    weights[:, _REFUSED_LABELS] += mislabelled
    index = torch.where(outside, n_bins, bin_index(confidence, n_bins, closed))
    return weights.new_zeros(n_bins + 1, _COLUMNS).index_add_(0, index, weights)


def table_from_sums(sums: Tensor) -> ReliabilityTable:
    """Turn the sums into a `ReliabilityTable`; the row of refused samples is left out.

    Args:
        sums: Added results of `calibration_sums`.
    """
    if sums.device.type == "mps":  # has no float64
        sums = sums.cpu()
    column = sums[:-1].unbind(dim=1)
    nll = column[_NLL_WHOLE].double() + column[_NLL_FRACTION].double() / _ONE
    return ReliabilityTable(
        counts=column[_COUNT].clone(),
        correct=column[_CORRECT].clone(),
        confidence_sum=column[_CONFIDENCE].double() / _ONE,
        correct_confidence_sum=column[_CORRECT_CONFIDENCE].double() / _ONE,
        brier_sum=column[_BRIER].double() / _ONE,
        nll_sum=torch.where(column[_NLL_INFINITE] > 0, torch.inf, nll),
    )


class CalibrationAccumulator(Metric):
    """Base of the calibration metrics: a state of ``8 (n_bins + 1)`` integers, whatever the number of samples.

    Integer fixed-point sums give the same result for every order, batch size and number of processes, and no change
    of dtype (``module.to(torch.bfloat16)``, ``set_dtype``) touches them. All subclasses with the same ``n_bins``,
    ``closed`` and ``from_logits`` share one state and one update in a `torchmetrics.MetricCollection`.

    Args:
        n_bins: Number of confidence bins of equal width.
        closed: Which edge belongs to a bin: ``"right"`` for (lower, upper], ``"left"`` for [lower, upper).
        from_logits: Whether ``update`` gets logits (default) or probabilities; never guessed from the values.
        **kwargs: Options of `torchmetrics.Metric`, such as ``process_group``.
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False

    def __init__(self, *, n_bins: int = 15, closed: Closed = "right", from_logits: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("n_bins", n_bins, 1)
        check_choice("closed", closed, ("left", "right"))
        check_choice("from_logits", from_logits, (True, False))
        self.n_bins = n_bins
        self.closed: Closed = closed
        self.from_logits = from_logits
        # A MetricCollection shares one state among metrics whose states have equal names and, after the first batch,
        # equal values. Two edge conventions agree on most first batches, so the convention is part of the name.
        self._state = f"sums_closed_{closed}_{'logits' if from_logits else 'probabilities'}"
        self.add_state(self._state, torch.zeros(n_bins + 1, _COLUMNS, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def sums(self) -> Tensor:
        """The integer sums of this process."""
        sums: Tensor = getattr(self, self._state)
        return sums

    @override
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: Logits (or probabilities with ``from_logits=False``) ``[B, C]``.
            labels: Class indices ``[B]``.
        """
        batch = calibration_sums(logits, labels, n_bins=self.n_bins, closed=self.closed, from_logits=self.from_logits)
        # Not in place: a state that was reset in inference mode could not be changed outside of it.
        setattr(self, self._state, self.sums + batch)

    def table(self) -> ReliabilityTable:
        """The bin table of the current sums; raises if a refused sample is among them.

        Raises:
            ValueError: If a row had no usable confidence or a label was out of range.
        """
        rows, labels = self.refused()
        if rows and self.from_logits:
            raise ValueError(
                f"{rows} rows of `logits` contain NaN or +inf, so they have no confidence; look for the first step "
                "at which the model's output is not finite."
            )
        if rows:
            raise ValueError(
                f"{rows} rows are not probability distributions (NaN, negative, or not summing to one); for logits "
                "use from_logits=True."
            )
        if labels:
            raise ValueError(f"{labels} labels are negative or not below the number of classes.")
        return table_from_sums(self.sums)

    def refused(self) -> tuple[int, int]:
        """Number of rows without a usable confidence, and of labels out of range; waits for the device."""
        rows, labels = self.sums[-1, [_REFUSED_ROWS, _REFUSED_LABELS]].tolist()
        return rows, labels

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Do nothing: the sums are integers in every precision.

        Args:
            dst_type: Ignored.
        """
        return self
