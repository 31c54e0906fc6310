# SPDX-License-Identifier: Apache-2.0
"""Criteria around another criterion: what that one needs and is told goes through."""

from collections.abc import Callable

from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.cross_entropy import CrossEntropy
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget

__all__ = ["LogitTransform", "WrappedCriterion"]


class WrappedCriterion(Criterion):
    """A criterion that computes its loss with the help of another one; a subclass implements ``forward``.

    Args:
        base: The other criterion; the cross-entropy when ``None``.

    Example:
        >>> from lightning_robust.losses import CrossEntropy
        >>> class Twice(WrappedCriterion):
        ...     def forward(self, logits, target, **context):
        ...         return 2 * self.base(logits, target, **context)
        >>> import torch
        >>> Twice(CrossEntropy())(torch.zeros(1, 2), torch.tensor([0]))
        tensor(1.3863)
    """

    def __init__(self, base: Criterion | None = None) -> None:
        super().__init__()
        self.base: Criterion = CrossEntropy() if base is None else base
        self.needs = self.base.needs
        self.needs_epoch = self.base.needs_epoch
        self.needs_validation = self.base.needs_validation
        self.batch_level = self.base.batch_level
        self.soft_targets = self.base.soft_targets

    @override
    def samples_known(self, num_samples: int) -> None:
        self.base.samples_known(num_samples)

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        self.base.epoch_starts(epoch, max_epochs)

    @override
    def epoch_ends(self, epoch: int, total: Callable[[Tensor], Tensor]) -> None:
        self.base.epoch_ends(epoch, total)

    @override
    def synchronise(self, total: Callable[[Tensor], Tensor]) -> None:
        self.base.synchronise(total)

    @override
    def observe(self, logits: Tensor, target: Tensor) -> None:
        self.base.observe(logits, target)

    @override
    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None:
        self.base.validation_ends(total)


class LogitTransform(WrappedCriterion):
    """A criterion on transformed logits; a subclass implements :meth:`transform`.

    Args:
        base: The criterion that sees the transformed logits; the cross-entropy when ``None``.

    Example:
        >>> import torch
        >>> class Halved(LogitTransform):
        ...     def transform(self, logits):
        ...         return logits / 2
        >>> Halved()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.3133)
    """

    @property
    def reduction(self) -> str:
        """That of the base criterion."""
        return str(getattr(self.base, "reduction", "mean"))

    def transform(self, logits: Tensor) -> Tensor:
        """Return what the base criterion sees.

        Args:
            logits: ``[B, C]`` or ``[B, C, ...]`` in full precision.
        """
        raise NotImplementedError

    @override
    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        loss: Tensor = self.base(self._transformed(logits), target, **context)
        return loss

    @override
    def observe(self, logits: Tensor, target: Tensor) -> None:
        self.base.observe(self._transformed(logits), target)

    def _transformed(self, logits: Tensor) -> Tensor:
        if logits.ndim < 2:
            raise ValueError(f"Expected `logits` to be [B, C] or [B, C, ...] but got shape {tuple(logits.shape)}.")
        with autocast_off(logits):
            return self.transform(full_precision(logits))
