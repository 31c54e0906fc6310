# SPDX-License-Identifier: Apache-2.0
"""Images that are already in memory, or in an .npz file."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_robust.checks import check_choice

__all__ = ["ArrayImages", "as_images", "as_labels", "channel_statistics", "decode_images", "read_npz"]

Layout = Literal["auto", "NCHW", "NHWC"]
LAYOUTS: tuple[Layout, ...] = ("auto", "NCHW", "NHWC")
CHANNELS = (1, 2, 3, 4)
RANGE_TOLERANCE = 1e-6  # rounding of a resize or a conversion; what exceeds [0, 1] by less is clamped


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Images and labels in memory.

    Args:
        images: ``[N, C, H, W]``, uint8 or float32 in [0, 1]; see :func:`as_images`.
        labels: ``[N]`` int64; see :func:`as_labels`.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> images = ArrayImages(torch.zeros(2, 1, 4, 4), torch.tensor([3, 1]))
        >>> images[0][1], len(images)
        (3, 2)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"Expected as many labels as images but got {len(labels)} for {len(images)}.")
        self.images = images
        self.labels = labels
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self._labels[index]


def as_images(array: Any, name: str = "images", layout: Layout = "auto") -> Tensor:
    """Bring an array or tensor of images into the form ``[N, C, H, W]``, uint8 or float32 in [0, 1].

    Args:
        array: ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with 1 to 4 channels.
        name: how error messages call it.
        layout: where the channels are; ``"auto"`` looks for an axis of 1 to 4 and refuses when both could be it.

    Raises:
        ValueError: other shapes, other types, values outside [0, 1], NaN, no image at all.

    Example:
        >>> as_images(np.zeros((5, 8, 6, 3), dtype=np.uint8)).shape
        torch.Size([5, 3, 8, 6])
    """
    check_choice("layout", layout, LAYOUTS)
    images = torch.as_tensor(array)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4:
        images = images if _channels_first(images, name, layout) else images.permute(0, 3, 1, 2)
    else:
        raise ValueError(f"Expected `{name}` to be [N, H, W], [N, H, W, C] or [N, C, H, W] but got {_shape(images)}.")
    if images.numel() == 0:
        raise ValueError(f"Expected `{name}` to hold images but got {_shape(images)}.")
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise ValueError(f"Expected `{name}` to be uint8, or float in [0, 1], but got {images.dtype}.")
    low, high = (float(value) for value in torch.aminmax(images))
    # written so that NaN, which compares as false, is refused
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"Expected float `{name}` to be in [0, 1] without NaN but got values from {low} to {high}.")
    return images.to(torch.float32).clamp(0.0, 1.0).contiguous()


def as_labels(array: Any, name: str = "labels", num_classes: int | None = None) -> Tensor:
    """Bring class indices into the form ``[N]`` int64.

    Args:
        array: one-dimensional integers from 0.
        name: how error messages call it.
        num_classes: number of classes, if known.

    Raises:
        ValueError: another shape, no integers, or values out of range.

    Example:
        >>> as_labels(np.array([2, 0], dtype=np.uint8))
        tensor([2, 0])
    """
    labels = torch.as_tensor(array)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"Expected `{name}` to be [N] integers but got {_shape(labels)} of {labels.dtype}.")
    labels = labels.to(torch.int64)
    high = "" if num_classes is None else f" and < {num_classes}"
    if len(labels) and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        raise ValueError(
            f"Expected `{name}` to be >= 0{high} but got values from {int(labels.min())} to {int(labels.max())}."
        )
    return labels


def read_npz(path: str | Path, layout: Layout = "auto") -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Read the splits of an ``.npz`` file.

    For each of ``train``, ``val`` and ``test`` that the file has: ``{split}_labels``, and either ``{split}_images`` or
    the images as encoded files (JPEG, PNG, ...) in one byte string, ``{split}_jpeg`` (uint8) with ``{split}_offsets``
    (``N + 1`` positions; file ``i`` is ``jpeg[offsets[i]:offsets[i + 1]]``). Optional: ``classes``, their names.
    Nothing is unpickled.

    Args:
        path: the file.
        layout: see :func:`as_images`.

    Returns:
        Images and labels of each split, and the class names (empty when the file has none).

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: the training images or a split's labels are missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}; `path` names an .npz file with train_images, train_labels.")
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for split in ("train", "val", "test"):
            if f"{split}_images" in archive:
                images = as_images(archive[f"{split}_images"], f"{split}_images", layout)
            elif f"{split}_jpeg" in archive:
                images = decode_images(archive[f"{split}_jpeg"], archive[f"{split}_offsets"])
            else:
                continue
            splits[split] = images, as_labels(archive[f"{split}_labels"], f"{split}_labels")
        names = tuple(str(name) for name in archive["classes"]) if "classes" in archive else ()
        if "train" not in splits:
            raise KeyError(f"{path} has neither train_images nor train_jpeg, only {', '.join(archive.files)}.")
    return splits, names


def decode_images(encoded: np.ndarray, offsets: np.ndarray) -> Tensor:
    """Decode image files that stand one after the other in a byte string, to ``[N, C, H, W]`` uint8.

    Args:
        encoded: the bytes, uint8.
        offsets: where each file begins, and the end: ``N + 1`` positions.
    """
    images = []
    for begin, end in pairwise(offsets):
        with Image.open(io.BytesIO(encoded[begin:end].tobytes())) as image:
            images.append(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
    return as_images(np.stack(images), "encoded images", "NHWC" if images[0].ndim == 3 else "auto")


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of values in [0, 1].

    Args:
        images: ``[N, C, H, W]``, uint8 or float.

    Example:
        >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
        ((0.5,), (0.5,))
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in torch.split(images, 4096):  # a float64 copy of the whole would need eight times its memory
        values = chunk.to(torch.float64) / scale
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _channels_first(images: Tensor, name: str, layout: Layout) -> bool:
    first, last = images.shape[1] in CHANNELS, images.shape[3] in CHANNELS
    if layout == "auto" and first and last:
        raise ValueError(
            f"Cannot tell where the channels of `{name}` with {_shape(images)} are; say layout='NCHW' or 'NHWC'."
        )
    chosen = layout if layout != "auto" else "NCHW" if first else "NHWC"
    if not (first if chosen == "NCHW" else last):
        raise ValueError(f"Expected `{name}` to have an axis of 1 to 4 channels but got {_shape(images)}.")
    return chosen == "NCHW"


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
