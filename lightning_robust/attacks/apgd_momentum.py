# SPDX-License-Identifier: Apache-2.0
"""How APGD moves in linf and l2: steps with momentum, of a size that is halved at checkpoints."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.climb import Outcome, Steps
from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.attacks.region import Region

__all__ = ["MomentumSteps"]


class MomentumSteps(Steps):
    r"""Steps of APGD in linf and l2: momentum, and a step size that is halved at checkpoints.

    Checkpoints come after 22% of the steps, then each time 3% sooner, at least 6% apart. A step size is halved, and
    the run sent back to its best point, if fewer than ``rho`` of the steps since raised the loss, or if neither the
    step size nor the best loss has changed since the last checkpoint.

    Args:
        region: the budget.
        norm: ``"linf"`` or ``"l2"``.
        count: number of steps of the run.
        rho: the part of the steps that has to raise the loss.
        momentum: the part of an update that is new; the rest is the previous move.
    """

    def __init__(self, region: Region, norm: str, count: int, *, rho: float, momentum: float) -> None:
        self.region, self.rho, self.momentum = region, rho, momentum
        self._norm = NORMS[norm]
        self._period, self._since = max(int(0.22 * count), 1), -1
        self._sooner, self._shortest = max(int(0.03 * count), 1), max(int(0.06 * count), 1)
        self._size = torch.full_like(region.x.flatten(1)[:, 0], 2 * region.eps)
        self._rises = torch.zeros_like(self._size)
        self._halved = torch.ones_like(self._size, dtype=torch.bool)
        self._loss = self._best_loss = self._size
        self._previous: Tensor | None = None

    @override
    def begin(self, x_adv: Tensor) -> Tensor:
        return self.region.project(x_adv)

    @override
    def move(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        space = self.region.space
        size = per_sample(self._size, x_adv)
        step = space.from_pixels(size * self._norm.direction(space.pixel_gradient(gradient)))
        moved = self.region.project(x_adv + step)
        # in the first step the mean with no previous move is the move, but for the published rounding
        part, before = (1.0, x_adv) if self._previous is None else (self.momentum, self._previous)
        moved = self.region.project(x_adv + (moved - x_adv) * part + (x_adv - before) * (1 - part))
        self._previous = x_adv
        return moved

    @override
    def check(self, loss: Tensor, best: Outcome) -> Tensor | None:
        self._since += 1
        if self._since == 0:
            # the published code compares the first loss with zero, not with that of the start, and so does this one
            self._loss, self._best_loss = torch.zeros_like(loss), loss
            return None
        self._rises, self._loss = self._rises + (loss > self._loss), loss
        if self._since < self._period:
            return None
        too_few = self._rises <= self.rho * self._period
        stale = ~self._halved & (self._best_loss >= best.loss)
        self._halved, self._best_loss = too_few | stale, best.loss
        self._size = torch.where(self._halved, self._size / 2, self._size)
        self._rises, self._since = torch.zeros_like(self._rises), 0
        self._period = max(self._period - self._sooner, self._shortest)
        return self._halved

    @override
    def keep(self, rows: Tensor) -> None:
        self.region.keep(rows)
        self._size, self._rises, self._halved = self._size[rows], self._rises[rows], self._halved[rows]
        self._loss, self._best_loss = self._loss[rows], self._best_loss[rows]
        if self._previous is not None:
            self._previous = self._previous[rows]
