# SPDX-License-Identifier: Apache-2.0
"""The reusable LightningModule, normalisation as a layer, and networks for small images registered with timm."""

from lightning_robust.models.cifar_resnet import CifarResNet
from lightning_robust.models.create import create_backbone
from lightning_robust.models.image_classifier import ImageClassifier
from lightning_robust.models.normalize import Normalize

__all__ = ["CifarResNet", "ImageClassifier", "Normalize", "create_backbone"]
