# SPDX-License-Identifier: Apache-2.0
"""Selective classification: the risk among the most confident samples, and the areas under that curve."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_robust.checks import check_choice

__all__ = ["Area", "RiskCoverage", "Ties", "augrc", "aurc", "confidence_score", "excess_aurc", "risk_coverage_curve"]

Ties = Literal["expected", "order"]
Area = Literal["mean", "trapezoid", "from_zero"]


class RiskCoverage(NamedTuple):
    r"""Errors among the :math:`i` most confident of :math:`N` samples, for every :math:`i` from 1 to :math:`N`.

    Args:
        errors: Number of errors :math:`E_i`, float64 ``[N]``; a fraction inside a group of tied scores.
        thresholds: Score :math:`s_i` of the last sample that is kept, float64 ``[N]``.

    Example:
        >>> curve = risk_coverage_curve(torch.tensor([0.9, 0.6, 0.8]), torch.tensor([True, False, True]))
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.3333333333333333, 0.6666666666666666, 1.0], [0.0, 0.0, 0.3333333333333333])
    """

    errors: Tensor
    thresholds: Tensor

    @property
    def coverage(self) -> Tensor:
        """Share of the samples that are kept, :math:`i / N`, ``[N]``."""
        return _counts(self.errors) / len(self.errors)

    @property
    def risk(self) -> Tensor:
        """Share of errors among the samples that are kept, :math:`E_i / i`, ``[N]``."""
        return self.errors / _counts(self.errors)

    @property
    def generalized_risk(self) -> Tensor:
        """Share of all samples that are kept and wrong, :math:`E_i / N`, ``[N]``."""
        return self.errors / len(self.errors)

    def area(self, area: Area = "mean") -> Tensor:
        """Area under the risk; see :func:`aurc`.

        Args:
            area: How the curve is integrated.
        """
        return _area(self.risk, area)


def risk_coverage_curve(scores: Tensor, correct: Tensor, *, ties: Ties = "expected") -> RiskCoverage:
    r"""Risk at every coverage: samples are kept in the order of falling scores.

    Samples with equal scores cannot be told apart by the score. With ``ties="expected"`` the curve is the mean over
    all their orders: inside a group of ties the number of errors grows linearly. So the result depends on the scores
    only, not on the order of the data. ``ties="order"`` keeps them in the order in which they are given, as a stable
    sort does.

    Cost: one sort; float64.

    Args:
        scores: Confidence of each sample, ``[N]``; larger is more confident.
        correct: Whether the prediction is right, ``[N]``, booleans or zeros and ones.
        ties: What becomes of equal scores.

    Raises:
        ValueError: If there is no sample, the shapes differ, a score is NaN, or ``correct`` holds something else.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import risk_coverage_curve
        >>> risk_coverage_curve(torch.tensor([0.5, 0.5]), torch.tensor([True, False])).errors.tolist()
        [0.5, 1.0]
    """
    check_choice("ties", ties, ("expected", "order"))
    scores, wrong = _checked(scores, correct)
    thresholds, order = scores.sort(descending=True, stable=True)
    errors = wrong[order].cumsum(0)
    if ties == "expected":
        differs = thresholds[1:] != thresholds[:-1]
        ends = torch.cat([differs.nonzero().squeeze(1) + 1, differs.new_full((1,), len(scores), dtype=torch.int64)])
        sizes = ends.diff(prepend=ends.new_zeros(1))
        at_end = errors[ends - 1]
        of_group = at_end.diff(prepend=at_end.new_zeros(1))
        remaining = ends.repeat_interleave(sizes) - _counts(errors)
        # Whole groups are integers, exact in float64; only points inside a group of ties are rounded.
        errors = at_end.repeat_interleave(sizes) - remaining * (of_group / sizes).repeat_interleave(sizes)
    return RiskCoverage(errors, thresholds)


def aurc(scores: Tensor, correct: Tensor, *, ties: Ties = "expected", area: Area = "mean") -> Tensor:
    r"""Area under the risk-coverage curve: small when the errors have the lowest scores.

    .. math:: \text{AURC} = \frac{1}{N}\sum_{i=1}^{N} \frac{E_i}{i}

    with :math:`E_i` the errors among the :math:`i` most confident samples. Three conventions are in use:
    ``area="mean"`` is this sum; ``"trapezoid"`` integrates from coverage :math:`1/N` to 1 by the trapezoid rule and
    divides by the length :math:`1 - 1/N`, as torch-uncertainty does; ``"from_zero"`` puts a point (0, 0) before the
    curve and integrates from 0 to 1, as the code of the paper on label smoothing and selective classification does.

    Args:
        scores: Confidence of each sample, ``[N]``; larger is more confident.
        correct: Whether the prediction is right, ``[N]``.
        ties: What becomes of equal scores; see :func:`risk_coverage_curve`.
        area: How the curve is integrated.

    Shape:
        A float64 scalar.

    Raises:
        ValueError: As :func:`risk_coverage_curve`, and for a single sample with ``area="trapezoid"``.

    References:
        Geifman and El-Yaniv, arXiv:1705.08500. Xia et al., arXiv:2403.14715.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import aurc
        >>> scores, correct = torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, True])
        >>> aurc(scores, correct).item()
        0.0625
    """
    return risk_coverage_curve(scores, correct, ties=ties).area(area)


def excess_aurc(scores: Tensor, correct: Tensor, *, ties: Ties = "expected", area: Area = "mean") -> Tensor:
    r"""E-AURC: the AURC minus that of the best possible order, in which all errors come last.

    Args:
        scores: Confidence of each sample, ``[N]``; larger is more confident.
        correct: Whether the prediction is right, ``[N]``.
        ties: What becomes of equal scores; see :func:`risk_coverage_curve`.
        area: How both curves are integrated; see :func:`aurc`.

    Shape:
        A float64 scalar, zero or above.

    Raises:
        ValueError: As :func:`aurc`.

    References:
        Geifman et al., arXiv:1805.08206, who replace the best AURC by its limit for many samples,
        :math:`r + (1-r)\ln(1-r)` with the error rate :math:`r`; here it is exact for :math:`N` samples.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import excess_aurc
        >>> excess_aurc(torch.tensor([0.9, 0.6]), torch.tensor([True, False])).item()
        0.0
    """
    best = risk_coverage_curve(correct.cpu().double(), correct.cpu(), ties="order").area(area)
    return aurc(scores, correct, ties=ties, area=area) - best.to(scores.device)


def augrc(scores: Tensor, correct: Tensor) -> Tensor:
    r"""Area under the generalised risk-coverage curve: the mean share of kept errors over all thresholds.

    .. math:: \text{AUGRC} = \int_0^1 \frac{E(c)}{N}\,dc
              = (1 - \text{AUROC})\,a\,(1-a) + \tfrac12 (1-a)^2

    with the accuracy :math:`a` and the AUROC of the scores for telling right from wrong. The curve goes from (0, 0)
    to (1, 1 - a) in straight lines, across ties too, so it has one convention only.

    Args:
        scores: Confidence of each sample, ``[N]``; larger is more confident.
        correct: Whether the prediction is right, ``[N]``.

    Shape:
        A float64 scalar in [0, 1/2].

    Raises:
        ValueError: As :func:`risk_coverage_curve`.

    References:
        Traub et al., arXiv:2407.01032. torch-uncertainty integrates from coverage :math:`1/N` only.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import augrc
        >>> augrc(torch.tensor([0.9, 0.6]), torch.tensor([True, False])).item()
        0.125
    """
    return _area(risk_coverage_curve(scores, correct).generalized_risk, "from_zero")


def confidence_score(logits: Tensor) -> Tensor:
    r"""Logarithm of the largest softmax probability, in float64.

    It orders samples as the maximum softmax probability does, but keeps the order where that is 1 to the last digit:
    :math:`-\log(1 + \sum_{k \ne max} e^{z_k - z_{max}})` is computed without the 1 swallowing the sum.

    Args:
        logits: Scores before the softmax, ``[N, C]``.

    Shape:
        ``[N]``, at most 0.

    Example:
        >>> import torch
        >>> from lightning_robust.metrics import confidence_score
        >>> confidence_score(torch.tensor([[0.0, 0.0], [50.0, 0.0], [60.0, 0.0]])).tolist()
        [-0.6931471805599453, -1.9287498479639178e-22, -8.75651076269652e-27]
    """
    wide = logits.double() if logits.device.type != "mps" else logits.cpu().double()  # mps has no float64
    top, answer = wide.max(1, keepdim=True)
    others = (wide - top).exp().scatter(1, answer, 0.0)
    return -others.sum(1).log1p()


def _checked(scores: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and errors (1: wrong) in float64."""
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"Expected `scores` to be of shape [N] with N >= 1 but got {list(scores.shape)}.")
    if correct.shape != scores.shape:
        raise ValueError(
            f"Expected `correct` to have the shape {list(scores.shape)} of `scores` but got {list(correct.shape)}."
        )
    if scores.device.type == "mps":  # has no float64
        scores, correct = scores.cpu(), correct.cpu()
    if bool(scores.isnan().any()):
        raise ValueError(f"Expected `scores` to be numbers but {int(scores.isnan().sum())} of {len(scores)} are NaN.")
    if not bool(((correct == 0) | (correct == 1)).all()):
        raise ValueError("Expected `correct` to hold booleans, or zeros and ones.")
    return scores.double(), 1 - correct.double()


def _counts(errors: Tensor) -> Tensor:
    return torch.arange(1, len(errors) + 1, device=errors.device, dtype=errors.dtype)


def _area(risk: Tensor, area: Area) -> Tensor:
    check_choice("area", area, ("mean", "trapezoid", "from_zero"))
    if area == "mean":
        return risk.mean()
    if area == "from_zero":
        return (risk.sum() - risk[-1] / 2) / len(risk)
    if len(risk) < 2:
        raise ValueError('Expected at least 2 samples for area="trapezoid" but got 1; use area="mean".')
    return (risk.sum() - (risk[0] + risk[-1]) / 2) / (len(risk) - 1)
