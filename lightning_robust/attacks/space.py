# SPDX-License-Identifier: Apache-2.0
"""The space of the images an attack gets: pixels, or pixels normalised per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.checks import check_positive
from lightning_robust.losses import full_precision

__all__ = ["InputSpace"]


class InputSpace:
    """Converts between the images as the model takes them and pixels, in which budgets are measured.

    Images are ``(pixels - mean) / std`` per channel (dimension 1); without ``mean`` and ``std`` they are the pixels.

    Args:
        mean: mean per channel of the normalisation that the images went through.
        std: standard deviation per channel.
        bounds: smallest and largest possible pixel.

    Raises:
        ValueError: only one of ``mean`` and ``std``, different lengths, a ``std`` that is not above zero, empty bounds.

    Example:
        >>> space = InputSpace(mean=[0.5], std=[0.25])
        >>> space.to_pixels(torch.ones(1, 1, 2, 2)).unique()
        tensor([0.2500])
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError("Expected both `mean` and `std` of the normalisation, or neither, but got one of them.")
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"Expected `bounds` to be (low, high) with low < high but got {bounds!r}.")
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(
                    f"Expected `mean` and `std` of equal length but got {len(self.mean)} and {len(self.std)}."
                )
            for value in self.std:
                check_positive("std", value)
        self.bounds = (float(bounds[0]), float(bounds[1]))
        # Uploading three numbers in every step would make the host wait for the device.
        self._tensors: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor, Tensor]] = {}

    def pixels(self, x: Tensor) -> Tensor:
        """The pixels that images were made of."""
        if self.std is None:
            return x
        std, low, _ = self._on(x)
        return (x - low) * std + self.bounds[0]

    def to_pixels(self, delta: Tensor) -> Tensor:
        """A difference of images in pixel units."""
        return delta if self.std is None else delta * self._on(delta)[0]

    def from_pixels(self, delta: Tensor) -> Tensor:
        """A difference in pixel units in the units of the images."""
        return delta if self.std is None else delta / self._on(delta)[0]

    def pixel_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the pixels, given the one with respect to the images."""
        return self.from_pixels(gradient)

    def clip(self, x: Tensor) -> Tensor:
        """Images clipped to the possible ones."""
        if self.std is None:
            return x.clamp(*self.bounds)
        _, low, high = self._on(x)
        return x.clamp(low, high)

    def check(self, x: Tensor) -> None:
        """Refuse images that are no images of this space; reads values, so a device has to catch up.

        Args:
            x: images ``[B, ...]``.

        Raises:
            ValueError: NaN, or pixels outside the bounds by more than rounding.
        """
        if self.std is not None and (x.ndim < 2 or x.shape[1] != len(self.std)):
            raise ValueError(f"Expected images with {len(self.std)} channels (`std`) but got {list(x.shape)}.")
        pixels = self.pixels(full_precision(x))
        # a normalisation was rounded to the images' type
        tolerance = 1e-6 if self.std is None else max(1e-6, 8 * torch.finfo(x.dtype).eps)
        low_seen, high_seen = (value.item() for value in pixels.aminmax())
        if low_seen != low_seen:
            raise ValueError("Expected images without NaN.")
        if low_seen < self.bounds[0] - tolerance or high_seen > self.bounds[1] + tolerance:
            raise ValueError(
                f"Expected pixels in [{self.bounds[0]:g}, {self.bounds[1]:g}] but got [{low_seen:g}, {high_seen:g}]. "
                "If the images are normalised, give the attack the `mean` and `std` of the normalisation, or move the "
                "normalisation into the model; otherwise give it the true `bounds`."
            )

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (like.device, like.dtype, like.ndim)
        if key not in self._tensors:
            shape = (1, -1, *[1] * (like.ndim - 2))
            # float64 first: the bounds are then as exact as the images' type allows
            std = torch.tensor(self.std, dtype=torch.float64).view(shape)
            mean = torch.tensor(self.mean, dtype=torch.float64).view(shape)
            low, high = ((bound - mean) / std for bound in self.bounds)
            self._tensors[key] = tuple(value.to(like.device, like.dtype) for value in (std, low, high))  # type: ignore[assignment]
        return self._tensors[key]
