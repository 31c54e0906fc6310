# SPDX-License-Identifier: Apache-2.0
"""Distances between predicted distributions, with gradients that stay finite where they coincide."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.checks import check_choice
from lightning_robust.losses.precision import autocast_off, full_precision

__all__ = ["DISTANCES", "Distance", "probability_distance"]

Distance = Literal["lse", "l1", "l1-squared", "l2", "js", "js-sqrt", "kl", "kl-sqrt"]
DISTANCES: tuple[Distance, ...] = ("lse", "l1", "l1-squared", "l2", "js", "js-sqrt", "kl", "kl-sqrt")


def probability_distance(logits: Tensor, reference: Tensor, distance: Distance = "lse") -> Tensor:
    r"""Distance of the prediction :math:`q = \mathrm{softmax}(z)` from a reference distribution :math:`p`, per sample.

    ``"lse"`` :math:`\sum_k (q_k - p_k)^2`, ``"l2"`` its root, ``"l1"`` :math:`\sum_k |q_k - p_k|`, ``"l1-squared"`` its
    square, ``"kl"`` :math:`\mathrm{KL}(p \,\|\, q)`, ``"js"`` the Jensen-Shannon divergence
    :math:`\frac12 \mathrm{KL}(q \,\|\, m) + \frac12 \mathrm{KL}(p \,\|\, m)` with :math:`m = (p + q) / 2`, and
    ``"kl-sqrt"`` and ``"js-sqrt"`` their roots. All but the two with "kl" are bounded, and the roots and norms are
    metrics, KL's apart. The gradient of a root is 0 where the distance is 0.

    Args:
        logits: ``[B, C]``.
        reference: log-probabilities ``[B, C]``; minus infinity for a probability of 0.
        distance: which one.

    Shape:
        Returns ``[B]``, in float32, or float64 for float64 logits.

    Raises:
        ValueError: an unknown ``distance``.

    Example:
        >>> probability_distance(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]).log())
        tensor([0.5000])
    """
    check_choice("distance", distance, DISTANCES)
    with autocast_off(logits):
        log_q, log_p = full_precision(logits).log_softmax(1), full_precision(reference)
        # a probability of 0 becomes one that is as good as 0, so that 0 * log 0 is 0
        log_p = log_p.clamp_min(math.log(torch.finfo(log_p.dtype).tiny))
        kind, _, form = distance.partition("-")
        value = _plain(log_q, log_p, kind)
        return value.square() if form == "squared" else _root(value) if form == "sqrt" or kind == "l2" else value


def _plain(log_q: Tensor, log_p: Tensor, kind: str) -> Tensor:
    q, p = log_q.exp(), log_p.exp()
    if kind == "kl":
        return (p * (log_p - log_q)).sum(1)
    if kind == "js":
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        return 0.5 * (q * (log_q - log_m) + p * (log_p - log_m)).sum(1)
    return (q - p).abs().sum(1) if kind == "l1" else (q - p).square().sum(1)


def _root(value: Tensor) -> Tensor:
    # rounding can leave a divergence slightly below 0; the root of 0 has an infinite gradient
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)
