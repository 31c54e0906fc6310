# SPDX-License-Identifier: Apache-2.0
"""Terms that several objectives share, in forms that stay finite."""

import math

import torch
from torch import Tensor

from lightning_robust.attacks.losses import kl_divergence

__all__ = ["divergences", "label_probabilities", "log_plus"]


def label_probabilities(target: Tensor, logits: Tensor) -> Tensor:
    """Targets as a distribution over the classes.

    Args:
        target: classes ``[B]`` or probabilities ``[B, C]``.
        logits: ``[B, C]``, for the number of classes and the type.

    Shape:
        Returns ``[B, C]``.

    Example:
        >>> label_probabilities(torch.tensor([1]), torch.zeros(1, 3))
        tensor([[0., 1., 0.]])
    """
    if target.is_floating_point():
        return target.to(logits.dtype)
    return torch.zeros_like(logits).scatter(1, target.long().unsqueeze(1), 1.0)


def log_plus(log_values: Tensor, constant: float) -> Tensor:
    """``log(v + constant)`` of ``log v``, which itself may be far below what ``v`` could hold.

    Args:
        log_values: logarithms.
        constant: what is added inside the logarithm; with 0 nothing changes.

    Example:
        >>> log_plus(torch.tensor([-500.0]), 1e-12)
        tensor([-27.6310])
    """
    if constant == 0:
        return log_values
    return torch.logaddexp(log_values, torch.full_like(log_values, math.log(constant)))


def divergences(clean_logits: Tensor, adv_logits: Tensor, prob_eps: float = 0.0) -> Tensor:
    r"""Divergence of the attacked from the clean prediction, ``sum_k p_k (log p_k - log(q_k + prob_eps))``.

    Gradients flow through both.

    Args:
        clean_logits: ``[B, C]`` of the clean images, in full precision.
        adv_logits: ``[B, C]`` of the attacked images, in full precision.
        prob_eps: added to the attacked probabilities inside the logarithm.

    Shape:
        Returns ``[B]``.

    Example:
        >>> divergences(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])
    """
    if prob_eps == 0:
        return kl_divergence(adv_logits, clean_logits.log_softmax(1))
    log_p = clean_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_plus(adv_logits.log_softmax(1), prob_eps))).sum(1)
