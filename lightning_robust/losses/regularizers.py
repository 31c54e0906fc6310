# SPDX-License-Identifier: Apache-2.0
"""Base class of the label-free penalties on logits."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.schedules import Coefficient, Schedule

__all__ = ["LogitRegularizer"]


class LogitRegularizer(nn.Module):
    """A coefficient times the mean of a penalty on logits that needs no labels; adds to any criterion.

    Subclasses implement :meth:`penalty`. The coefficient is a number or a :class:`Schedule`; a schedule is told the
    epoch by :meth:`set_progress`, which the callback ``LogitRegularization`` calls at the start of every epoch.

    Args:
        coefficient: Factor of the mean penalty.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` and ``mask`` ``[B, ...]`` give a scalar.

    Raises:
        RuntimeError: If a schedule was never told the epoch.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import LogitRegularizer
        >>> class Spread(LogitRegularizer):
        ...     name = "spread"
        ...     def penalty(self, logits):
        ...         return logits.var(1)
        >>> Spread(coefficient=0.5)(torch.tensor([[0.0, 2.0], [3.0, 3.0]]), torch.tensor([True, False]))
        tensor(1.)
    """

    #: Whether :meth:`observe` and :meth:`validation_ends` have to be called; the callback does.
    needs_validation: bool = False
    name: ClassVar[str] = "penalty"  # the callback logs the penalty under this name
    coefficient_name: ClassVar[str] = "coefficient"  # what the constructor of the subclass calls it

    def __init__(self, *, coefficient: float | Schedule) -> None:
        super().__init__()
        self._coefficient = Coefficient(
            self.coefficient_name, coefficient, owner=type(self).__name__, callback="LogitRegularization"
        )

    @property
    def schedule(self) -> Schedule:
        """The coefficient over the run."""
        return self._coefficient.schedule

    @property
    def coefficient(self) -> float:
        """Factor of the mean penalty in the current epoch."""
        return self._coefficient.value

    def set_progress(self, epoch: int, max_epochs: int) -> None:
        """Tell the schedule the epoch (counted from 0) and the number of epochs of the run (-1: unknown)."""
        self._coefficient.set_progress(epoch, max_epochs)

    def observe(self, logits: Tensor, target: Tensor) -> None:
        """Look at a validation batch."""

    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None:
        """Close a validation epoch, in all processes at once; ``total`` sums a tensor over them."""

    def penalty(self, logits: Tensor) -> Tensor:
        """Return the penalty of each sample, ``[B, ...]`` for logits ``[B, C, ...]``, without the coefficient."""
        raise NotImplementedError

    def mean_penalty(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean penalty without the coefficient, over the samples whose ``mask`` is true."""
        with autocast_off(logits):
            penalties = self.penalty(full_precision(logits))
            if mask is None:
                return penalties.sum() / max(penalties.numel(), 1)
            if mask.shape != penalties.shape:
                raise ValueError(f"Expected `mask` of shape {tuple(penalties.shape)} but got {tuple(mask.shape)}.")
            return torch.where(mask, penalties, 0.0).sum() / mask.sum().clamp(min=1)

    @override
    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.coefficient * self.mean_penalty(logits, mask)

    @override
    def extra_repr(self) -> str:
        return f"{self.coefficient_name}={self.schedule!r}"
