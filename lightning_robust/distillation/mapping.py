# SPDX-License-Identifier: Apache-2.0
"""What stands between a student's inputs and classes and those of its teacher."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.losses import full_precision

__all__ = ["ClassMapping", "InputTransform"]


class InputTransform(nn.Module):
    """Resizes images and normalises their channels; does nothing without arguments.

    Args:
        mean: What is subtracted from each channel.
        std: What each channel is divided by.
        image_size: Height and width to resize to.

    Raises:
        ValueError: If only one of ``mean`` and ``std`` is given, they differ in length or ``std`` is not positive; in a
            call, for inputs with another number of channels.

    Example:
        >>> InputTransform([0.5], [0.5])(torch.ones(1, 1, 2, 2)).flatten()
        tensor([1., 1., 1., 1.])
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, mean: list[float] | None = None, std: list[float] | None = None, image_size: int | None = None
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
            raise ValueError(f"Expected `mean` and `std` with one number per channel each but got {mean} and {std}.")
        if std is not None and min(std) <= 0:
            raise ValueError(f"Expected `std` to be > 0 but got {std}.")
        if image_size is not None:
            check_integer("image_size", image_size, 1)
        self.image_size = image_size
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs that the teacher's network gets.

        Args:
            x: Images ``[B, C, H, W]``, or anything if there is nothing to do.
        """
        size = self.image_size
        if size is not None and x.shape[2:] != (size, size):
            # not every device resizes in low precision
            x = F.interpolate(full_precision(x), (size, size), mode="bilinear", antialias=True).to(x.dtype)
        if self.mean is None or self.std is None:
            return x
        if x.ndim != 4 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"Expected images with {len(self.mean)} channels, as `mean` and `std` of the teacher have, but got "
                f"inputs of shape {tuple(x.shape)}."
            )
        return (x - self.mean) / self.std


class ClassMapping:
    """Picks the student's classes out of a teacher's logits; does nothing without an argument.

    Args:
        classes: For each class of the student the teacher's class, or several that are one for the student: their
            probabilities add up.

    Raises:
        ValueError: If the mapping is empty, or in a call if the teacher has no such class.

    Example:
        >>> ClassMapping([1, 0])(torch.tensor([[2.0, 3.0, 4.0]]))
        tensor([[3., 2.]])
    """

    NOTHING: ClassVar[float] = float("-inf")  # what adds no probability

    def __init__(self, classes: list[int | list[int]] | None = None) -> None:
        groups = None if classes is None else [[each] if isinstance(each, int) else list(each) for each in classes]
        if groups is not None and (not groups or not all(groups)):
            raise ValueError(
                f"Expected `classes` to name at least one class of the teacher for each but got {classes}."
            )
        self._groups = groups
        self._index: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of the student's classes ``[B, K]`` of those of the teacher's ``[B, C]``."""
        if self._groups is None:
            return logits
        if self._index is None or self._index.device != logits.device:
            self._index = self._padded().to(logits.device)
        low, high = min(map(min, self._groups)), max(map(max, self._groups))
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"`classes` names class {low if low < 0 else high} of a teacher with {logits.shape[1]}; count from 0."
            )
        picked = logits[:, self._index.clamp(min=0)]
        if picked.shape[2] == 1:
            return picked[:, :, 0]
        return picked.masked_fill(self._index < 0, self.NOTHING).logsumexp(2)

    def _padded(self) -> Tensor:
        assert self._groups is not None, "asked only with classes"
        width = max(map(len, self._groups))
        return torch.tensor([group + [-1] * (width - len(group)) for group in self._groups])
