# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy with hard or soft targets and every common convention of label smoothing."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.precision import autocast_off, full_precision

__all__ = ["CrossEntropy", "cross_entropy"]

Reduction = Literal["mean", "sum", "none"]
OffValue = Literal["k", "k_minus_1"]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
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
        target: Class indices ``[B, ...]`` (integers) or class probabilities of the shape of ``logits``.
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
    soft = target.is_floating_point()
    _check_shapes(logits, target, label_smoothing, weight, off_value)
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        classes = None if weight is None else _class_weights(weight, log_p)
        if soft:
            losses, denominator = _soft_losses(log_p, target, classes)
            kept = None
        else:
            losses, denominator, kept = _hard_losses(log_p, target, classes, ignore_index)
        if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
            smoothing = _over_all_classes(label_smoothing, off_value, log_p.shape[1])
            uniform = -(log_p if classes is None else log_p * classes).mean(1)
            losses = (1 - smoothing) * losses + smoothing * uniform
        if kept is not None:
            losses = torch.where(kept, losses, 0.0)
        return _reduce(losses, denominator, reduction)


def _class_weights(weight: Tensor, log_p: Tensor) -> Tensor:
    return weight.to(log_p).view(1, -1, *[1] * (log_p.ndim - 2))


def _hard_losses(
    log_p: Tensor, target: Tensor, classes: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the labels, the sum of the weights of the kept ones, and which ones are kept."""
    target = target.long()
    kept = target != ignore_index
    index = torch.where(kept, target, 0).unsqueeze(1)
    try:
        losses = -log_p.gather(1, index).squeeze(1)
    except (IndexError, RuntimeError) as error:
        bad = kept & ((target < 0) | (target >= log_p.shape[1]))
        if not bool(bad.any()):
            raise
        raise ValueError(
            f"Expected labels to be in [0, {log_p.shape[1] - 1}] for logits of {log_p.shape[1]} classes, or "
            f"`ignore_index` = {ignore_index}, but got {int(target[bad][0])}."
        ) from error
    if classes is None:
        return losses, kept.sum(), kept
    weights = classes.expand_as(log_p).gather(1, index).squeeze(1)
    return losses * weights, torch.where(kept, weights, 0.0).sum(), kept


def _soft_losses(log_p: Tensor, target: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses of the probabilities and their number."""
    weighted = target.to(log_p.dtype) if classes is None else target.to(log_p.dtype) * classes
    losses = -(weighted * log_p).sum(1)
    return losses, torch.full((), losses.numel(), device=losses.device)


def _over_all_classes(label_smoothing: float | Tensor, off_value: str, classes: int) -> float | Tensor:
    """Smoothing in the convention that spreads it over all classes."""
    return label_smoothing * (classes / (classes - 1)) if off_value == "k_minus_1" else label_smoothing


def _reduce(losses: Tensor, denominator: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    # Nothing counts when every label is ignored or has weight zero: 0 instead of 0 / 0.
    nothing = denominator == 0
    return torch.where(nothing, total * 0, total / torch.where(nothing, 1, denominator))


def _check_shapes(
    logits: Tensor, target: Tensor, smoothing: float | Tensor, weight: Tensor | None, off_value: str
) -> None:
    if logits.ndim < 2:
        raise ValueError(f"Expected `logits` to be [B, C] or [B, C, ...] but got shape {tuple(logits.shape)}.")
    classes, samples = logits.shape[1], logits.shape[:1] + logits.shape[2:]
    if target.shape != (logits.shape if target.is_floating_point() else samples):
        raise ValueError(
            f"Expected `target` to be class indices of shape {tuple(samples)} or floating-point class probabilities "
            f"of shape {tuple(logits.shape)} but got shape {tuple(target.shape)} and {target.dtype}."
        )
    if isinstance(smoothing, Tensor):
        if smoothing.shape not in ((), samples):
            raise ValueError(f"Expected `label_smoothing` of shape {tuple(samples)} but got {tuple(smoothing.shape)}.")
    else:
        _check_smoothing(smoothing)
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"Expected `weight` to have {classes} entries but got shape {tuple(weight.shape)}.")
    if off_value == "k_minus_1" and classes < 2:
        raise ValueError("Expected at least 2 classes for `off_value` = 'k_minus_1' but got 1.")


def _check_smoothing(value: float) -> None:
    if not (math.isfinite(value) and value <= 1):
        raise ValueError(f"Expected `label_smoothing` to be a finite number <= 1 but got {value!r}.")


class CrossEntropy(Criterion):
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

    weight: Tensor | None

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        off_value: OffValue = "k",
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_smoothing(label_smoothing)
        check_choice("off_value", off_value, ("k", "k_minus_1"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.label_smoothing = label_smoothing
        self.off_value: OffValue = off_value
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        # The weights come from the arguments, so a checkpoint does not repeat them.
        self.register_buffer("weight", None if weight is None else torch.tensor(weight), persistent=False)

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, off_value=self.off_value, **self._options())

    def _options(self) -> dict[str, Any]:
        """Arguments that the functions of this class and of its kin share."""
        return {
            "label_smoothing": self.label_smoothing,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }

    @override
    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, off_value={self.off_value!r}, reduction={self.reduction!r}"
