# SPDX-License-Identifier: Apache-2.0
"""Moves of weights that wait for the optimizer's step."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_robust.sharpness.weights import Gradients

__all__ = ["PendingMoves"]


class PendingMoves:
    """Collects offsets until an optimizer has stepped, and then adds them to its weights.

    A hook on the optimizer does it, so that everything that looks at the weights after the step sees them moved. A step
    that a loss scaler skips does not call the hook; its moves are dropped when the next step begins to collect.

    Args:
        optimizer: whose steps are waited for.
        average: mean over processes of a list of tensors, in place; nothing in a single process.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> moves = PendingMoves(optimizer)
        >>> moves.add([weight], [torch.ones(1)])
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.item()
        0.0
    """

    def __init__(self, optimizer: torch.optim.Optimizer, average: Callable[[list[Tensor]], None] | None = None) -> None:
        self.share = 1.0
        self._average = average
        self._offsets: dict[int, tuple[Tensor, Tensor]] = {}
        self._window: int | None = None
        # the optimizer holds the hook, which must not keep this object and so the weights alive
        this = ref(self)

        def apply(*_: Any) -> None:
            moves = this()
            if moves is not None:
                moves._apply()

        self._handle = optimizer.register_step_post_hook(apply)

    def begin(self, window: int | None, share: float) -> None:
        """Say which optimizer step the following offsets belong to.

        Args:
            window: number of that step; offsets of another one are dropped. ``None`` if steps are not numbered.
            share: factor of each batch, one over the number of accumulated batches.
        """
        if window != self._window:
            self._offsets.clear()
        self._window = window
        self.share = share

    def add(self, tensors: list[Tensor], offsets: Gradients) -> None:
        """Add to what the weights will be moved by.

        Args:
            tensors: weights.
            offsets: one tensor per weight; they are handed over.
        """
        with torch.no_grad():
            if self.share != 1.0:
                torch._foreach_mul_(offsets, self.share)
            for tensor, offset in zip(tensors, offsets, strict=True):
                if id(tensor) in self._offsets:
                    self._offsets[id(tensor)][1].add_(offset)
                else:
                    self._offsets[id(tensor)] = tensor, offset

    def close(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()
        self._offsets.clear()

    @torch.no_grad()
    def _apply(self) -> None:
        if not self._offsets:
            return
        tensors, offsets = map(list, zip(*self._offsets.values(), strict=True))
        self._offsets.clear()
        if self._average is not None:
            self._average(offsets)
        torch._foreach_add_(tensors, offsets)
