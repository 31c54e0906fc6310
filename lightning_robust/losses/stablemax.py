# SPDX-License-Identifier: Apache-2.0
"""StableMax: a softmax that grows linearly, for training that has to go on after everything is classified."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.cross_entropy import CrossEntropy, cross_entropy
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["StableMax", "log_stablemax", "stable_exp", "stablemax", "stablemax_cross_entropy"]


def stable_exp(logits: Tensor) -> Tensor:
    r"""What takes the place of the exponential: :math:`s(x) = x + 1` for :math:`x \ge 0`, else :math:`1 / (1 - x)`.

    Args:
        logits: Any shape.

    Example:
        >>> stable_exp(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.5000, 1.0000, 2.0000])
    """
    above = logits >= 0
    distance = 1 + torch.where(above, logits, -logits)
    return torch.where(above, distance, 1 / distance)


def log_stablemax(logits: Tensor) -> Tensor:
    r"""Logarithm of the StableMax probabilities :math:`s(z_k) / \sum_j s(z_j)`; see :func:`stable_exp`.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Example:
        >>> log_stablemax(torch.tensor([[1.0, 0.0, -1.0]])).exp()
        tensor([[0.5714, 0.2857, 0.1429]])
    """
    with autocast_off(logits):
        return _log_scores(full_precision(logits)).log_softmax(1)


def stablemax(logits: Tensor) -> Tensor:
    """Probabilities of a model that was trained with :class:`StableMax`; those of the softmax mean nothing there.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Example:
        >>> stablemax(torch.tensor([[1.0, 0.0, -1.0]]))
        tensor([[0.5714, 0.2857, 0.1429]])
    """
    return log_stablemax(logits).exp()


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    double: bool = True,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of StableMax probabilities, :math:`-\log\big(s(z_y) / \sum_k s(z_k)\big)`.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices ``[B, ...]`` (integers) or class probabilities of the shape of ``logits``.
        double: Compute in float64 and return to the precision of the logits, float32 at least.
        label_smoothing: See :func:`cross_entropy`.
        weight: Weight of each class, ``[C]``.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: What :func:`cross_entropy` refuses.

    References:
        Prieto et al., arXiv:2501.04697.

    Example:
        >>> stablemax_cross_entropy(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.5596)
    """
    with autocast_off(logits):
        wide = full_precision(logits)
        loss = cross_entropy(
            _log_scores(wide.double() if double else wide),
            target,
            label_smoothing=label_smoothing,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        return loss.to(wide.dtype)


def _log_scores(logits: Tensor) -> Tensor:
    """Logarithm of :func:`stable_exp`."""
    scores: Tensor = _LogScores.apply(logits)
    return scores


class _LogScores(torch.autograd.Function):
    """The sign of a logit times log(1 + its magnitude); the derivative is 1 at 0, where autograd would find none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return logits.abs().log1p_().copysign_(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        logits: Tensor = ctx.saved_tensors[0]
        return upstream / (1 + logits.abs())


class StableMax(CrossEntropy):
    r"""Cross-entropy of probabilities that grow linearly with the logits instead of exponentially.

    .. math:: -\log \frac{s(z_y)}{\sum_k s(z_k)}, \qquad
              s(x) = \begin{cases} x + 1 & x \ge 0 \\ 1 / (1 - x) & x < 0 \end{cases}

    With the softmax, a model that classifies everything raises its logits until the loss rounds to zero, and training
    stops; with StableMax gradients fade slowly, so that it goes on ("grokking"). Runs wherever the training step calls
    its criterion. Unlike the softmax it notices a constant added to all logits: take probabilities and calibration from
    :func:`stablemax`, not from a softmax.

    Cost: float64 arithmetic and a logarithm per class: on a CPU six times a cross-entropy, 3.5 times in float32.

    Args:
        double: Compute in float64, as the authors do; ``False`` on devices without it (Apple's GPU).
        label_smoothing: Mass that the label loses.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]`` or the shape of ``logits``.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`cross_entropy` refuses.

    References:
        Prieto et al., Grokking at the Edge of Numerical Stability, arXiv:2501.04697. Their code knows hard labels only,
        returns float64, and without its cast to float64 has NaN gradients at a logit of exactly 1.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import StableMax
        >>> StableMax()(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.5596)
    """

    def __init__(
        self,
        *,
        double: bool = True,
        label_smoothing: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, reduction=reduction)
        # not `double`, which is a method of every module
        self.double_precision = double

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        scores = _log_scores(logits.double() if self.double_precision else logits)
        return super().sample_losses(scores, target, **context).to(logits.dtype)

    @override
    def extra_repr(self) -> str:
        return f"double={self.double_precision}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
