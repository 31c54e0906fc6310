# SPDX-License-Identifier: Apache-2.0
"""Losses divided by their sum over all labels, which makes them robust to symmetric label noise: NCE, NFL, NGCE."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.focal import focal_of
from lightning_robust.losses.gce import check_min_probability, check_q, power_minus_one
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["NCE", "NFL", "NGCE", "nce_loss", "nfl_loss", "ngce_loss", "normalised"]


def normalised(log_p: Tensor, target: Target, of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Any elementwise loss of the target, divided by its sum over all labels.

    Args:
        log_p: Logarithms of probabilities, ``[B, C, ...]``.
        target: The target.
        of: The loss as a function of ``log_p``; the cross-entropy by default.

    Raises:
        ValueError: If there is only one class.

    Example:
        >>> import torch
        >>> log_p = torch.tensor([[0.25, 0.75]]).log()
        >>> normalised(log_p, Target.of(log_p, torch.tensor([0])), lambda log_p: 1 - log_p.exp())
        tensor([0.7500])
    """
    if log_p.shape[1] < 2:
        raise ValueError("Expected logits of at least 2 classes but got 1: there, a normalised loss is 0 / 0.")
    return target.expected(log_p, of) / (log_p if of is None else of(log_p)).sum(1)


def nce_loss(logits: Tensor, target: Tensor | MixedTarget | Target) -> Tensor:
    r"""Normalised cross-entropy of each sample, :math:`\log p_y / \sum_k \log p_k`, between 0 and 1.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``, of at least two classes.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Ma et al., arXiv:2006.13554.

    Example:
        >>> import torch
        >>> nce_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.0563])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return normalised(log_p, Target.of(log_p, target))


def nfl_loss(logits: Tensor, target: Tensor | MixedTarget | Target, *, gamma: float = 0.5) -> Tensor:
    r"""Normalised focal loss of each sample; the factors :math:`(1 - p_k)^\gamma` are constants in the gradient.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``, of at least two classes.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        gamma: Exponent; 0 is :func:`nce_loss`.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Ma et al., arXiv:2006.13554.

    Example:
        >>> import torch
        >>> nfl_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.0215])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return normalised(log_p, Target.of(log_p, target), partial(focal_of, gamma=gamma, detach=True))


def ngce_loss(
    logits: Tensor, target: Tensor | MixedTarget | Target, *, q: float = 0.7, min_probability: float = 0.0
) -> Tensor:
    r"""Normalised generalised cross-entropy of each sample, :math:`(1 - p_y^q) / (C - \sum_k p_k^q)`.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``, of at least two classes.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        q: In (0, 1].
        min_probability: Floor of the probabilities; there is no gradient below it.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Ma et al., arXiv:2006.13554.

    Example:
        >>> import torch
        >>> ngce_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.0989])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        of = partial(power_minus_one, q=q, min_probability=min_probability)  # sign and 1 / q cancel
        return normalised(log_p, Target.of(log_p, target), of)


class NCE(SampleCriterion):
    r"""Normalised cross-entropy: robust to symmetric label noise, but slow to fit on its own.

    .. math:: \frac{-\log p_y}{\sum_k -\log p_k}

    Its gradient fades with the number of classes and with confidence; pair it with a passive loss
    (:class:`ActivePassive`). Soft and mixed targets lift the numerator only.

    Cost: one more pass over the logits than the cross-entropy.

    Args:
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: For logits of one class, or for what every criterion refuses.

    References:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, arXiv:2006.13554.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import NCE
        >>> NCE()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.0563)
    """

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return nce_loss(logits, target)


class NFL(SampleCriterion):
    r"""Normalised focal loss: the active half of :class:`ActivePassive` that asks less of certain samples.

    .. math:: \frac{-(1 - p_y)^\gamma \log p_y}{\sum_k -(1 - p_k)^\gamma \log p_k}

    The factors :math:`(1 - p)^\gamma` are constants in the gradient, as in the authors' code. Soft and mixed targets
    lift the numerator only.

    Cost: some passes over the logits more than the cross-entropy, for the factors of all classes.

    Args:
        gamma: Exponent; 0 is :class:`NCE`.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If ``gamma`` is negative, for logits of one class, or for what every criterion refuses.

    References:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, arXiv:2006.13554.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import NFL
        >>> NFL()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.0215)
    """

    def __init__(
        self,
        *,
        gamma: float = 0.5,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_non_negative("gamma", gamma)
        self.gamma = gamma

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return nfl_loss(logits, target, gamma=self.gamma)

    @override
    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, reduction={self.reduction!r}"


class NGCE(SampleCriterion):
    r"""Normalised generalised cross-entropy.

    .. math:: \frac{1 - p_y^q}{C - \sum_k p_k^q}

    Soft and mixed targets lift the numerator only.

    Cost: some passes over the logits more than the cross-entropy, for the powers of all classes.

    Args:
        q: In (0, 1]; see :class:`GCE`.
        min_probability: Floor of the probabilities, without gradient below it; 1e-7 reproduces the authors' code. The
            formula needs none.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If an argument is out of range, for logits of one class, or for what every criterion refuses.

    References:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, arXiv:2006.13554.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import NGCE
        >>> NGCE()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.0989)
    """

    def __init__(
        self,
        *,
        q: float = 0.7,
        min_probability: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_q(q)
        check_min_probability(min_probability)
        self.q = q
        self.min_probability = min_probability

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return ngce_loss(logits, target, q=self.q, min_probability=self.min_probability)

    @override
    def extra_repr(self) -> str:
        return f"q={self.q}, min_probability={self.min_probability}, reduction={self.reduction!r}"
