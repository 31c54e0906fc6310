# SPDX-License-Identifier: Apache-2.0
"""Real handwritten digits that come with scikit-learn: no download."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.data.arrays import ArrayImages, as_labels
from lightning_robust.data.augment import LabelledImages
from lightning_robust.data.base import ImageDataModule
from lightning_robust.data.split import stratified_split

__all__ = ["DigitsDataModule"]

TEST_FRACTION = 0.2
TEST_SEED = 0  # the test images are the same for every argument


class DigitsDataModule(ImageDataModule):
    """The 1,797 handwritten digits of scikit-learn (UCI), grey, offline; for demonstrations and tests.

    The 8 x 8 images of 17 grey levels are enlarged bilinearly. A fifth of each class is the test set, the same images
    always; ``val_fraction`` of the rest is held out for validation.

    Args:
        image_size: side of the enlarged images.
        **kwargs: see :class:`~lightning_robust.data.ImageDataModule`.

    Raises:
        ValueError: ``image_size`` is below 8, or as in :class:`~lightning_robust.data.ImageDataModule`.

    Example:
        >>> data = DigitsDataModule(image_size=16, batch_size=64)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([64, 1, 16, 16]), 10)
    """

    def __init__(self, *, image_size: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("image_size", image_size, 8)
        self.image_size = image_size
        self.num_classes = 10
        self.in_chans = 1
        self.classes = tuple(str(digit) for digit in range(10))
        self.mean, self.std = (0.306,), (0.32,)

    @override
    def load_train(self) -> LabelledImages:
        return self._part(test=False)

    @override
    def load_test(self) -> LabelledImages:
        return self._part(test=True)

    def _part(self, *, test: bool) -> ArrayImages:
        digits = load_digits()
        labels = as_labels(digits.target)
        images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 16
        train_indices, test_indices = stratified_split(labels, TEST_FRACTION, TEST_SEED)
        indices = torch.tensor(test_indices if test else train_indices)
        return ArrayImages(_enlarge(images[indices], self.image_size), labels[indices])


def _enlarge(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear").clamp(0.0, 1.0)
