# SPDX-License-Identifier: Apache-2.0
"""A few samples of a loader, chosen once and kept."""

import random

import torch
from torch import Tensor

__all__ = ["FixedSamples"]


class FixedSamples:
    """Keeps some of the samples that pass, on their device.

    Args:
        limit: How many; ``None`` for all.
        seed: Seed of the choice. Every sample of the loader has the same chance, which matters for data sorted by
            class; the same loader gives the same samples.
        first: Keep the first ones instead, because the loader shuffles anyway and the samples are wanted early.
    """

    def __init__(self, limit: int | None, seed: int, *, first: bool) -> None:
        self._limit = limit
        self._first = first
        self._random = random.Random(seed)
        self._passed = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._batch: tuple[Tensor, Tensor] | None = None
        #: Nothing is taken any more.
        self.closed = False

    @property
    def ready(self) -> bool:
        """Whether the choice is final."""
        return self.closed or (self._first and self._full)

    @property
    def _full(self) -> bool:
        return self._limit is not None and len(self._kept) >= self._limit

    def offer(self, x: Tensor, y: Tensor) -> None:
        """Let a batch pass.

        Args:
            x: Inputs.
            y: Targets.

        Raises:
            ValueError: Their numbers differ.
        """
        if self.closed or (self._first and self._full):
            return
        if len(x) != len(y):
            raise ValueError(f"Expected as many targets as inputs but got {len(y)} for {len(x)}.")
        # clones of inference tensors must be ordinary ones, which autograd takes
        with torch.inference_mode(False):
            for index in range(len(x)):
                place = self._place()
                if place is not None:
                    self._kept[place : place + 1] = [(x[index].detach().clone(), y[index].detach().clone())]

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets in one batch; ``None`` if there are none. Nothing is taken any more.

        Raises:
            ValueError: The samples have different shapes.
        """
        self.closed = True
        if not self._kept:
            return self._batch
        inputs, targets = zip(*self._kept, strict=True)
        shapes = {tuple(x.shape) for x in inputs}
        if len(shapes) > 1:
            raise ValueError(
                f"The samples have different shapes ({', '.join(map(str, sorted(shapes)[:3]))}), so they make no "
                "batch; let the loader bring them to one size."
            )
        with torch.inference_mode(False):
            self._batch = torch.stack(inputs), torch.stack(targets)
        self._kept = []
        return self._batch

    def _place(self) -> int | None:
        """Where the next sample goes: reservoir sampling."""
        self._passed += 1
        if not self._full:
            return len(self._kept)
        if self._first or not self._kept:
            return None
        place = self._random.randrange(self._passed)
        return place if place < len(self._kept) else None
