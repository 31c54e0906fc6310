# SPDX-License-Identifier: Apache-2.0
"""The points that an attack may return: within the budget and the possible pixels, in the type of the model too."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.norms import NORMS
from lightning_robust.attacks.projections import project_l1_box
from lightning_robust.attacks.space import InputSpace

__all__ = ["Cube", "Region", "add_inwards", "region"]

# what rounding may add to a budget, of the 1e-6 that an evaluation forgives: published float32 results hang on it
_SLACK = 8e-7


def add_inwards(x: Tensor, step: Tensor, dtype: torch.dtype, space: InputSpace) -> Tensor:
    """``x + step`` clipped to the possible images, as numbers of ``dtype`` that are no farther from ``x`` than asked.

    Rounding to nearest can lead out of a budget: in bfloat16 by a tenth of 8/255, in float32 by more than a millionth.

    Args:
        x: images, which ``dtype`` can hold.
        step: what to add, in the units of the images.
        dtype: the type whose numbers are allowed; the result is typed like ``x``.
        space: the possible images.
    """
    moved = space.clip(x + step)
    if dtype == x.dtype:
        closer = torch.nextafter(moved, x)
        # clipped again for images that are out of bounds by a rounding error
        return space.clip(torch.where((moved - x).abs() > step.abs() * (1 + _SLACK), closer, moved))
    rounded = moved.to(dtype).to(x.dtype)
    too_far = (rounded - x).abs() > torch.minimum(step.abs(), (moved - x).abs())
    back = _spacing(rounded, dtype)
    return torch.where(too_far, rounded + torch.minimum(torch.maximum(x - rounded, -back), back), rounded)


class Region(ABC):
    """The budget around each image of a batch, within the possible pixels.

    Args:
        x: clean images.
        eps: radius in pixel units.
        space: units and bounds of the images.
        dtype: the type the model takes; points are its numbers.
    """

    def __init__(self, x: Tensor, eps: float, space: InputSpace, dtype: torch.dtype) -> None:
        self.x, self.eps, self.space, self.dtype = x, eps, space, dtype

    @abstractmethod
    def project(self, point: Tensor) -> Tensor:
        """Images brought into the region."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Leave out all samples but the numbers ``rows``."""


class Cube(Region):
    """The budget of linf: every entry between ``low`` and ``high``.

    Args:
        x: clean images.
        eps: radius in pixel units.
        space: units and bounds of the images.
        dtype: the type the model takes; points are its numbers.
    """

    def __init__(self, x: Tensor, eps: float, space: InputSpace, dtype: torch.dtype) -> None:
        super().__init__(x, eps, space, dtype)
        step = space.from_pixels(torch.full_like(x, eps))
        self.low, self.high = (add_inwards(x, sign * step, dtype, space) for sign in (-1, 1))

    @override
    def project(self, point: Tensor) -> Tensor:
        point = torch.clamp(point, self.low, self.high)
        # rounding stays between numbers of the type, and what the model is asked about is what is returned
        return point if self.dtype == point.dtype else point.to(self.dtype).to(point.dtype)

    @override
    def keep(self, rows: Tensor) -> None:
        self.x, self.low, self.high = (each.index_select(0, rows) for each in (self.x, self.low, self.high))


class _Ball(Region):
    @override
    def project(self, point: Tensor) -> Tensor:
        delta = NORMS["l2"].project(self.space.to_pixels(point - self.x), self.eps)
        return add_inwards(self.x, self.space.from_pixels(delta), self.dtype, self.space)

    @override
    def keep(self, rows: Tensor) -> None:
        self.x = self.x.index_select(0, rows)


class _Diamond(Region):
    def __init__(self, x: Tensor, eps: float, space: InputSpace, dtype: torch.dtype) -> None:
        super().__init__(x, eps, space, dtype)
        self._below, self._above = (
            space.to_pixels(space.clip(torch.full_like(x, infinity)) - x) for infinity in (-torch.inf, torch.inf)
        )

    @override
    def project(self, point: Tensor) -> Tensor:
        delta = self.space.to_pixels(point - self.x)
        delta = project_l1_box(torch.zeros_like(delta), delta, self.eps, self._below, self._above)
        return add_inwards(self.x, self.space.from_pixels(delta), self.dtype, self.space)

    @override
    def keep(self, rows: Tensor) -> None:
        images = (self.x, self._below, self._above)
        self.x, self._below, self._above = (each.index_select(0, rows) for each in images)


_REGIONS: dict[str, type[Region]] = {"linf": Cube, "l2": _Ball, "l1": _Diamond}


def region(norm: str, x: Tensor, eps: float, space: InputSpace, dtype: torch.dtype) -> Region:
    """The region of a norm: exact for ``"linf"`` and ``"l1"``; in ``"l2"`` the ball first, then the pixels.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        x: clean images.
        eps: radius in pixel units.
        space: units and bounds of the images.
        dtype: the type the model takes.

    Example:
        >>> cube = region("linf", torch.tensor([[0.5, 0.95]]), 0.1, InputSpace(), torch.float32)
        >>> cube.project(torch.tensor([[0.0, 1.2]]))
        tensor([[0.4000, 1.0000]])
    """
    return _REGIONS[norm](x, eps, space, dtype)


def _spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """From numbers of ``dtype`` to the next larger ones; ``torch.nextafter`` does not know float16 everywhere."""
    info = torch.finfo(dtype)
    power = torch.frexp(value).exponent
    return torch.ldexp(torch.full_like(value, info.eps / 2), power).clamp(min=info.smallest_normal * info.eps)
