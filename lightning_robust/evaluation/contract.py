# SPDX-License-Identifier: Apache-2.0
"""What the images of an evaluation are: their possible pixels and the normalisation they went through."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.attacks.space import InputSpace

__all__ = ["InputContract", "wide"]


@dataclass(frozen=True)
class InputContract:
    """The pixels that all attacks of an evaluation agree on; budgets are measured in them.

    Args:
        bounds: Smallest and largest possible pixel.
        mean: Mean per channel that the images were normalised with, if they were.
        std: Standard deviation per channel of that normalisation.

    Example:
        >>> contract = InputContract(mean=(0.5,), std=(0.25,))
        >>> contract.pixels(torch.ones(1, 1, 2, 2)).unique()
        tensor([0.7500])
    """

    bounds: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, attacks: Iterable[Attack]) -> "InputContract":
        """What these attacks say about the images.

        Args:
            attacks: At least one attack.

        Raises:
            ValueError: They do not agree.
        """
        found = {cls(attack.space.bounds, attack.space.mean, attack.space.std) for attack in attacks}
        if len(found) != 1:
            listed = " and ".join(sorted(map(str, found)))
            raise ValueError(f"The attacks disagree about the images: {listed}; give all the same.")
        return found.pop()

    @property
    def space(self) -> InputSpace:
        """The conversions between images and pixels."""
        return InputSpace(self.mean, self.std, self.bounds)

    def pixels(self, x: Tensor) -> Tensor:
        """Images in pixel units.

        Args:
            x: Images as the model takes them.
        """
        if self.mean is None or self.std is None:
            return x
        return x * _channels(self.std, x) + _channels(self.mean, x)

    def images(self, pixels: Tensor) -> Tensor:
        """The inverse of `pixels`.

        Args:
            pixels: Images in pixel units.
        """
        if self.mean is None or self.std is None:
            return pixels
        return (pixels - _channels(self.mean, pixels)) / _channels(self.std, pixels)

    def eight_bit(self, x: Tensor) -> Tensor:
        """The images that a file of 8 bits per channel can hold, nearest to ``x``.

        Args:
            x: Images as the model takes them.
        """
        low, high = self.bounds
        levels = ((self.pixels(wide(x)) - low) * (255 / (high - low))).round().clamp(0, 255)
        return self.images(levels * ((high - low) / 255) + low).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """A tensor in the most exact type of its device.

    Args:
        x: Any floating-point tensor.
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, *[1] * (like.ndim - 2))
