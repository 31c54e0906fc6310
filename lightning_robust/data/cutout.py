# SPDX-License-Identifier: Apache-2.0
"""Cutout: square holes in training images."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from typing_extensions import override

from lightning_robust.checks import check_integer

__all__ = ["Cutout", "cutout_mask"]


def cutout_mask(height: int, width: int, length: int, centers: Iterable[tuple[int, int]]) -> Tensor:
    """Zeros in square holes and ones elsewhere, ``[height, width]``.

    A hole reaches from ``length // 2`` pixels before its centre to as many behind it (exclusive), so an odd length
    loses one; what sticks out of the image is cut off.

    Args:
        height: Of the image.
        width: Of the image.
        length: Side of the holes.
        centers: Row and column of the middle of each hole.

    Example:
        >>> cutout_mask(3, 4, 2, [(1, 3)])
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [1., 1., 1., 1.]])
    """
    mask = torch.ones(height, width)
    half = length // 2
    for row, column in centers:
        mask[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
    return mask


class Cutout(nn.Module):
    """Cutout: fills square holes at random places of an image.

    The centre of a hole is anywhere in the image, so a hole may stick out; torchvision's ``RandomErasing`` keeps it
    inside and draws its shape. The label stays. Works on single images, as a transform of a dataset
    (``train_transform`` of the data modules), and draws from torch's CPU generator like torchvision's transforms.

    Cost: a copy of the image.

    Args:
        length: Side of the holes; 16 for CIFAR-10, 8 for CIFAR-100, 20 for SVHN.
        holes: Number of holes per image.
        fill: Value in the holes in units of images in [0, 1], also for images of bytes; one number, or one per channel.
            Published is 0 after normalisation, which is the mean of the training images before it.

    Shape:
        An image ``[C, H, W]``, uint8 or floating point; the same again.

    Raises:
        ValueError: If an argument is out of range, or for something else than one image.

    References:
        DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, arXiv:1708.04552. In
        the published code an odd length gives holes of one pixel less, and so it is here.

    Example:
        >>> import torch
        >>> from lightning_robust.data import Cutout
        >>> holed = Cutout(length=2)(torch.ones(3, 8, 8))
        >>> bool((holed[0] == holed[1]).all())
        True
    """

    def __init__(self, *, length: int = 16, holes: int = 1, fill: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        check_integer("length", length, 2)
        check_integer("holes", holes, 1)
        self.length = length
        self.holes = holes
        self.fill = fill

    @override
    def forward(self, image: Tensor) -> Tensor:
        """Return the image with holes.

        Args:
            image: ``[C, H, W]``.
        """
        if image.ndim != 3:
            raise ValueError(f"Cutout works on single images [C, H, W] but got shape {tuple(image.shape)}.")
        height, width = image.shape[-2:]
        centers = [(int(torch.randint(height, ())), int(torch.randint(width, ()))) for _ in range(self.holes)]
        mask = cutout_mask(height, width, self.length, centers).to(image.device)
        fill = torch.as_tensor(self.fill, dtype=torch.float32)
        if fill.ndim and len(fill) != len(image):
            raise ValueError(f"Expected `fill` to be one number or {len(image)}, one per channel, but got {self.fill}.")
        value = v2.functional.to_dtype(fill.view(-1, 1, 1), image.dtype, scale=True).to(image.device)
        return torch.where(mask.bool(), image, value)

    @override
    def extra_repr(self) -> str:
        return f"length={self.length}, holes={self.holes}, fill={self.fill}"
