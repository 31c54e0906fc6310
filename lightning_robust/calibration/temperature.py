# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling, fitted by a safeguarded Newton iteration in the inverse temperature."""

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_robust.checks import check_positive

__all__ = ["TemperatureScaling"]

_MAX_ITERATIONS = 100  # bisection alone needs about 60 to reach the tolerance
_RELATIVE_TOLERANCE = 1e-12
_CHUNK = 2**22  # float64 elements worked on at once


class TemperatureScaling:
    r"""Divides logits by one temperature that minimises the negative log-likelihood of held-out data.

    .. math:: T^* = \arg\min_T \frac{1}{N} \sum_i -\log \text{softmax}(z_i / T)_{y_i}

    The objective is convex in :math:`b = 1/T` with derivatives :math:`\text{mean}(E_p[z] - z_y)` and
    :math:`\text{mean}(\text{Var}_p[z])`, so Newton steps inside a shrinking bracket find the optimum to machine
    precision without autograd (they also work on tensors made in inference mode). The accuracy never changes.

    When every sample is classified correctly the optimum is :math:`T \to 0`; when the logits do not help at all it is
    :math:`T \to \infty`. Then the bound is taken, ``at_bound`` is true and a warning says why.

    Cost: about 6 passes over the logits in float64, in chunks of constant memory.

    Args:
        temperature: Temperature before any fit.
        min_temperature: Lower bound of the fit.
        max_temperature: Upper bound of the fit.

    Shape:
        ``fit(logits, labels)`` with ``[N, C]`` and ``[N]``; calling it maps ``[..., C]`` to ``[..., C]``.

    Raises:
        ValueError: If the data has NaN or infinite logits, no sample, wrong shapes, or labels out of range.

    References:
        Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599. The recipe of their code (LBFGS with
        learning rate 0.01 and no line search) stops before the optimum; this class does not follow it.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> scaling = TemperatureScaling().fit(logits, torch.tensor([0, 0, 0, 1]))
        >>> round(scaling.temperature, 4)  # 4 / log(3): three of four are right
        3.641
        >>> round(scaling(logits).softmax(1)[0, 0].item(), 4)
        0.75
    """

    def __init__(
        self, *, temperature: float = 1.0, min_temperature: float = 0.01, max_temperature: float = 100.0
    ) -> None:
        check_positive("temperature", temperature)
        check_positive("min_temperature", min_temperature)
        check_positive("max_temperature", max_temperature)
        if not min_temperature < max_temperature:
            raise ValueError(
                f"Expected `min_temperature` to be < `max_temperature` but got {min_temperature} and {max_temperature}."
            )
        self.temperature = temperature
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.at_bound = False
        self.nll_before = math.nan  # NaN until the first fit
        self.nll_after = math.nan

    def __repr__(self) -> str:
        return f"{type(self).__name__}(temperature={self.temperature!r})"

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits divided by the temperature; differentiable, low-precision logits become float32.

        Args:
            logits: Logits ``[..., C]``.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide / self.temperature

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor) -> "TemperatureScaling":
        """Find the temperature on held-out data; fitting on the data of the evaluation is optimistic.

        Args:
            logits: Logits (not probabilities: nothing can tell them apart) ``[N, C]``.
            labels: Class indices ``[N]``.
        """
        _check_data(logits, labels)
        low, high = 1 / self.max_temperature, 1 / self.min_temperature
        if bool((logits.amax(1) == logits.amin(1)).all()):
            inverse, self.at_bound = 1 / self.temperature, False
            warnings.warn(
                f"All logits of each sample are equal, so every temperature fits alike; it stays {self.temperature:g}.",
                stacklevel=2,
            )
        elif _derivatives(logits, labels, high)[1] <= 0:  # zero where the likelihood is 1 to the last digit
            inverse, self.at_bound = high, True
            _warn("lower", self.min_temperature, "the likelihood keeps growing as T -> 0 (every sample is right?)")
        elif _derivatives(logits, labels, low)[1] >= 0:
            inverse, self.at_bound = low, True
            _warn(
                "upper", self.max_temperature, "the likelihood keeps growing as T -> infinity (no better than chance)"
            )
        else:
            inverse, self.at_bound = _minimise(logits, labels, low, high), False
        self.temperature = 1 / inverse
        self.nll_before = _derivatives(logits, labels, 1.0)[0]
        self.nll_after = _derivatives(logits, labels, inverse)[0]
        return self


def _minimise(logits: Tensor, labels: Tensor, low: float, high: float) -> float:
    """Root of the increasing derivative in [low, high]: Newton where it stays inside, else the geometric middle."""
    inverse = min(max(1.0, low), high)
    for _ in range(_MAX_ITERATIONS):
        _, slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = slope / curvature if curvature > 0 else math.inf
        candidate = inverse - step
        if not low < candidate < high:
            candidate = math.sqrt(low * high)
        if abs(candidate - inverse) <= _RELATIVE_TOLERANCE * inverse:
            return candidate
        inverse = candidate
    return inverse


def _derivatives(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float, float]:
    """Mean NLL at T = 1 / inverse and its first two derivatives in the inverse temperature."""
    sums = torch.zeros(3, dtype=torch.float64)
    for z, y in _chunks(logits, labels):
        log_p = (z * inverse).log_softmax(dim=1)
        p = log_p.exp()
        mean = (p * z).sum(dim=1)
        variance = (p * (z - mean.unsqueeze(1)).square()).sum(dim=1)
        at_label = y.unsqueeze(1)
        nll = -log_p.gather(1, at_label).squeeze(1)
        slope = mean - z.gather(1, at_label).squeeze(1)
        sums += torch.stack([nll.sum(), slope.sum(), variance.sum()]).cpu()
    value, slope_sum, variance_sum = (sums / len(labels)).tolist()
    return value, slope_sum, variance_sum


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK // logits.shape[1])
    for z, y in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True):
        if z.device.type == "mps":  # has no float64
            z, y = z.cpu(), y.cpu()
        # A constant per row changes nothing in the softmax; without it large logits would cancel badly.
        z = z.double()
        yield z - z.amax(dim=1, keepdim=True), y.long()


def _check_data(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.shape[0] < 1 or not logits.is_floating_point():
        raise ValueError(
            "Expected `logits` to be a floating point tensor [N, C] with N >= 1 and C >= 2 "
            f"but got {logits.dtype} {list(logits.shape)}."
        )
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"Expected `labels` to be class indices [N] with N = {logits.shape[0]} "
            f"but got {labels.dtype} {list(labels.shape)}."
        )
    if not bool(logits.isfinite().all()):
        raise ValueError("Expected `logits` to be finite but got NaN or infinite values.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"Expected `labels` to be in [0, {logits.shape[1] - 1}] but got labels from {low} to {high}.")


def _warn(which: str, bound: float, why: str) -> None:
    warnings.warn(f"The temperature was set to its {which} bound {bound}: {why}.", UserWarning, stacklevel=3)
