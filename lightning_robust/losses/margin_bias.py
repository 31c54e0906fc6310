# SPDX-License-Identifier: Apache-2.0
"""A loss that sees the logits of new classes raised, so that these need a margin to win against the old ones."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.wrapped import LogitTransform

__all__ = ["MarginBias"]


class MarginBias(LogitTransform):
    r"""Adds a constant to the logits of the new classes before a loss: margin-preserving training of model updates.

    .. math:: z_c \leftarrow z_c + b \quad \text{for } c \ge C_{old}

    A sample of an old class has to beat every new class by :math:`b` more; without the constant, at test time, the old
    classes keep the margins that they had before the new ones came. Only the loss sees raised logits. The published
    training adds two :class:`~lightning_robust.distillation.FocalDistillation` terms.

    Cost: one pass over the logits.

    Args:
        old_classes: Number of old classes :math:`C_{old}`, which come first.
        bias: The constant :math:`b`.
        base: The criterion that sees the raised logits; the cross-entropy when ``None``.

    Shape:
        What ``base`` takes and gives.

    Raises:
        ValueError: If an argument is out of range, the logits have no new class, or for what ``base`` refuses.

    References:
        Ricci et al., Mitigating Negative Flips via Margin Preserving Training, arXiv:2511.08322. Their code raises the
        logits in place, after the distillation terms have seen them.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import MarginBias
        >>> MarginBias(old_classes=1)(torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
        tensor(0.6931)
    """

    def __init__(self, *, old_classes: int, bias: float = 4.0, base: Criterion | None = None) -> None:
        super().__init__(base)
        check_integer("old_classes", old_classes, 1)
        if not math.isfinite(bias):
            raise ValueError(f"Expected `bias` to be a finite number but got {bias!r}.")
        self.old_classes = old_classes
        self.bias = bias

    @override
    def transform(self, logits: Tensor) -> Tensor:
        if logits.shape[1] <= self.old_classes:
            raise ValueError(
                f"Expected more classes than `old_classes` = {self.old_classes} but the logits have {logits.shape[1]}."
            )
        old, new = logits[:, : self.old_classes], logits[:, self.old_classes :]
        return torch.cat([old, new + self.bias], dim=1)

    @override
    def extra_repr(self) -> str:
        return f"old_classes={self.old_classes}, bias={self.bias}"
