# SPDX-License-Identifier: Apache-2.0
"""The geometry of a perturbation budget: length, steepest direction, projection and random points of a ball."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["L2", "NORMS", "Linf", "Norm"]


class Norm(ABC):
    """What an attack has to know about the ball ``{delta: ||delta|| <= eps}``; every method works per sample.

    Shape:
        Perturbations and gradients are ``[B, ...]``; lengths are ``[B]``.
    """

    name: ClassVar[str]

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """Length ``[B]`` of each perturbation."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length one that increases the loss most; zero where the gradient is exactly zero."""

    @abstractmethod
    def project(self, delta: Tensor, eps: float) -> Tensor:
        """The nearest point of the ball of radius ``eps``."""

    @abstractmethod
    def uniform(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """A point drawn uniformly in the ball, shaped and placed like ``like``."""

    def radial(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """A random direction of length ``eps * U(0, 1)``: denser at the centre than :meth:`uniform`."""
        noise = torch.empty_like(like).normal_(generator=generator)
        length = torch.rand(len(like), generator=generator, device=like.device, dtype=like.dtype)
        return noise * _per_sample(eps * length / self.size(noise), like)

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

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Entries clipped to ``[-eps, eps]``."""
        return delta.clamp(-eps, eps)

    def uniform(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Independent entries ``U(-eps, eps)``."""
        return torch.empty_like(like).uniform_(-eps, eps, generator=generator)


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
        scaled = gradient / _per_sample(largest.clamp(min=tiny), gradient)
        return scaled / _per_sample(self.size(scaled).clamp(min=tiny), gradient)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Samples longer than ``eps`` shrunk to it, never a rounding error above."""
        return torch.renorm(delta, p=2, dim=0, maxnorm=eps)

    def uniform(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """A Gaussian direction of length ``eps * U(0, 1) ** (1 / d)``."""
        noise = torch.empty_like(like).normal_(generator=generator)
        volume = torch.rand(len(like), generator=generator, device=like.device, dtype=like.dtype)
        length = eps * volume ** (1 / like[0].numel())
        return noise * _per_sample(length / self.size(noise), like)


#: The norms by the name that an attack's ``norm`` argument takes.
NORMS: dict[str, Norm] = {norm.name: norm for norm in (Linf(), L2())}


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))
