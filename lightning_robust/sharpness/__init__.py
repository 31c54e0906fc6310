# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware methods, usable with a bare PyTorch loop and through the ``SharpnessAware`` callback."""

from lightning_robust.sharpness.asam import ASAM
from lightning_robust.sharpness.injection import inject_gradients
from lightning_robust.sharpness.loop import sharp_backward
from lightning_robust.sharpness.method import GradientAt, SharpnessMethod, sharp_direction
from lightning_robust.sharpness.sam import SAM
from lightning_robust.sharpness.weights import (
    Gradients,
    Scale,
    WeightBackup,
    Weights,
    global_norm,
    own_memory,
    parameter_hooks_off,
)

__all__ = [
    "ASAM",
    "SAM",
    "GradientAt",
    "Gradients",
    "Scale",
    "SharpnessMethod",
    "WeightBackup",
    "Weights",
    "global_norm",
    "inject_gradients",
    "own_memory",
    "parameter_hooks_off",
    "sharp_backward",
    "sharp_direction",
]
