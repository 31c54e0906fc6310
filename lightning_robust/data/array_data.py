# SPDX-License-Identifier: Apache-2.0
"""A data module over your own arrays."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_robust.data.arrays import ArrayImages, Layout, as_images, as_labels, channel_statistics, read_npz
from lightning_robust.data.augment import LabelledImages
from lightning_robust.data.base import ImageDataModule

__all__ = ["ArrayDataModule"]

Arrays = tuple[Any, Any]
Splits = dict[str, tuple[Tensor, Tensor]]


class ArrayDataModule(ImageDataModule):
    """Your own NumPy arrays or tensors, or an ``.npz`` file, held in memory.

    Images are ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, square, either uint8 or float in [0, 1]; anything
    else is refused rather than guessed. A file holds ``{split}_images`` and ``{split}_labels`` for the splits
    ``train``, ``test`` and optionally ``val``, and optionally ``classes``; encoded images are described in
    :func:`~lightning_robust.data.read_npz`. The file is read at construction, because the number of classes and the
    shape of the images have to be known before ``setup``.

    Args:
        train: pair of images and labels for training.
        test: pair for testing.
        val: pair for validation; ``val_fraction`` of the training images when ``None``.
        path: an ``.npz`` file instead of the pairs.
        num_classes: number of classes; the highest label + 1 when ``None``.
        classes: name of each class.
        layout: "auto", "NCHW" or "NHWC"; needed only when both axes could be the channels.
        **kwargs: see :class:`~lightning_robust.data.ImageDataModule`.

    Raises:
        ValueError: neither or both of ``train`` and ``path``, images or labels of another form, splits that differ in
            shape.
        FileNotFoundError: there is no file ``path``.
        KeyError: the file lacks training images or labels.

    Example:
        >>> import torch
        >>> images, labels = torch.rand(20, 3, 8, 8), torch.arange(20) % 4
        >>> data = ArrayDataModule(train=(images, labels), test=(images, labels))
        >>> data.num_classes, data.in_chans, data.image_size
        (4, 3, 8)
    """

    def __init__(
        self,
        *,
        train: Arrays | None = None,
        test: Arrays | None = None,
        val: Arrays | None = None,
        path: str | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        layout: Layout = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {"train": train, "val": val, "test": test}
        if path is not None:
            if any(pair is not None for pair in given.values()):
                raise ValueError("Expected either `path` or the arrays but got both.")
            self._splits, names = read_npz(path, layout)
        elif train is None:
            raise ValueError("Expected `train=(images, labels)` or `path` but got neither.")
        else:
            self._splits, names = _from_pairs(given, layout), ()
        images, labels = self._splits["train"]
        names = tuple(classes) if classes is not None else names
        self.num_classes = num_classes or len(names) or int(labels.max()) + 1
        self.classes = names or tuple(str(index) for index in range(self.num_classes))
        self._check_splits()
        self.in_chans, self.image_size = images.shape[1], images.shape[2]
        self.mean, self.std = channel_statistics(images)

    @override
    def load_train(self) -> LabelledImages:
        return ArrayImages(*self._splits["train"])

    @override
    def load_val(self) -> LabelledImages | None:
        return ArrayImages(*self._splits["val"]) if "val" in self._splits else None

    @override
    def load_test(self) -> LabelledImages:
        if "test" not in self._splits:
            raise ValueError("ArrayDataModule was given no test images; pass test=(images, labels), or test_images.")
        return ArrayImages(*self._splits["test"])

    def _check_splits(self) -> None:
        if len(self.classes) != self.num_classes:
            raise ValueError(
                f"Expected one name per class but got {len(self.classes)} `classes` for {self.num_classes} classes."
            )
        shape = self._splits["train"][0].shape[1:]
        if shape[1] != shape[2]:
            raise ValueError(f"Expected square images but got {shape[1]} x {shape[2]}; crop or pad them first.")
        for split, (images, labels) in self._splits.items():
            as_labels(labels, f"{split} labels", self.num_classes)
            if len(images) != len(labels):
                raise ValueError(f"Expected as many {split} labels as images but got {len(labels)} for {len(images)}.")
            if images.shape[1:] != shape:
                raise ValueError(
                    f"Expected {split} images of shape {tuple(shape)} as for training but got "
                    f"{tuple(images.shape[1:])}."
                )


def _from_pairs(pairs: dict[str, Arrays | None], layout: Layout) -> Splits:
    return {
        split: (as_images(pair[0], f"{split} images", layout), as_labels(pair[1], f"{split} labels"))
        for split, pair in pairs.items()
        if pair is not None
    }
