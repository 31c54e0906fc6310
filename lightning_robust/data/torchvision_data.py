# SPDX-License-Identifier: Apache-2.0
"""Small benchmark sets of torchvision, downloaded once and held in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision import datasets
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.data.arrays import ArrayImages, as_images, as_labels
from lightning_robust.data.augment import LabelledImages
from lightning_robust.data.base import ImageDataModule

__all__ = ["TorchvisionDataModule"]

Name = Literal["CIFAR10", "CIFAR100", "SVHN", "MNIST", "FashionMNIST", "KMNIST"]


@dataclass(frozen=True)
class _Facts:
    """What has to be known before anything is downloaded."""

    build: Callable[..., Any]
    num_classes: int
    image_size: int
    layout: Literal["NCHW", "NHWC", "auto"]
    folder: str  # where torchvision expects the files, below the root
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()


CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FACTS: dict[str, _Facts] = {
    "CIFAR10": _Facts(
        datasets.CIFAR10, 10, 32, "NHWC", "cifar-10-batches-py",
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), CIFAR10_NAMES,
    ),
    "CIFAR100": _Facts(
        datasets.CIFAR100, 100, 32, "NHWC", "cifar-100-python", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "SVHN": _Facts(datasets.SVHN, 10, 32, "NCHW", "", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "MNIST": _Facts(datasets.MNIST, 10, 28, "auto", "MNIST/raw", (0.1307,), (0.3081,)),
    "FashionMNIST": _Facts(
        datasets.FashionMNIST, 10, 28, "auto", "FashionMNIST/raw", (0.2860,), (0.3530,),
        tuple(datasets.FashionMNIST.classes),
    ),
    "KMNIST": _Facts(
        datasets.KMNIST, 10, 28, "auto", "KMNIST/raw", (0.1918,), (0.3483,), tuple(datasets.KMNIST.classes)
    ),
}  # fmt: skip


class TorchvisionDataModule(ImageDataModule):
    """CIFAR-10/100, SVHN, MNIST, Fashion-MNIST or KMNIST.

    The files are downloaded by one process in ``prepare_data``; nothing is downloaded when they are there already.

    Args:
        dataset: "CIFAR10", "CIFAR100", "SVHN", "MNIST", "FashionMNIST" or "KMNIST".
        root: folder for the files; ``None`` is ``datasets`` in torch's cache (``$TORCH_HOME``).
        download: get the files when they are missing.
        **kwargs: see :class:`~lightning_robust.data.ImageDataModule`.

    Raises:
        ValueError: an unknown ``dataset``, or as in :class:`~lightning_robust.data.ImageDataModule`.
        RuntimeError: in ``prepare_data``, when the files are missing and cannot be downloaded; the message names the
            folder where they are expected.

    Example:
        >>> data = TorchvisionDataModule(dataset="CIFAR10", augment="crop-flip")
        >>> data.num_classes, data.image_size, data.classes[0]
        (10, 32, 'airplane')
    """

    def __init__(
        self, *, dataset: Name = "CIFAR10", root: str | None = None, download: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_choice("dataset", dataset, tuple(FACTS))
        self.dataset = dataset
        self.root = Path(root) if root is not None else Path(torch.hub.get_dir()).parent / "datasets"
        self.download = download
        facts = FACTS[dataset]
        self.num_classes = facts.num_classes
        self.image_size = facts.image_size
        self.in_chans = len(facts.mean)
        self.mean, self.std = facts.mean, facts.std
        # CIFAR-100's names are read with its files
        self.classes = facts.classes or tuple(str(index) for index in range(facts.num_classes))

    @override
    def prepare_data(self) -> None:
        """Download what is missing; called by one process."""
        for train in (True, False):
            self._open(train, download=self.download)

    @override
    def load_train(self) -> LabelledImages:
        return self._in_memory(train=True)

    @override
    def load_test(self) -> LabelledImages:
        return self._in_memory(train=False)

    def _in_memory(self, *, train: bool) -> ArrayImages:
        source = self._open(train, download=False)
        targets = source.labels if self.dataset == "SVHN" else source.targets
        if self.dataset == "CIFAR100":
            self.classes = tuple(source.classes)
        return ArrayImages(
            as_images(source.data, self.dataset, FACTS[self.dataset].layout),
            as_labels(targets, f"{self.dataset} labels", self.num_classes),
        )

    def _open(self, train: bool, *, download: bool) -> Any:
        part = {"split": "train" if train else "test"} if self.dataset == "SVHN" else {"train": train}
        facts = FACTS[self.dataset]
        try:
            return facts.build(str(self.root), download=download, **part)
        except (OSError, RuntimeError) as error:
            reason = f"could not be downloaded ({error})" if download else "were not found and download is off"
            raise RuntimeError(
                f"The files of {self.dataset} {reason}; put torchvision's files for it into {self.root / facts.folder}."
            ) from error
