# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy with hard or soft targets and every common convention of label smoothing."""

import math
from typing import Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["CrossEntropy", "cross_entropy"]

OffValue = Literal["k", "k_minus_1"]


def cross_entropy(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    label_smoothing: float | Tensor = 0.0,
    off_value: OffValue = "k",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of logits with class indices or class probabilities.

    With smoothing :math:`\epsilon` the target :math:`t` becomes :math:`(1-\epsilon)\,t + \epsilon/C`, which is the
    plain loss plus :math:`\epsilon\,(\langle t, z\rangle - \bar z)`. Negative smoothing is allowed. The mean is
    torch's: hard targets divide by the sum of the class weights of the kept labels, soft targets by the number of
    rows. Unlike torch, a batch in which every label is ignored gives 0 with zero gradients instead of NaN.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices ``[B, ...]`` (integers), class probabilities of the shape of ``logits``, or a mixture.
        label_smoothing: Mass that the label loses, at most 1; a tensor ``[B, ...]`` gives every sample its own.
        off_value: ``"k"`` spreads the mass over all ``C`` classes, ``"k_minus_1"`` over the wrong ones only.
        weight: Weight of each class, ``[C]``.
        ignore_index: Hard label of the samples that do not count. Soft targets have no such label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes do not fit, or if a label is neither a class nor ``ignore_index``. Labels are looked at
            only after the lookup failed, so the check costs nothing; on a GPU the driver reports the bad index
            instead, because asking for it would make every step wait.

    References:
        Szegedy et al., arXiv:1512.00567 (label smoothing). Wei et al., arXiv:2106.04149 (negative smoothing).

    Example:
        >>> import torch
        >>> from lightning_robust.losses import cross_entropy
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, -100]), label_smoothing=0.1)
        tensor(0.3365)
    """
    check_choice("off_value", off_value, ("k", "k_minus_1"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    with autocast_off(logits):
        wide = full_precision(logits)
        if weight is None and not isinstance(label_smoothing, Tensor) and label_smoothing == 0:
            plain = _plain(wide, target, ignore_index, reduction)
            if plain is not None:
                return plain
        seen = Target.of(wide, target, weight=weight, ignore_index=ignore_index)
        return seen.reduce(_losses(wide, seen, label_smoothing, off_value), reduction)


def _plain(logits: Tensor, target: Tensor | MixedTarget, ignore_index: int, reduction: Reduction) -> Tensor | None:
    """The loss of class indices without weights and smoothing by torch's fused function; ``None`` for anything else.

    For small batches, whose cost is that of the calls, it takes half the time.
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or reduction == "none":
        return None
    if logits.ndim < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        return None  # refused where all targets are looked at
    target = target.long()
    try:
        total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    except (IndexError, RuntimeError):
        return None
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


def _losses(logits: Tensor, target: Target, label_smoothing: float | Tensor, off_value: OffValue) -> Tensor:
    _check_options(logits, label_smoothing, off_value)
    log_p = logits.log_softmax(1)
    losses = -target.expected(log_p)
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        smoothing = _over_all_classes(label_smoothing, off_value, log_p.shape[1])
        losses = (1 - smoothing) * losses - smoothing * target.weigh_classes(log_p).mean(1)
    return losses


def _over_all_classes(label_smoothing: float | Tensor, off_value: str, classes: int) -> float | Tensor:
    """Smoothing in the convention that spreads it over all classes."""
    return label_smoothing * (classes / (classes - 1)) if off_value == "k_minus_1" else label_smoothing


def _check_options(logits: Tensor, smoothing: float | Tensor, off_value: str) -> None:
    if isinstance(smoothing, Tensor):
        samples = logits.shape[:1] + logits.shape[2:]
        if smoothing.shape not in ((), samples):
            raise ValueError(f"Expected `label_smoothing` of shape {tuple(samples)} but got {tuple(smoothing.shape)}.")
    else:
        _check_smoothing(smoothing)
    if off_value == "k_minus_1" and logits.shape[1] < 2:
        raise ValueError("Expected at least 2 classes for `off_value` = 'k_minus_1' but got 1.")


def _check_smoothing(value: float) -> None:
    if not (math.isfinite(value) and value <= 1):
        raise ValueError(f"Expected `label_smoothing` to be a finite number <= 1 but got {value!r}.")


class CrossEntropy(SampleCriterion):
    r"""Cross-entropy of logits with class indices or class probabilities, with optional label smoothing.

    The module form of :func:`cross_entropy`; runs wherever the training step calls its criterion and costs one
    ``log_softmax``. It differs from ``torch.nn.CrossEntropyLoss`` in four points: it computes in float32 under any
    precision, allows negative smoothing, knows the other smoothing convention, and returns 0 with zero gradients for
    a batch in which every label is ignored.

    Args:
        label_smoothing: Mass that the label loses; 0.1 is the usual value for ImageNet, 0.05 in calibration papers,
            negative values sharpen. Mixed targets of timm are smoothed already: do not smooth twice.
        off_value: ``"k"`` spreads the mass over all classes, ``"k_minus_1"`` over the wrong ones only.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]`` or the shape of ``logits``.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`cross_entropy` refuses.

    References:
        Szegedy et al., arXiv:1512.00567. Wei et al., arXiv:2106.04149 (negative smoothing).

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CrossEntropy
        >>> criterion = CrossEntropy(label_smoothing=0.1)
        >>> criterion(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.3365)
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        off_value: OffValue = "k",
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        _check_smoothing(label_smoothing)
        check_choice("off_value", off_value, ("k", "k_minus_1"))
        self.label_smoothing = label_smoothing
        self.off_value: OffValue = off_value

    @override
    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        # not for kin, whose scores are not the logits
        if type(self) is CrossEntropy and not context and self.weight is None and self.label_smoothing == 0:
            with autocast_off(logits):
                plain = _plain(full_precision(logits), target, self.ignore_index, self.reduction)
            if plain is not None:
                return plain
        return super().forward(logits, target, **context)

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return _losses(logits, target, self.label_smoothing, self.off_value)

    @override
    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, off_value={self.off_value!r}, reduction={self.reduction!r}"
