# SPDX-License-Identifier: Apache-2.0
"""Callbacks that plug into any Trainer: they change the training step of any LightningModule, or watch it."""

from lightning_robust.callbacks.sharpness_aware import SharpnessAware

__all__ = [
    "SharpnessAware",
]
