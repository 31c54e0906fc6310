# SPDX-License-Identifier: Apache-2.0
"""Noticing labels that are smoothed twice, or smoothed beside a penalty that does the same."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_robust.losses import LogitRegularizer, label_smoothing_of

__all__ = ["warn_of_smoothing"]


def warn_of_smoothing(trainer: L.Trainer, pl_module: L.LightningModule, callback: L.Callback) -> None:
    """Warn, once per fit, when smoothing meets smoothing or a penalty on the same logits; in the set-up of a callback.

    A callback takes part by its attribute ``criterion``, ``regularizer`` or ``label_smoothing`` (of the targets that it
    makes); the first one that does speaks for all.

    Args:
        trainer: The Trainer.
        pl_module: The module that is trained.
        callback: The callback that asks.
    """
    taking_part = [other for other in trainer.callbacks if _takes_part(other)]  # type: ignore[attr-defined]
    if not taking_part or taking_part[0] is not callback:
        return
    name = type(pl_module).__name__
    replaced = any(isinstance(getattr(other, "criterion", None), nn.Module) for other in taking_part)
    sources: list[tuple[str, float]] = [] if replaced else [(f"the criterion of {name}", label_smoothing_of(pl_module))]
    for other in taking_part:
        title = type(other).__name__
        criterion = getattr(other, "criterion", None)
        if isinstance(criterion, nn.Module):
            sources.append((f"{type(criterion).__name__} of the callback {title}", label_smoothing_of(criterion)))
        else:
            sources.append((f"the targets of {title}", getattr(other, "label_smoothing", 0.0)))
    smoothing = [(title, value) for title, value in sources if value]
    if len(smoothing) > 1:
        told = " and ".join(f"{title} ({value:g})" for title, value in smoothing)
        rank_zero_warn(f"Labels are smoothed twice, by {told}; set one of the two to 0.")
    penalties = [other.regularizer for other in taking_part if _penalises(other)]
    if smoothing and penalties:
        title, value = smoothing[0]
        rank_zero_warn(
            f"Labels are already smoothed by {title} ({value:g}), and {type(penalties[0]).__name__} penalises the same "
            "logits once more; usually one of the two is enough: set label_smoothing to 0 or drop the penalty."
        )


def _penalises(callback: Any) -> bool:
    return isinstance(getattr(callback, "regularizer", None), LogitRegularizer)


def _takes_part(callback: Any) -> bool:
    criterion = getattr(callback, "criterion", None)
    return _penalises(callback) or isinstance(criterion, nn.Module) or bool(getattr(callback, "label_smoothing", 0.0))
