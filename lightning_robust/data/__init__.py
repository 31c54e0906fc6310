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
from lightning_robust.data.base import ImageDataModule
from lightning_robust.data.cutout import Cutout, cutout_mask
from lightning_robust.data.digits import DigitsDataModule
from lightning_robust.data.image_folder import ImageFolderDataModule
from lightning_robust.data.label_noise import NOISE_KINDS, NoiseKind, RelabelledImages, noisy_labels
from lightning_robust.data.loader import ResumableDataLoader
from lightning_robust.data.oko_sampler import OKOSampler
from lightning_robust.data.partial_labels import NO_LABEL, LabelledAndUnlabelled, PartialLabels
from lightning_robust.data.samplers import EpochSampler, EvalSampler
from lightning_robust.data.seeded_views import SeededViews, ViewSampler
from lightning_robust.data.split import stratified_split
from lightning_robust.data.torchvision_data import TorchvisionDataModule

__all__ = [
    "AUGMENTATIONS",
    "NOISE_KINDS",
    "NO_LABEL",
    "ArrayDataModule",
    "ArrayImages",
    "Augmentation",
    "AugmentedView",
    "Cutout",
    "DigitsDataModule",
    "EpochSampler",
    "EvalSampler",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageView",
    "LabelledAndUnlabelled",
    "LabelledImages",
    "NoiseKind",
    "OKOSampler",
    "PartialLabels",
    "RelabelledImages",
    "ResumableDataLoader",
    "SeededViews",
    "TorchvisionDataModule",
    "ViewSampler",
    "as_images",
    "as_labels",
    "augmentation",
    "channel_statistics",
    "cutout_mask",
    "decode_images",
    "noisy_labels",
    "read_npz",
    "stratified_split",
]
