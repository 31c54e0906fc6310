# SPDX-License-Identifier: Apache-2.0
"""The losses of SCORE."""

from typing import Literal

import torch
from torch import Tensor

from lightning_robust.checks import check_choice
from lightning_robust.losses import full_precision
from lightning_robust.losses.probability_distance import Distance, probability_distance
from lightning_robust.objectives.terms import label_probabilities

__all__ = ["ClipOn", "score_bound", "score_loss", "score_pgd_loss"]

ClipOn = Literal["penalty", "whole"]
Reduction = Literal["mean", "none"]


def score_bound(distance: Distance, clip: float, classes: int) -> float:
    r"""Distance of the prediction that leaves ``clip`` to the wrong classes, in equal parts, from a hard label.

    Args:
        distance: see :func:`~lightning_robust.losses.probability_distance`.
        clip: probability of all wrong classes together.
        classes: number of classes.

    Example:
        >>> round(score_bound("lse", 0.3, 10), 4)
        0.1
    """
    prediction = torch.full((1, classes), clip / (classes - 1), dtype=torch.float64)
    prediction[0, 0] = 1 - clip
    label = torch.zeros(1, classes, dtype=torch.float64)
    label[0, 0] = 1
    return float(probability_distance(prediction.log(), label.log(), distance)) if clip > 0 else 0.0


def score_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    beta: float = 3.0,
    *,
    distance: Distance = "lse",
    bound: float = 0.0,
    clip_on: ClipOn = "penalty",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Distance of the clean prediction from the label plus ``beta`` times that of the attacked from the clean one.

    .. math:: \frac1B \sum_i \Big[ D(p_i, y_i) + \beta \max\big(D(q_i, p_i) - b, 0\big) \Big]
              \quad\text{or}\quad
              \frac1B \sum_i \max\Big( D(p_i, y_i) + \beta\, D(q_i, p_i) - b,\, 0 \Big)

    with :math:`p` and :math:`q` the softmax of clean and attacked logits; gradients flow through both.

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        beta: weight of the second distance.
        distance: see :func:`~lightning_robust.losses.probability_distance`.
        bound: losses below it count as nothing; see :func:`score_bound`.
        clip_on: where the bound applies: ``"penalty"``: the left form; ``"whole"``: the right one.
        label_smoothing: mass that the label gives to the other classes.
        reduction: ``"mean"``, or ``"none"`` for values per sample.

    Returns:
        The loss, its distance from the label and its distance between predictions (before ``beta``, clipped with
        ``clip_on="penalty"``).

    Raises:
        ValueError: an unknown ``distance``, ``clip_on`` or ``reduction``.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> score_loss(zeros, zeros, torch.tensor([0]))
        (tensor(0.5000), tensor(0.5000), tensor(0.))
    """
    check_choice("clip_on", clip_on, ("penalty", "whole"))
    check_choice("reduction", reduction, ("mean", "none"))
    clean = full_precision(clean_logits)
    natural = probability_distance(clean, _log_labels(target, clean, label_smoothing), distance)
    robust = probability_distance(adv_logits, clean.log_softmax(1), distance)
    if clip_on == "penalty":
        robust = (robust - bound).relu()
        losses = natural + beta * robust
    else:
        losses = (natural + beta * robust - bound).relu()
    return _reduced(reduction, losses, natural, robust)


def score_pgd_loss(
    adv_logits: Tensor,
    target: Tensor,
    *,
    distance: Distance = "lse",
    bound: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance of the attacked prediction from the label, ``mean max(D(q, y) - bound, 0)``.

    Args:
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        distance: see :func:`~lightning_robust.losses.probability_distance`.
        bound: losses below it count as nothing; see :func:`score_bound`.
        label_smoothing: mass that the label gives to the other classes.
        reduction: ``"mean"``, or ``"none"`` for values per sample.

    Raises:
        ValueError: an unknown ``distance`` or ``reduction``.

    Example:
        >>> score_pgd_loss(torch.zeros(1, 2), torch.tensor([0]), bound=0.2)
        tensor(0.3000)
    """
    check_choice("reduction", reduction, ("mean", "none"))
    adv = full_precision(adv_logits)
    losses = (probability_distance(adv, _log_labels(target, adv, label_smoothing), distance) - bound).relu()
    return losses.mean() if reduction == "mean" else losses


def _log_labels(target: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
    labels = label_probabilities(target, logits)
    if label_smoothing > 0:
        labels = (1 - label_smoothing) * labels + label_smoothing / (labels.shape[1] - 1) * (1 - labels)
    return labels.log()


def _reduced(reduction: str, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (value.mean() for value in values) if reduction == "mean" else values
    return first, second, third
