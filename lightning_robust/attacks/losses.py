# SPDX-License-Identifier: Apache-2.0
"""What attacks maximise: one number per sample, larger when the model is closer to being wrong."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ATTACK_LOSSES",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "kl_divergence",
    "labels_of",
    "margin",
    "probability_margin",
]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross entropy per sample, ``log sum_k exp z_k - sum_k y_k z_k``.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]`` or probabilities ``[B, C]``.

    Shape:
        Returns ``[B]``.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor([0.6931])
    """
    target = target.to(logits.dtype) if target.is_floating_point() else target.long()
    return F.cross_entropy(logits, target, reduction="none")


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
        >>> import torch
        >>> margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor([-2.])
    """
    own, others = _split(logits, target, "margin")
    return others.amax(1) - own


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
        >>> import torch
        >>> probability_margin(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.])
    """
    own, others = _split(logits.softmax(1), target, "probability_margin")
    return others.amax(1) - own


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
        >>> import torch
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
        >>> import torch
        >>> dlr_targeted(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), torch.tensor([0]), torch.tensor([3]))
        tensor([-1.])
    """
    _need_classes(logits, 4, "dlr_targeted")
    own, _ = _split(logits, target, "dlr_targeted")
    top = logits.topk(4, dim=1).values
    other = logits.gather(1, wanted.long().unsqueeze(1)).squeeze(1)
    return (other - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    r"""How far the prediction has moved, ``KL(p || q) = sum_k p_k (log p_k - log q_k)`` with ``q = softmax(z)``.

    Args:
        logits: ``[B, C]`` of the attacked images.
        reference: log-probabilities ``[B, C]`` of the clean images, ``log p``.

    Shape:
        Returns ``[B]``.

    Example:
        >>> import torch
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


#: The losses by the name that an attack's ``loss`` argument takes; "kl" gets clean log-probabilities as its target.
ATTACK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "prob-margin": probability_margin,
    "kl": kl_divergence,
}


def _split(values: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if target.ndim != 1:
        raise ValueError(f"Expected integer classes [B] for the loss {name} but got a target of {list(target.shape)}.")
    index = target.long().unsqueeze(1)
    return values.gather(1, index).squeeze(1), values.scatter(1, index, float("-inf"))


def _need_classes(logits: Tensor, count: int, name: str) -> None:
    if logits.shape[1] < count:
        raise ValueError(
            f"Expected at least {count} classes for the loss {name} but got {logits.shape[1]}; use margin."
        )
