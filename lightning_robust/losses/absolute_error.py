# SPDX-License-Identifier: Apache-2.0
"""Losses that are linear in the probability of the label: mean absolute error, reverse and symmetric cross-entropy."""

import math

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.gce import check_min_probability
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["LOG_ZERO", "MAE", "RCE", "SCE", "check_log_zero", "mae_loss", "rce_loss", "reverse"]

#: What the reverse cross-entropy takes for the logarithm of zero.
LOG_ZERO = math.log(1e-4)


def reverse(log_p: Tensor, target: Target, log_zero: float, min_probability: float = 0.0) -> Tensor:
    """Probability of everything but the target, times ``-log_zero``.

    Args:
        log_p: Logarithms of probabilities, ``[B, C, ...]``.
        target: The target.
        log_zero: Below zero.
        min_probability: Floor of the probabilities.

    Example:
        >>> import torch
        >>> log_p = torch.tensor([[0.25, 0.75]]).log()
        >>> reverse(log_p, Target.of(log_p, torch.tensor([0])), -2.0)
        tensor([1.5000])
    """
    if min_probability > 0:
        floored = log_p.exp().clamp(min=min_probability)
        return target.expected(-log_zero * (floored.sum(1, keepdim=True) - floored))
    return target.expected(log_p, lambda picked: log_zero * picked.expm1())


def mae_loss(logits: Tensor, target: Tensor | MixedTarget | Target) -> Tensor:
    r"""Mean absolute error of each sample, :math:`1 - p_y`: half the distance of :math:`p` to the one-hot label.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture, :math:`1 - \langle t, p \rangle`.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Ghosh et al., arXiv:1712.09482. Ma et al., arXiv:2006.13554 (the halved form).

    Example:
        >>> import torch
        >>> mae_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.1192])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return reverse(log_p, Target.of(log_p, target), -1.0)


def rce_loss(
    logits: Tensor,
    target: Tensor | MixedTarget | Target,
    *,
    log_zero: float = LOG_ZERO,
    min_probability: float = 0.0,
) -> Tensor:
    r"""Reverse cross-entropy of each sample, :math:`-\sum_k p_k \log t_k = |A|\,(1 - p_y)` with :math:`\log 0 := A`.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture; soft targets are lifted,
            :math:`|A|\,(1 - \langle t, p \rangle)`.
        log_zero: :math:`A`, below zero.
        min_probability: Floor of the probabilities of all wrong classes; there is no gradient below it.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Wang et al., arXiv:1908.06112.

    Example:
        >>> import torch
        >>> rce_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([1.0979])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return reverse(log_p, Target.of(log_p, target), log_zero, min_probability)


def check_log_zero(log_zero: float) -> None:
    """Raise ``ValueError`` unless ``log_zero`` is a finite number below zero."""
    if not (math.isfinite(log_zero) and log_zero < 0):
        raise ValueError(f"Expected `log_zero` to be a finite number < 0 but got {log_zero!r}.")


class MAE(SampleCriterion):
    r"""Mean absolute error: as robust to label noise as a loss can be, and as slow to learn from.

    .. math:: 1 - p_y = \tfrac12 \sum_k |p_k - t_k|

    Soft and mixed targets give :math:`1 - \langle t, p \rangle`.

    Cost: that of the cross-entropy.

    Args:
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: What every criterion refuses.

    References:
        Ghosh et al., arXiv:1712.09482, whose loss is twice this one. Ma et al., arXiv:2006.13554.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import MAE
        >>> MAE()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1192)
    """

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return mae_loss(logits, target)


class RCE(SampleCriterion):
    r"""Reverse cross-entropy: prediction and label change places; the mean absolute error times a constant.

    .. math:: -\sum_k p_k \log t_k = |A|\,(1 - p_y), \qquad \log 0 := A

    Soft and mixed targets give :math:`|A|\,(1 - \langle t, p \rangle)`.

    Cost: that of the cross-entropy; with ``min_probability`` some passes over the logits more.

    Args:
        log_zero: :math:`A`; the default is :math:`\log 10^{-4} \approx -9.21`.
        min_probability: Floor of the probabilities, without gradient below it; 1e-7 reproduces the published codes.
            The formula needs none.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If an argument is out of range, or for what every criterion refuses.

    References:
        Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, arXiv:1908.06112.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import RCE
        >>> RCE()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(1.0979)
    """

    def __init__(
        self,
        *,
        log_zero: float = LOG_ZERO,
        min_probability: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_log_zero(log_zero)
        check_min_probability(min_probability)
        self.log_zero = log_zero
        self.min_probability = min_probability

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return rce_loss(logits, target, log_zero=self.log_zero, min_probability=self.min_probability)

    @override
    def extra_repr(self) -> str:
        return f"log_zero={self.log_zero:.4g}, min_probability={self.min_probability}, reduction={self.reduction!r}"


class SCE(RCE):
    r"""Symmetric cross-entropy: cross-entropy to learn, reverse cross-entropy to stand noise.

    .. math:: -\alpha \log p_y + \beta\,|A|\,(1 - p_y)

    Cost: that of the cross-entropy; with ``min_probability`` some passes over the logits more.

    Args:
        alpha: Share of the cross-entropy; 0.1 on CIFAR-10, 6 on CIFAR-100.
        beta: Share of the reverse cross-entropy; 1 on CIFAR-10, 0.1 on CIFAR-100.
        log_zero: See :class:`RCE`.
        min_probability: See :class:`RCE`.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If an argument is out of range, or for what every criterion refuses.

    References:
        Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, arXiv:1908.06112.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import SCE
        >>> SCE()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(1.1106)
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        log_zero: float = LOG_ZERO,
        min_probability: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            log_zero=log_zero,
            min_probability=min_probability,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        check_non_negative("alpha", alpha)
        check_non_negative("beta", beta)
        self.alpha = alpha
        self.beta = beta

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        reversed_loss = reverse(log_p, target, self.log_zero, self.min_probability)
        return self.beta * reversed_loss - self.alpha * target.expected(log_p)

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, {super().extra_repr()}"
