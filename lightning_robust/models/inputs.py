# SPDX-License-Identifier: Apache-2.0
"""What the first batch has to look like."""

import torch
from torch import Tensor

__all__ = ["check_image_form", "check_image_values", "check_labels"]

RANGE_TOLERANCE = 1e-6


def check_image_form(images: Tensor, in_chans: int) -> None:
    """Refuse images of a wrong shape or type; looks at no value.

    Args:
        images: a batch.
        in_chans: number of channels of the model.

    Raises:
        ValueError: not ``[B, in_chans, H, W]``.
        TypeError: not floating point.

    Example:
        >>> check_image_form(torch.zeros(2, 3, 8, 8), in_chans=3)
    """
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ValueError(f"Expected images of shape [B, {in_chans}, H, W] but got {list(images.shape)}.")
    if not images.is_floating_point():
        raise TypeError(f"Expected float images in [0, 1] but got {images.dtype}; divide integer images by 255.")


def check_image_values(images: Tensor) -> None:
    """Refuse images outside [0, 1]; waits for the device, so call it once.

    Args:
        images: a batch.

    Raises:
        ValueError: NaN, or values outside [0, 1] by more than 1e-6.

    Example:
        >>> check_image_values(torch.rand(2, 3, 8, 8))
    """
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    # written so that NaN, which compares as false, is refused
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"Expected images in [0, 1] without NaN but got values from {low:.6g} to {high:.6g}; normalisation belongs "
            "into the model: remove it from the data and give mean and std to the model."
        )


def check_labels(labels: Tensor, batch_size: int, num_classes: int) -> None:
    """Refuse labels that do not fit; waits for the device, so call it once.

    Args:
        labels: class indices ``[B]`` or class probabilities ``[B, C]``.
        batch_size: number of images.
        num_classes: number of classes of the model.

    Raises:
        ValueError: another shape, or an index that is no class.

    Example:
        >>> check_labels(torch.tensor([0, 9]), batch_size=2, num_classes=10)
    """
    expected = [batch_size, num_classes] if labels.is_floating_point() else [batch_size]
    if list(labels.shape) != expected:
        raise ValueError(f"Expected {labels.dtype} labels of shape {expected} but got {list(labels.shape)}.")
    if labels.is_floating_point():
        return
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1} but got values from {low} to {high}; set num_classes to the "
            "number of classes of the data."
        )
