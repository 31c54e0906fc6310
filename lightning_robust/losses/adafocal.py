# SPDX-License-Identifier: Apache-2.0
"""AdaFocal: focal exponents per bin of probability, which follow the calibration on the validation set."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_positive
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.focal import one_minus_p
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["AdaFocal", "adafocal_gammas", "adafocal_loss"]

# Confidences are counted in cells of equal width in their log-odds: fine near 1, where trained models are.
_LOWEST, _PER_UNIT, _CELLS = -12, 512, 40 * 512
_UNIT = 2.0**-32  # confidences are added up as integers, so that their order does not matter


def adafocal_gammas(
    gammas: Tensor,
    gaps: Tensor,
    *,
    rate: float = 1.0,
    switch: float = 0.2,
    gamma_min: float = -2.0,
    gamma_max: float = 20.0,
) -> Tensor:
    r"""One update of the exponents by the calibration gaps of their bins.

    .. math:: \gamma \leftarrow \gamma\, e^{\pm\lambda\,(conf - acc)}, \quad + \text{ if } \gamma > 0, \text{ else } -

    Where :math:`|\gamma|` falls below ``switch``, the exponent changes sides to ``switch`` with the other sign; then it
    is clipped.

    Args:
        gammas: Exponent of each bin.
        gaps: Mean confidence minus accuracy of each bin on the validation set.
        rate: :math:`\lambda`.
        switch: Magnitude below which focal and inverse focal loss change places.
        gamma_min: Smallest exponent.
        gamma_max: Largest exponent.

    Example:
        >>> adafocal_gammas(torch.tensor([1.0, -0.3]), torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.2000])
    """
    moved = gammas * torch.where(gammas > 0, rate * gaps, -rate * gaps).exp()
    other_side = switch * (1 - 2 * (moved > 0).to(moved))
    return torch.where(moved.abs() < switch, other_side, moved).clamp(gamma_min, gamma_max)


def adafocal_loss(logits: Tensor, target: Tensor | MixedTarget | Target, *, gammas: Tensor, bounds: Tensor) -> Tensor:
    r"""Focal loss of each sample with the exponent of the bin in which its :math:`p_y` lies.

    .. math:: -(1 - p_y)^\gamma \log p_y \quad (\gamma \ge 0), \qquad
              -(1 + p_y)^{|\gamma|} \log p_y \quad (\gamma < 0, \text{ inverse focal loss})

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        gammas: Exponent of each bin, ``[n]``.
        bounds: Probabilities between neighbouring bins, ascending, ``[n - 1]``; one that lies on a bound is in the
            upper bin.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Ghosh et al., arXiv:2211.11838.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
        >>> adafocal_loss(logits, labels, gammas=torch.tensor([1.0, -1.0]), bounds=torch.tensor([0.5]))
        tensor([0.2387, 1.8734])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        edges, exponents = bounds.to(log_p), gammas.to(log_p)
        return Target.of(log_p, target).expected(log_p, lambda picked: _adafocal(picked, exponents, edges))


def _adafocal(log_p: Tensor, gammas: Tensor, bounds: Tensor) -> Tensor:
    p = log_p.exp()
    gamma = gammas[torch.bucketize(p.detach(), bounds, right=True)]
    return torch.where(gamma < 0, 1 + p, one_minus_p(log_p)) ** gamma.abs() * -log_p


class AdaFocal(SampleCriterion):
    r"""Focal loss whose exponents follow the calibration on the validation set, bin by bin.

    .. math:: -(1 - p_y)^{\gamma_b} \log p_y \;\; (\gamma_b \ge 0), \qquad
              -(1 + p_y)^{|\gamma_b|} \log p_y \;\; (\gamma_b < 0), \qquad
              \gamma_b \leftarrow \gamma_b\, e^{\pm\lambda\,(conf_b - acc_b)}

    :math:`b` is the bin of :math:`p_y`. After each validation epoch the confidences of the validation samples are cut
    into bins of equal mass; the exponent of an over-confident bin grows, that of an under-confident one falls and may
    turn into the inverse focal loss. The bins start out equally wide. Soft and mixed targets take the mean over their
    classes.

    Cost: about that of the cross-entropy, and 0.5 MB of counts. Validation has to run every epoch for the authors'
    schedule.

    Args:
        n_bins: Number of bins.
        gamma: Exponent of all bins at the start.
        rate: :math:`\lambda`, how fast exponents follow the gap between confidence and accuracy.
        switch: Magnitude of the exponent below which focal and inverse focal loss change places.
        gamma_min: Smallest exponent, below zero.
        gamma_max: Largest exponent.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count, in validation neither.
        reduction: ``"mean"``, ``"sum"`` (the authors') or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.
        Validation needs class indices.

    Raises:
        ValueError: If an argument is out of range, or for an argument that every criterion refuses.

    References:
        Ghosh et al., AdaFocal: Calibration-aware Adaptive Focal Loss, arXiv:2211.11838. Their code sums over the batch
        and clips the gradient norm at 2. It sorts all validation confidences; we count them in cells 1/512 wide in
        their log-odds, which moves a bound by less than 0.0005 and makes any number of processes agree to the bit.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import AdaFocal
        >>> criterion = AdaFocal(n_bins=2)
        >>> logits, labels = torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1])
        >>> criterion.observe(logits, labels)  # every validation batch
        >>> criterion.validation_ends(lambda count: count)  # adds counts up over processes
        >>> criterion.gammas
        tensor([0.8876, 2.5924])
    """

    needs_validation = True
    gammas: Tensor
    bounds: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        n_bins: int = 15,
        gamma: float = 1.0,
        rate: float = 1.0,
        switch: float = 0.2,
        gamma_min: float = -2.0,
        gamma_max: float = 20.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_integer("n_bins", n_bins, 1)
        check_positive("rate", rate)
        check_positive("switch", switch)
        if not gamma_min <= gamma <= gamma_max:
            raise ValueError(f"Expected `gamma` to be in [{gamma_min}, {gamma_max}] but got {gamma!r}.")
        self.rate = rate
        self.switch = switch
        self.gamma_min = gamma_min
        self.gamma_max = gamma_max
        self.register_buffer("gammas", torch.full((n_bins,), float(gamma)))
        self.register_buffer("bounds", torch.linspace(0, 1, n_bins + 1)[1:-1])
        # samples, correct ones and their confidence, of the running validation epoch
        self.register_buffer("counts", torch.zeros(3, _CELLS, dtype=torch.long), persistent=False)

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return adafocal_loss(logits, target, gammas=self.gammas, bounds=self.bounds)

    @override
    @torch.no_grad()
    def observe(self, logits: Tensor, target: Tensor) -> None:
        log_p, predicted = full_precision(logits).log_softmax(1).max(1)
        seen = Target.of(logits, target, ignore_index=self.ignore_index)
        correct = predicted == seen.labels("AdaFocal's validation")
        odds = log_p - one_minus_p(log_p).log()
        cell = ((odds - _LOWEST) * _PER_UNIT).long().clamp(0, _CELLS - 1)
        of_cell = torch.stack([torch.ones_like(cell), correct.long(), (log_p.exp() / _UNIT).round().long()])
        if seen.kept is not None:
            of_cell = of_cell * seen.kept
        self.counts.index_add_(1, cell.flatten(), of_cell.flatten(1))

    @override
    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None:
        # In place, because validation runs under inference mode, whose tensors training cannot use.
        counts = total(self.counts.clone()).cpu()
        self.counts.zero_()
        if not bool(counts[0].any()):
            return
        which, bounds = _equal_mass(counts[0], len(self.gammas))
        scaled = counts.double() * torch.tensor([[1.0], [1.0], [_UNIT]], dtype=torch.double)
        samples, correct, confidence = scaled.new_zeros(3, len(self.gammas)).index_add_(1, which, scaled)
        gaps = (confidence - correct) / samples.clamp(min=1)
        gammas = adafocal_gammas(
            self.gammas.double().cpu(),
            gaps,
            rate=self.rate,
            switch=self.switch,
            gamma_min=self.gamma_min,
            gamma_max=self.gamma_max,
        )
        self.gammas.copy_(gammas)
        self.bounds.copy_(bounds)

    @override
    def extra_repr(self) -> str:
        return f"n_bins={len(self.gammas)}, rate={self.rate}, reduction={self.reduction!r}"


def _equal_mass(samples: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """The bin of each cell, and the probabilities between bins of about the same number of samples."""
    up_to = samples.cumsum(0).double()
    shares = torch.arange(1, n_bins).double() * up_to[-1] / n_bins
    last = torch.searchsorted(up_to, shares)  # cells are not split: the bin in which a share ends takes the whole one
    which = torch.searchsorted(last, torch.arange(len(samples)))
    return which, ((last + 1).double() / _PER_UNIT + _LOWEST).sigmoid()
