# SPDX-License-Identifier: Apache-2.0
"""How balances between several losses and several teachers move, as functions."""

from typing import Literal

import torch
from torch import Tensor

from lightning_robust.losses import autocast_off, full_precision
from lightning_robust.objectives.terms import log_plus

__all__ = ["Comparison", "balanced_temperatures", "balanced_weights", "entropies"]

Comparison = Literal["difference", "ratio"]


def entropies(logits: Tensor, eps: float = 0.0) -> Tensor:
    r"""Entropy of each prediction in nats, :math:`-\sum_c q_c \log(q_c + \epsilon)` with :math:`q` the softmax.

    Args:
        logits: ``[B, C]``, already divided by a temperature.
        eps: constant inside the logarithm; with 0 this is the entropy, above it can be negative.

    Shape:
        Returns ``[B]``; float32, or float64 for float64 logits.

    Example:
        >>> entropies(torch.tensor([[0.0, 0.0], [900.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    with autocast_off(logits):
        log_q = full_precision(logits).log_softmax(1)
        return (log_q.exp() * -log_plus(log_q, eps)).sum(1)


def balanced_weights(weights: Tensor, losses: Tensor, initial: Tensor, rate: float, *, exponent: float = 1.0) -> Tensor:
    r"""Weights of losses, moved towards the share that each has in what is left of them.

    .. math:: w_i \leftarrow w_i - r \Big(w_i - \frac{l_i}{\sum_j l_j}\Big), \qquad
              l_i = \Big(\frac{L_i}{L_i(0)}\Big)^{\beta}

    A loss that has fallen less than the others gains weight. The weights keep their sum and stay non-negative for rates
    up to 1.

    Args:
        weights: the present ones, ``[N]``.
        losses: the present losses :math:`L`, ``[N]``.
        initial: the losses at the start :math:`L(0)`, ``[N]``.
        rate: :math:`r`.
        exponent: :math:`\beta`; above 1 the shares are more extreme.

    Shape:
        Returns ``[N]``.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> balanced_weights(half, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), 0.1)
        tensor([0.4750, 0.5250])
    """
    tiny = torch.finfo(losses.dtype).tiny
    left = (losses.clamp_min(0) / initial.clamp_min(tiny)) ** exponent
    total = left.sum()
    shares = torch.where(total > 0, left / total, torch.full_like(left, 1 / len(left)))
    return weights - rate * (weights - shares)


def balanced_temperatures(
    temperatures: Tensor,
    entropy: Tensor,
    rate: float,
    limits: tuple[float, float] = (1.0, 10.0),
    *,
    comparison: Comparison = "difference",
) -> Tensor:
    r"""Temperatures of teachers, moved so that their predictions come to have the same entropy.

    .. math:: \tau_i \leftarrow \mathrm{clip}\Big(\tau_i - r\, \mathrm{sign}\big(H_i - \bar H_{\ne i}\big),\,
              \tau_{\min}, \tau_{\max}\Big)

    with :math:`\bar H_{\ne i}` the mean of the others: a teacher that is less certain than the others cools down.

    Args:
        temperatures: the present ones, ``[N]``.
        entropy: of the predictions at these temperatures, ``[N]``.
        rate: :math:`r`, the step.
        limits: smallest and largest temperature.
        comparison: ``"difference"``: as above; ``"ratio"``: the sign of :math:`H_i / \bar H_{\ne i} - 1`, which is the
            same unless a constant in the logarithm has made an entropy negative, which turns it round.

    Shape:
        Returns ``[N]``.

    Example:
        >>> balanced_temperatures(torch.tensor([2.0, 2.0]), torch.tensor([0.9, 0.4]), 0.1)
        tensor([1.9000, 2.1000])
    """
    if comparison == "ratio":
        itself = torch.eye(len(entropy), dtype=torch.bool, device=entropy.device)
        others = entropy.expand(len(entropy), -1).masked_fill(itself, 0).sum(1) / (len(entropy) - 1)
        above = entropy / others - 1
    else:
        above = (entropy.unsqueeze(1) - entropy.unsqueeze(0)).sum(1)
    return (temperatures - rate * above.sign()).clamp(*limits)
