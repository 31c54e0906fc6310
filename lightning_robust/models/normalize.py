# SPDX-License-Identifier: Apache-2.0
"""Normalisation as the first layer of a model, so that everything outside works on pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_positive

__all__ = ["Normalize", "normalization"]


class Normalize(nn.Module):
    """``(x - mean) / std`` for each channel.

    Args:
        mean: mean of each channel of images in [0, 1]; one value serves all channels.
        std: standard deviation of each channel; one value serves all channels.

    Shape:
        ``[B, C, H, W]`` -> ``[B, C, H, W]``.

    Raises:
        ValueError: different lengths, or a standard deviation that is not positive.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise ValueError(f"Expected `mean` and `std` to have one value per channel but got {mean} and {std}.")
        for value in std:
            check_positive("std", value)
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    @override
    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalization(mean: Sequence[float] | None, std: Sequence[float] | None, in_chans: int) -> nn.Module:
    """Build the normalisation of a model, or nothing.

    Args:
        mean: mean of each channel, or of all; ``None`` for no normalisation.
        std: standard deviation, likewise.
        in_chans: number of channels.

    Raises:
        ValueError: only one of both is given, or another number of values than channels.

    Example:
        >>> normalization(None, None, in_chans=3)
        Identity()
    """
    if (mean is None) != (std is None):
        raise ValueError(f"Expected `mean` and `std` together but got {mean} and {std}.")
    if mean is None or std is None:
        return nn.Identity()
    if len(mean) not in (1, in_chans):
        raise ValueError(f"Expected `mean` and `std` to have 1 or {in_chans} values but got {len(mean)}.")
    return Normalize(mean, std)
