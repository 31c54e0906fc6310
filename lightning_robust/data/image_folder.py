# SPDX-License-Identifier: Apache-2.0
"""Image files in one folder per class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.data.augment import LabelledImages, augmentation
from lightning_robust.data.base import ImageDataModule

__all__ = ["ImageFolderDataModule"]


class FolderImages(Dataset[tuple[Tensor, int]]):
    """The images below a folder as RGB uint8 tensors of their own size, read when asked for.

    Args:
        folder: holds one folder per class.
    """

    def __init__(self, folder: Path) -> None:
        self.files = datasets.ImageFolder(str(folder))
        self.labels = torch.tensor(self.files.targets)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files.samples[index]
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(image.convert("RGB")), label


class ImageFolderDataModule(ImageDataModule):
    """Image files in ``root/train/CLASS/``, ``root/test/CLASS/`` and optionally ``root/val/CLASS/``.

    Evaluation images are resized at the shorter side and cropped in the middle; training images are too, unless an
    augmentation cuts a random part. Without a ``val`` folder, ``val_fraction`` of the training images is held out.

    Args:
        root: folder that holds ``train``, ``val`` and ``test``.
        image_size: side of the images.
        resize: length of the shorter side before the central crop; 8/7 of ``image_size`` (256 for 224) when ``None``.
        **kwargs: see :class:`~lightning_robust.data.ImageDataModule`.

    Raises:
        FileNotFoundError: ``root/train`` is missing, or ``root/test`` when testing.
        ValueError: a folder has other classes than the training folder, or as in
            :class:`~lightning_robust.data.ImageDataModule`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...         Path(root, name).mkdir(parents=True)
        ...         Image.new("RGB", (12, 8)).save(Path(root, name, "1.png"))
        ...     ImageFolderDataModule(root=root, image_size=8, val_fraction=0.0).num_classes
        2
    """

    def __init__(self, *, root: str, image_size: int = 224, resize: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("image_size", image_size, 1)
        self.root = Path(root)
        self.image_size = image_size
        self.resize = resize if resize is not None else round(image_size * 8 / 7)
        check_integer("resize", self.resize, image_size)
        self.classes = _class_folders(self.root / "train")
        self.num_classes = len(self.classes)
        self.in_chans = 3
        # of ImageNet, which photographs are close to
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    @override
    def load_train(self) -> LabelledImages:
        return FolderImages(self.root / "train")

    @override
    def load_val(self) -> LabelledImages | None:
        return self._other("val") if (self.root / "val").is_dir() else None

    @override
    def load_test(self) -> LabelledImages:
        return self._other("test")

    @override
    def make_augmentation(self) -> Callable[[Any], Any] | None:
        return augmentation(self.augment, self.image_size, resized_crop=True, fill=self.mean)

    @override
    def eval_transform(self) -> Callable[[Any], Any]:
        transform: Callable[[Any], Any] = v2.Compose(
            [v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.image_size)]
        )
        return transform

    def _other(self, split: str) -> FolderImages:
        found = _class_folders(self.root / split)
        if found != self.classes:
            difference = ", ".join(sorted(set(found) ^ set(self.classes)))
            raise ValueError(
                f"Expected {self.root / split} to have the classes of {self.root / 'train'}; they differ in: "
                f"{difference}."
            )
        return FolderImages(self.root / split)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
    if not names:
        raise FileNotFoundError(f"Expected one folder of images per class in {folder}, but there is none.")
    return names
