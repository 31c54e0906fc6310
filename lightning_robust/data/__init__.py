# SPDX-License-Identifier: Apache-2.0
"""LightningDataModules of float images in [0, 1], with exact resume in the middle of an epoch."""

from lightning_robust.data.array_data import ArrayDataModule
from lightning_robust.data.arrays import (
    ArrayImages,
    as_images,
    as_labels,
    channel_statistics,
    decode_images,
    read_npz,
)
from lightning_robust.data.augment import (
    AUGMENTATIONS,
    Augmentation,
    AugmentedView,
    ImageView,
    LabelledImages,
    augmentation,
)
from lightning_robust.data.base import ImageDataModule, stratified_split
from lightning_robust.data.digits import DigitsDataModule
from lightning_robust.data.image_folder import ImageFolderDataModule
from lightning_robust.data.loader import ResumableDataLoader
from lightning_robust.data.samplers import EpochSampler, EvalSampler
from lightning_robust.data.torchvision_data import TorchvisionDataModule

__all__ = [
    "AUGMENTATIONS",
    "ArrayDataModule",
    "ArrayImages",
    "Augmentation",
    "AugmentedView",
    "DigitsDataModule",
    "EpochSampler",
    "EvalSampler",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageView",
    "LabelledImages",
    "ResumableDataLoader",
    "TorchvisionDataModule",
    "as_images",
    "as_labels",
    "augmentation",
    "channel_statistics",
    "decode_images",
    "read_npz",
    "stratified_split",
]
