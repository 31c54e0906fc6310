# SPDX-License-Identifier: Apache-2.0
"""Views of a dataset as float images in [0, 1], with random augmentation that is a function of (seed, epoch, index)."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.data.cutout import Cutout
from lightning_robust.guards import rng_preserved
from lightning_robust.training import derive_seed

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "AugmentedView",
    "ImageView",
    "LabelledImages",
    "augmentation",
    "seeded_draws",
]

Augmentation = Literal["none", "shift", "crop-flip", "randaugment", "trivialaugment", "cutout"]
AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)
Transform = Callable[[Any], Any]


class LabelledImages(Protocol):
    """What a data module loads: images ``[C, H, W]`` (uint8, or float in [0, 1]) with their labels."""

    @property
    def labels(self) -> Tensor:
        """Labels of all images, ``[N]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def augmentation(
    name: Augmentation, image_size: int, *, resized_crop: bool = False, fill: float | Sequence[float] = 0.0
) -> Transform | None:
    """Build an augmentation from torchvision's transforms.

    Args:
        name: ``"none"``; ``"shift"`` pads by an eighth of the size and crops (digits, where a mirror image is another
            sign); ``"crop-flip"`` adds mirror images (the CIFAR standard); ``"randaugment"`` (arXiv:1909.13719) and
            ``"trivialaugment"`` (arXiv:2103.10158) come on top of that, and so does ``"cutout"`` with one hole of half
            the size (:class:`~lightning_robust.data.Cutout`).
        image_size: side of the result.
        resized_crop: cut a random part of a photo and resize it, instead of shifting.
        fill: what "cutout" puts into its hole, of images in [0, 1]; the mean of the images, as published.

    Example:
        >>> augmentation("none", 32) is None
        True
        >>> augmentation("crop-flip", 32)(torch.zeros(3, 32, 32)).shape
        torch.Size([3, 32, 32])
    """
    check_choice("augment", name, AUGMENTATIONS)
    if name == "none":
        return None
    crop = (
        v2.RandomResizedCrop(image_size, antialias=True)
        if resized_crop
        else v2.RandomCrop(image_size, padding=max(1, image_size // 8))
    )
    steps: list[Transform] = [crop]
    if name != "shift":
        steps.append(v2.RandomHorizontalFlip())
    if name == "randaugment":
        steps.append(v2.RandAugment())
    if name == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    if name == "cutout":
        steps.append(Cutout(length=max(2, image_size // 2), fill=fill))
    composed: Transform = v2.Compose(steps)
    return composed


class ImageView(Dataset[tuple[Tensor, int]]):
    """Some images of a dataset as float32 in [0, 1].

    Args:
        dataset: the images.
        indices: which of them; all when ``None``.
        transform: applied to each image before the conversion, for example resize and crop.

    Example:
        >>> from lightning_robust.data import ArrayImages
        >>> images = ArrayImages(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0, 1, 2]))
        >>> image, label = ImageView(images, [2])[0]
        >>> image.max().item(), label
        (1.0, 2)
    """

    def __init__(
        self, dataset: LabelledImages, indices: Sequence[int] | None = None, transform: Transform | None = None
    ) -> None:
        self.dataset = dataset
        self.indices = list(range(len(dataset))) if indices is None else [int(index) for index in indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        image, label = self.dataset[index]
        return v2.functional.to_dtype(self.transformed(image, index), torch.float32, scale=True), label

    def transformed(self, image: Tensor, index: int) -> Tensor:
        """Apply the transform to image ``index``."""
        if self.transform is None:
            return image
        result: Tensor = self.transform(image)
        return result


class AugmentedView(ImageView):
    """An :class:`ImageView` whose random transform draws from ``(seed, epoch, index of the image)``.

    The result of an image does not depend on workers, order or what ran before, so a resumed run continues exactly.
    The generators stand afterwards where they stood before.

    Args:
        dataset: the images.
        indices: which of them; all when ``None``.
        transform: a random transform; torchvision's draw from torch's CPU generator.
        seed: seed of all draws.
        seed_all: seed Python's and NumPy's generators as well, for transforms that use them (100 microseconds more
            per image).

    Example:
        >>> from lightning_robust.data import ArrayImages
        >>> images = ArrayImages(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
        >>> view = AugmentedView(images, transform=augmentation("shift", 8), seed=0)
        >>> bool((view[1][0] == view[1][0]).all())
        True
    """

    def __init__(
        self,
        dataset: LabelledImages,
        indices: Sequence[int] | None = None,
        transform: Transform | None = None,
        *,
        seed: int = 0,
        seed_all: bool = False,
    ) -> None:
        super().__init__(dataset, indices, transform)
        self.seed = seed
        self.seed_all = seed_all
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on.

        Args:
            epoch: number of the epoch.
        """
        self.epoch = epoch

    @override
    def transformed(self, image: Tensor, index: int) -> Tensor:
        if self.transform is None:
            return image
        with seeded_draws(derive_seed(self.seed, self.epoch, index, "augment"), seed_all=self.seed_all):
            return super().transformed(image, index)


@contextmanager
def seeded_draws(seed: int, *, seed_all: bool = False) -> Iterator[None]:
    """Let the body draw from a seeded CPU generator; the generators stand afterwards where they stood before.

    Args:
        seed: the seed.
        seed_all: seed Python's and NumPy's generators as well as torch's.
    """
    if seed_all:
        with rng_preserved():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
        return
    # torch.manual_seed would seed the accelerators too, whose streams belong to the model
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
