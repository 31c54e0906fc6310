# SPDX-License-Identifier: Apache-2.0
"""How APGD moves in the l1 norm: sparse steps, whose number of pixels adapts, and budgets that begin too large."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.climb import Outcome, Steps
from lightning_robust.attacks.norms import per_sample
from lightning_robust.attacks.region import Region

__all__ = ["SparseSteps", "budgets", "sparse_direction"]

_FIRST_FRACTION = 0.2  # of the pixels, in the first steps
_SPARSER = 1.5  # a step moves this many times fewer pixels than the best point so far
_SLOWER = 1.5  # the step length is divided by this where the best point has not become sparser
_SMALLEST = 10.0  # and stays above eps / 10


def sparse_direction(gradient: Tensor, fraction: Tensor) -> Tensor:
    r"""The signs of the largest entries of a gradient, of l1 norm one.

    Args:
        gradient: ``[B, ...]``.
        fraction: part ``[B]`` of the entries that is kept; at least one is, and all that are as large as it.

    Example:
        >>> sparse_direction(torch.tensor([[3.0, -2.0, 1.0, 0.0]]), torch.tensor([0.5]))
        tensor([[ 0.5000, -0.5000,  0.0000,  0.0000]])
    """
    size = gradient.abs().flatten(1)
    count = size.shape[1]
    place = ((1 - fraction) * count).clamp(0, count - 1).long()
    least = size.sort(1).values.gather(1, place[:, None])
    signs = torch.where(size >= least, gradient.flatten(1).sign(), 0.0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).view_as(gradient)


def budgets(eps: float, steps: int, *, larger: bool) -> list[tuple[float, int]]:
    """Radius and number of steps of each phase: 3, 2 and 1 times ``eps`` for 30, 30 and 40% of the steps, if larger.

    Args:
        eps: the budget.
        steps: steps of all phases.
        larger: whether to begin with larger budgets.

    Example:
        >>> budgets(12.0, 100, larger=True)
        [(36.0, 30), (24.0, 30), (12.0, 40)]
    """
    first = math.ceil(0.3 * steps) if larger else 0
    second = min(first, steps - first)
    phases = [(3 * eps, first), (2 * eps, second), (eps, steps - first - second)]
    return [phase for phase in phases[:-1] if phase[1]] + phases[-1:]


class SparseSteps(Steps):
    """Steps along the signs of the largest entries of the gradient, without momentum.

    Every 4% of the steps the fraction of the entries becomes that of the best point, divided by 1.5. Where the best
    point has lost more than 5% of its pixels since, the run returns to it with the largest step; elsewhere steps
    become shorter.

    Args:
        region: the budget.
        count: number of steps of the run.
        resume: continue from a point that is sparse already, as the later phases of a schedule do.
    """

    def __init__(self, region: Region, count: int, *, resume: bool) -> None:
        self.region, self.resume = region, resume
        self._period, self._since = max(int(0.04 * count), 1), -1
        self._entries = math.prod(region.x.shape[1:])
        self._size = torch.full_like(region.x.flatten(1)[:, 0], region.eps)
        self._fraction = torch.full_like(self._size, _FIRST_FRACTION)
        self._pixels = torch.full_like(self._size, self._entries)

    @override
    def begin(self, x_adv: Tensor) -> Tensor:
        x_adv = self.region.project(x_adv)
        if self.resume:
            self._pixels = self._moved(x_adv)
            self._fraction = self._pixels / self._entries / _SPARSER
        return x_adv

    @override
    def move(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        space = self.region.space
        direction = sparse_direction(space.pixel_gradient(gradient), self._fraction)
        size = per_sample(self._size, x_adv)
        return self.region.project(x_adv + space.from_pixels(size * direction))

    @override
    def check(self, loss: Tensor, best: Outcome) -> Tensor | None:
        self._since += 1
        if self._since < self._period:
            return None
        self._since = 0
        pixels = self._moved(best.x_adv)
        sparser = pixels / self._pixels < 0.95
        largest = self.region.eps
        shorter = (self._size / _SLOWER).clamp(min=largest / _SMALLEST)
        self._size = torch.where(sparser, largest, shorter)
        self._pixels, self._fraction = pixels, pixels / self._entries / _SPARSER
        return sparser

    @override
    def keep(self, rows: Tensor) -> None:
        self.region.keep(rows)
        self._size, self._fraction, self._pixels = self._size[rows], self._fraction[rows], self._pixels[rows]

    def _moved(self, x_adv: Tensor) -> Tensor:
        return (x_adv != self.region.x).flatten(1).sum(1).to(self._size)
