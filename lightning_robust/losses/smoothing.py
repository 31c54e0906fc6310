# SPDX-License-Identifier: Apache-2.0
"""How much a module smooths the labels that it is trained with."""

from torch import nn

from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.cross_entropy import CrossEntropy

__all__ = ["label_smoothing_of"]


def label_smoothing_of(module: nn.Module) -> float:
    """Label smoothing of the first criterion of a module that has any, else 0.

    Args:
        module: A criterion, ours, torch's or timm's, or a module that holds one.

    Example:
        >>> label_smoothing_of(nn.Sequential(nn.Linear(2, 2), nn.CrossEntropyLoss(label_smoothing=0.1)))
        0.1
    """
    return next((smoothing for child in module.modules() if (smoothing := _smoothing(child))), 0.0)


def _smoothing(module: nn.Module) -> float:
    if isinstance(module, CrossEntropy | nn.CrossEntropyLoss):
        return module.label_smoothing
    # timm's loss is no subclass of torch's and has another name for it
    foreign = "Smoothing" in type(module).__name__ and not isinstance(module, Criterion)
    return float(getattr(module, "smoothing", 0.0)) if foreign else 0.0
