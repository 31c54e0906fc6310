# SPDX-License-Identifier: Apache-2.0
"""Soft-binned calibration error of the batch, added to a criterion."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_positive
from lightning_robust.losses.batch_penalty import BatchPenalty
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.precision import autocast_off, full_precision

__all__ = ["SoftECE", "soft_binned_ece"]

_SMALLEST_BIN = 1e-5


def soft_binned_ece(
    confidence: Tensor,
    correct: Tensor,
    *,
    bins: int = 15,
    temperature: float | None = None,
    decay_factor: float = 80.0,
    kept: Tensor | None = None,
) -> Tensor:
    r"""Soft-binned expected calibration error (root mean square) of a batch.

    .. math:: \sqrt{\sum_j \frac{S_j}{N}\Big(\frac{\sum_i u_{ij}(r_i - c_i)}{S_j}\Big)^2}, \quad
              u_{ij} = \mathrm{softmax}_j\big(-(r_i - \xi_j)^2/T\big),\ S_j = \sum_i u_{ij},\ \xi_j = (j - \tfrac12)/M

    Args:
        confidence: Largest probability :math:`r` of each sample, ``[N]``.
        correct: Whether the prediction is right, :math:`c`, ``[N]``.
        bins: Number :math:`M` of bins.
        temperature: Temperature :math:`T` of the bins; hard bins as it falls to 0. When ``None``,
            :math:`1/(M^2\log d)` with the decay factor :math:`d`.
        decay_factor: How much less a sample counts for the next bin than for its own, roughly.
        kept: Which samples count, ``[N]``; all when ``None``.

    Shape:
        A scalar, 0 or above; 0 where no sample counts. Where it is 0 its gradients are 0 too.

    Raises:
        ValueError: If ``bins`` is no positive integer, ``temperature`` is not positive, or ``decay_factor`` is not
            above 1.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import soft_binned_ece
        >>> soft_binned_ece(torch.tensor([0.9, 0.9]), torch.tensor([1, 0]), bins=1)
        tensor(0.4000)
    """
    width = _bin_temperature(bins, temperature, decay_factor)
    with autocast_off(confidence):
        r = full_precision(confidence)
        anchors = (torch.arange(bins, device=r.device, dtype=r.dtype) + 0.5) / bins
        shares = (-(r.unsqueeze(1) - anchors).square() / width).softmax(1)
        if kept is not None:
            shares = torch.where(kept.unsqueeze(1), shares, 0.0)
        sizes = shares.sum(0)
        gaps = (r - correct.to(r)) @ shares / sizes.clamp(min=_SMALLEST_BIN)
        square = gaps.square() @ (sizes / sizes.sum().clamp(min=1))
        # The root has no slope at zero.
        positive = square > 0
        return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _bin_temperature(bins: int, temperature: float | None, decay_factor: float) -> float:
    """Check the settings of soft bins and return their temperature."""
    check_integer("bins", bins, 1)
    if temperature is not None:
        check_positive("temperature", temperature)
        return temperature
    if not (math.isfinite(decay_factor) and decay_factor > 1):
        raise ValueError(f"Expected `decay_factor` to be a finite number > 1 but got {decay_factor!r}.")
    return 1 / (math.log(decay_factor) * bins**2)


class SoftECE(BatchPenalty):
    r"""A criterion plus a weight times the soft-binned calibration error of the batch.

    .. math:: L + \lambda\sqrt{\sum_j \frac{S_j}{N}\big(\mathrm{conf}_j - \mathrm{acc}_j\big)^2}

    where each sample belongs to all :math:`M` bins, most to those whose middle is near its confidence; see
    :func:`soft_binned_ece`. The penalty is a property of a batch: it has no value per sample, class weights do not
    enter it, and micro-batches of gradient accumulation each have their own.

    Cost: one more pass over the logits, and :math:`N M` memory.

    Args:
        weight: Factor :math:`\lambda`.
        bins: Number :math:`M` of bins.
        temperature: Temperature of the bins; from ``decay_factor`` when ``None``.
        decay_factor: How much less a sample counts for the next bin than for its own, roughly.
        base: The criterion :math:`L`; cross-entropy when ``None``.
        ignore_index: Hard label of the samples that do not count; a ``base`` that has one brings its own.
        gather: Whether the processes of a distributed run compute the penalty of their common batch, with gradients.
            All of them need the same number of samples in each training step (``drop_last=True``). By default each
            takes its own batch, whose error is larger the smaller the batch.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` and class indices ``[B, ...]`` give a scalar.

    Raises:
        ValueError: If an argument is out of range, ``base`` does not reduce to a scalar, or the target is soft.

    References:
        Karandikar et al., arXiv:2108.00106, equation 11 with the squared error, as in their code, which gives NaN
        gradients where the error is 0.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import SoftECE
        >>> SoftECE(weight=1.0, bins=1)(torch.zeros(2, 2), torch.tensor([1, 1]))
        tensor(1.1931)
    """

    name: ClassVar[str] = "soft_ece"

    def __init__(
        self,
        *,
        weight: float = 1.0,
        bins: int = 15,
        temperature: float | None = None,
        decay_factor: float = 80.0,
        base: Criterion | None = None,
        ignore_index: int = -100,
        gather: bool = False,
    ) -> None:
        super().__init__(weight=weight, base=base, ignore_index=ignore_index, gather=gather)
        self.bins = bins
        self.temperature = _bin_temperature(bins, temperature, decay_factor)

    @override
    def penalty(self, confidence: Tensor, correct: Tensor, kept: Tensor) -> Tensor:
        return soft_binned_ece(confidence, correct, bins=self.bins, temperature=self.temperature, kept=kept)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}, temperature={self.temperature:.3g}"
