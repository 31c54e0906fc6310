# SPDX-License-Identifier: Apache-2.0
"""What attacks maximise: one number per sample, larger when the model is closer to being wrong."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.losses.probability_distance import probability_distance

__all__ = [
    "ATTACK_LOSSES",
    "PREDICTION_LOSSES",
    "STEERED_LOSSES",
    "brier",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "kl_divergence",
    "labels_of",
    "margin",
    "margin_terms",
    "probability_margin",
    "towards_class",
]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross entropy per sample, ``log sum_k exp z_k - sum_k y_k z_k``.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]`` or probabilities ``[B, C]``.

    Shape:
        Returns ``[B]``.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor([0.6931])
    """
    target = target.to(logits.dtype) if target.is_floating_point() else target.long()
    return F.cross_entropy(logits, target, reduction="none")


def brier(logits: Tensor, target: Tensor) -> Tensor:
    r"""Squared distance of the prediction from the label, ``sum_k (p_k - y_k)^2`` with ``p = softmax(z)``.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]`` or probabilities ``[B, C]``.

    Shape:
        Returns ``[B]``, in ``[0, 2]``.

    Example:
        >>> brier(torch.zeros(1, 2), torch.tensor([1]))
        tensor([0.5000])
    """
    p = logits.softmax(1)
    if target.is_floating_point():
        return (p - target.to(p.dtype)).square().sum(1)
    index = target.long().unsqueeze(1)
    return (p - torch.zeros_like(p).scatter(1, index, 1.0)).square().sum(1)


def margin_terms(
    values: Tensor, target: Tensor, wanted: Tensor | None = None, *, purpose: str = "to split a margin"
) -> tuple[Tensor, Tensor]:
    """The value of the true class and that of the class to compare with, whose difference is the margin.

    Args:
        values: logits or probabilities ``[B, C]``.
        target: true classes ``[B]``.
        wanted: classes ``[B]`` to compare with; the largest other class when ``None``.
        purpose: what the classes are needed for, in the words of a refusal.

    Shape:
        Both results are ``[B]``.

    Raises:
        ValueError: the target holds probabilities.

    Example:
        >>> margin_terms(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        (tensor([3.]), tensor([1.]))
    """
    index = _index(target, purpose)
    own = values.gather(1, index).squeeze(1)
    if wanted is not None:
        return own, values.gather(1, wanted.long().unsqueeze(1)).squeeze(1)
    return own, values.scatter(1, index, float("-inf")).amax(1)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""Logit margin, ``max_{k != y} z_k - z_y``: positive exactly when the sample is misclassified.

    Its gradient does not vanish for confident models, where that of the cross entropy does.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]``.

    Shape:
        Returns ``[B]``.

    Raises:
        ValueError: the target holds probabilities.

    References:
        Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, arXiv 1608.04644.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor([-2.])
    """
    own, other = margin_terms(logits, target, purpose="for the loss margin")
    return other - own


def probability_margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""Margin of the probabilities, ``max_{k != y} p_k - p_y`` with ``p = softmax(z)``.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]``.

    Shape:
        Returns ``[B]``, in ``[-1, 1]``.

    Raises:
        ValueError: the target holds probabilities.

    Example:
        >>> probability_margin(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.])
    """
    own, other = margin_terms(logits.softmax(1), target, purpose="for the loss probability_margin")
    return other - own


def dlr(logits: Tensor, target: Tensor) -> Tensor:
    r"""Difference of logits ratio, ``-(z_y - max_{k != y} z_k) / (z_(1) - z_(3))`` with sorted ``z_(1) >= z_(2) ...``.

    Invariant to a shift and a scale of the logits; the gradient passes through the denominator too.

    Args:
        logits: ``[B, C]`` with ``C >= 3``.
        target: classes ``[B]``.

    Shape:
        Returns ``[B]``; in ``[-1, 0]`` while the sample is classified correctly, unbounded afterwards.

    Raises:
        ValueError: fewer than three classes, or the target holds probabilities.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness, arXiv 2003.01690.

    Example:
        >>> dlr(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    _need_classes(logits, 3, "dlr")
    top = logits.topk(3, dim=1).values
    return margin(logits, target) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    r"""Targeted difference of logits ratio, ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``.

    Args:
        logits: ``[B, C]`` with ``C >= 4``.
        target: true classes ``[B]``.
        wanted: the classes ``[B]`` that the attack steers to.

    Shape:
        Returns ``[B]``.

    Raises:
        ValueError: fewer than four classes, or the target holds probabilities.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness, arXiv 2003.01690.

    Example:
        >>> dlr_targeted(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), torch.tensor([0]), torch.tensor([3]))
        tensor([-1.])
    """
    _need_classes(logits, 4, "dlr_targeted")
    order = logits.detach().topk(4, dim=1).indices
    # all that has a gradient comes from one place: backward passes through several cost more than the loss
    index = torch.cat([_index(target, "for the loss dlr_targeted"), wanted.long().unsqueeze(1), order], 1)
    own, other, first, _, third, fourth = logits.gather(1, index).unbind(1)
    return (other - own) / (first - (third + fourth) / 2 + 1e-12)


def towards_class(logits: Tensor, target: Tensor, wanted: Tensor, *, probabilities: bool = False) -> Tensor:
    r"""Margin of one other class, ``z_t - z_y``, or ``p_t - p_y`` of the probabilities.

    Args:
        logits: ``[B, C]``.
        target: true classes ``[B]``.
        wanted: the classes ``[B]`` that the attack steers to.
        probabilities: compare the softmax instead of the logits.

    Shape:
        Returns ``[B]``.

    Raises:
        ValueError: the target holds probabilities.

    Example:
        >>> towards_class(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([2]))
        tensor([-3.])
    """
    values = logits.softmax(1) if probabilities else logits
    index = torch.cat([_index(target, "for the loss towards_class"), wanted.long().unsqueeze(1)], 1)
    own, other = values.gather(1, index).unbind(1)
    return other - own


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    r"""How far the prediction has moved, ``KL(p || q) = sum_k p_k (log p_k - log q_k)`` with ``q = softmax(z)``.

    Args:
        logits: ``[B, C]`` of the attacked images.
        reference: log-probabilities ``[B, C]`` of the clean images, ``log p``.

    Shape:
        Returns ``[B]``.

    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2).log_softmax(1))
        tensor([0.])
    """
    return F.kl_div(logits.log_softmax(1), reference, log_target=True, reduction="none").sum(1)


def labels_of(target: Tensor) -> Tensor:
    """Classes ``[B]`` of a target: itself, or the most probable class of ``[B, C]`` probabilities.

    Args:
        target: classes ``[B]`` or probabilities ``[B, C]``.
    """
    return target.argmax(1) if target.ndim == 2 else target


#: Losses whose target is not the label but the prediction for the clean images, as log-probabilities.
PREDICTION_LOSSES = frozenset({"kl", "lse", "l1", "js"})

#: The losses by the name that an attack's ``loss`` argument takes.
ATTACK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "prob-margin": probability_margin,
    "brier": brier,
    "kl": kl_divergence,
    "lse": partial(probability_distance, distance="lse"),
    "l1": partial(probability_distance, distance="l1"),
    "js": partial(probability_distance, distance="js"),
}


#: The forms of losses that steer to a class, ``(logits, y, wanted) -> [B]``, where there is one.
STEERED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce": lambda logits, target, wanted: -cross_entropy(logits, wanted),
    "margin": towards_class,
    "dlr": dlr_targeted,
    "prob-margin": partial(towards_class, probabilities=True),
}


def _index(target: Tensor, purpose: str) -> Tensor:
    if target.ndim != 1:
        raise ValueError(f"Expected integer classes [B] {purpose} but got a target of {list(target.shape)}.")
    return target.long().unsqueeze(1)


def _need_classes(logits: Tensor, count: int, name: str) -> None:
    if logits.shape[1] < count:
        raise ValueError(
            f"Expected at least {count} classes for the loss {name} but got {logits.shape[1]}; use margin."
        )
