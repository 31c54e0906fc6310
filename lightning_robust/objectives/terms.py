# SPDX-License-Identifier: Apache-2.0
"""Terms that several objectives share, in forms that stay finite."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.attacks.losses import PREDICTION_LOSSES, kl_divergence
from lightning_robust.losses import autocast_off, full_precision

__all__ = [
    "KLReduction",
    "check_compares",
    "divergences",
    "kl_scale",
    "label_probabilities",
    "log_plus",
    "teacher_divergences",
]

#: How divergences of samples become a number: their mean, or that mean divided by the number of classes.
KLReduction = Literal["batchmean", "elementmean"]


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


def teacher_divergences(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    eps_log: float = 0.0,
) -> Tensor:
    r"""Divergence of the student from the teacher, ``sum_k q_k (log(q_k + eps_log) - log p_k)``; no factor ``T^2``.

    Gradients flow to the student only.

    Args:
        student_logits: ``[B, C]``; ``p`` is their softmax.
        teacher_logits: ``[B, C]``; ``q`` is their softmax.
        temperature: divides the student's logits.
        teacher_temperature: divides the teacher's; ``temperature`` when ``None``.
        eps_log: shifts the value, never the gradient.

    Shape:
        Returns ``[B]``, in float32, or float64 for float64 logits.

    Example:
        >>> teacher_divergences(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))
        tensor([0.3278])
    """
    with autocast_off(student_logits):
        log_p = (full_precision(student_logits) / temperature).log_softmax(1)
        divisor = temperature if teacher_temperature is None else teacher_temperature
        log_q = (full_precision(teacher_logits.detach()) / divisor).log_softmax(1)
        return (log_q.exp() * (log_plus(log_q, eps_log) - log_p)).sum(1)


def kl_scale(reduction: KLReduction, logits: Tensor) -> float:
    """What the mean of the samples' divergences is multiplied by.

    ``"elementmean"`` is the default of ``torch.nn.KLDivLoss``, a mean over samples and classes, with which losses were
    published that are therefore ten times smaller with CIFAR-10's classes than their formula.

    Args:
        reduction: ``"batchmean"`` or ``"elementmean"``.
        logits: ``[B, C]``, for the number of classes.

    Example:
        >>> kl_scale("elementmean", torch.zeros(1, 10))
        0.1
    """
    return 1 / logits.shape[1] if reduction == "elementmean" else 1.0


def check_compares(name: str, attack: Attack) -> None:
    """Refuse an attack that cannot move away from what a teacher says.

    Args:
        name: the objective, for the message.
        attack: its attack.

    Raises:
        ValueError: its loss looks at the labels.
    """
    if attack.loss not in PREDICTION_LOSSES:
        raise ValueError(
            f"The attack of {name} moves away from the teacher's prediction but {attack!r} looks at the labels; set "
            "loss='kl' (and a random start, 'normal' as published)."
        )
