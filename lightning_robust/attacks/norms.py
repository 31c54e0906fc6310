# SPDX-License-Identifier: Apache-2.0
"""The geometry of a perturbation budget: length, steepest direction, projection and random points of a ball."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.projections import project_l1_box
from lightning_robust.attacks.space import InputSpace
from lightning_robust.checks import check_in_range

__all__ = ["L1", "L2", "NORMS", "Linf", "Norm", "per_sample"]


class Norm(ABC):
    """What an attack has to know about the ball ``{delta: ||delta|| <= eps}``; every method works per sample.

    Shape:
        Perturbations and gradients are ``[B, ...]``; lengths are ``[B]``; a radius ``eps`` is a number or ``[B]``.
    """

    name: ClassVar[str]

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """Length ``[B]`` of each perturbation."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length one that increases the loss most; zero where the gradient is exactly zero."""

    def direction_on_images(self, x_adv: Tensor, gradient: Tensor, space: InputSpace) -> Tensor:
        """The direction of steepest ascent at images whose pixels have bounds: here :meth:`direction`.

        Args:
            x_adv: images to move.
            gradient: gradient with respect to their pixels.
            space: the possible images.
        """
        return self.direction(gradient)

    @abstractmethod
    def project(self, delta: Tensor, eps: float | Tensor) -> Tensor:
        """The nearest point of the ball of radius ``eps``."""

    def project_on_images(self, x: Tensor, delta: Tensor, eps: float | Tensor, space: InputSpace) -> Tensor:
        """The point of the ball from which clipping to possible pixels leads to a good one: here :meth:`project`.

        Args:
            x: clean images.
            delta: perturbation in pixel units.
            eps: radius.
            space: the possible images.
        """
        return self.project(delta, eps)

    @abstractmethod
    def uniform(self, like: Tensor, eps: float | Tensor, draws: Draws) -> Tensor:
        """A point drawn uniformly in the ball, shaped and placed like ``like``."""

    def radial(self, like: Tensor, eps: float | Tensor, draws: Draws) -> Tensor:
        """A random direction of length ``eps * U(0, 1)``: denser at the centre than :meth:`uniform`."""
        noise = draws.normal(like)
        length = draws.uniform(like.new_empty(len(like)))
        return noise * per_sample(eps * length / self.size(noise), like)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Linf(Norm):
    """The largest change of any entry.

    Example:
        >>> Linf().project(torch.tensor([[0.5, -0.1]]), eps=0.2)
        tensor([[ 0.2000, -0.1000]])
    """

    name = "linf"

    def size(self, delta: Tensor) -> Tensor:
        """Largest absolute entry of each sample."""
        return delta.abs().flatten(1).amax(1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The sign of the gradient."""
        return gradient.sign()

    def project(self, delta: Tensor, eps: float | Tensor) -> Tensor:
        """Entries clipped to ``[-eps, eps]``."""
        if isinstance(eps, Tensor):
            eps = per_sample(eps, delta)
            return delta.clamp(-eps, eps)
        return delta.clamp(-eps, eps)

    def uniform(self, like: Tensor, eps: float | Tensor, draws: Draws) -> Tensor:
        """Independent entries ``U(-eps, eps)``."""
        if isinstance(eps, Tensor):
            return draws.uniform(like, -1.0, 1.0) * per_sample(eps, like)
        return draws.uniform(like, -eps, eps)


class L2(Norm):
    """The Euclidean length of each sample's perturbation.

    Example:
        >>> L2().project(torch.tensor([[3.0, 4.0]]), eps=1.0)
        tensor([[0.6000, 0.8000]])
    """

    name = "l2"

    def size(self, delta: Tensor) -> Tensor:
        """Euclidean length of each sample."""
        length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return length

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient divided by its length."""
        # scaled by its largest entry first: the squares of gradients of confident samples underflow
        tiny = torch.finfo(gradient.dtype).tiny
        largest = gradient.abs().flatten(1).amax(1)
        scaled = gradient / per_sample(largest.clamp(min=tiny), gradient)
        return scaled / per_sample(self.size(scaled).clamp(min=tiny), gradient)

    def project(self, delta: Tensor, eps: float | Tensor) -> Tensor:
        """Samples longer than ``eps`` shrunk to it, never a rounding error above."""
        if not isinstance(eps, Tensor):
            return torch.renorm(delta, p=2, dim=0, maxnorm=eps)
        # a few units in the last place below, as renorm stays
        room = eps * (1 - 4 * torch.finfo(delta.dtype).eps)
        factor = room / self.size(delta).clamp(min=torch.finfo(delta.dtype).tiny)
        return delta * per_sample(torch.where(self.size(delta) > eps, factor, 1), delta)

    def uniform(self, like: Tensor, eps: float | Tensor, draws: Draws) -> Tensor:
        """A Gaussian direction of length ``eps * U(0, 1) ** (1 / d)``."""
        noise = draws.normal(like)
        volume = draws.uniform(like.new_empty(len(like)))
        length = eps * volume ** (1 / like[0].numel())
        return noise * per_sample(length / self.size(noise), like)


class L1(Norm):
    """The sum of the absolute entries.

    The steepest step moves a single entry, which is soon at its bound. Moving several at once loses little of the
    ascent and gets much further in the same number of steps.

    Args:
        fraction: fraction of a sample's entries that :meth:`direction` moves, those of largest gradient; at least one.

    References:
        Tramer and Boneh, Adversarial Training and Robustness for Multiple Perturbations, arXiv 1904.13000 (SLIDE).

    Example:
        >>> L1().project(torch.tensor([[0.5, -0.2]]), eps=0.4)
        tensor([[ 0.3500, -0.0500]])
    """

    name = "l1"

    def __init__(self, fraction: float = 0.01) -> None:
        check_in_range("fraction", fraction, 0, 1)
        self.fraction = fraction

    def size(self, delta: Tensor) -> Tensor:
        """Sum of the absolute entries of each sample."""
        return delta.abs().flatten(1).sum(1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The signs of the largest entries of the gradient, divided by their number."""
        flat = gradient.flatten(1)
        count = max(1, round(self.fraction * flat.shape[1]))
        largest = flat.abs().topk(count, dim=1).indices
        moved = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return (moved / moved.abs().sum(1, keepdim=True).clamp(min=1)).view_as(gradient)

    def direction_on_images(self, x_adv: Tensor, gradient: Tensor, space: InputSpace) -> Tensor:
        """The same of the entries that can still move; otherwise those at their bound would take up all steps."""
        pixels, (low, high) = space.pixels(x_adv), space.bounds
        slack = 1e-6 * (high - low)
        stuck = torch.where(gradient > 0, pixels >= high - slack, pixels <= low + slack)
        return self.direction(gradient.masked_fill(stuck, 0.0))

    def project(self, delta: Tensor, eps: float | Tensor) -> Tensor:
        """Entries moved towards zero by the same amount, as far as ``eps`` demands."""
        return project_l1_box(torch.zeros_like(delta), delta, eps, -math.inf, math.inf)

    def project_on_images(self, x: Tensor, delta: Tensor, eps: float | Tensor, space: InputSpace) -> Tensor:
        """The nearest point of the ball that leads to possible pixels; clipped afterwards it would be far from it."""
        return project_l1_box(space.pixels(x), delta, eps, *space.bounds)

    def uniform(self, like: Tensor, eps: float | Tensor, draws: Draws) -> Tensor:
        """Exponential entries with random signs, divided by their sum and that of one more."""
        drawn = draws.uniform(like, -1.0, 1.0)
        extent = -torch.log1p(-drawn.abs().clamp(max=1 - torch.finfo(like.dtype).eps))
        further = -torch.log1p(-draws.uniform(like.new_empty(len(like))))
        return extent * drawn.sign() * per_sample(eps / (self.size(extent) + further), like)


#: The norms by the name that an attack's ``norm`` argument takes.
NORMS: dict[str, Norm] = {norm.name: norm for norm in (Linf(), L2(), L1())}


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """One number per sample, shaped to combine with ``like``."""
    return value.view(-1, *[1] * (like.ndim - 1))
