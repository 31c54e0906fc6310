# SPDX-License-Identifier: Apache-2.0
"""What may stand beside a callback that mixes samples, and what may not."""

from typing import Any

import lightning as L
from torch import nn

from lightning_robust.callbacks.criterion import Criterion
from lightning_robust.losses import DecoupledMixup
from lightning_robust.training import PerSampleCallback

__all__ = ["class_count", "refuse_partners", "refuse_smoothed_pairs"]


def class_count(trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
    """Number of classes as the module, its hyper-parameters or the data tell it.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
    """
    owners = (pl_module, getattr(trainer, "datamodule", None))
    told = [getattr(owner, "num_classes", None) for owner in owners] + [pl_module.hparams.get("num_classes")]
    return next((value for value in told if isinstance(value, int) and not isinstance(value, bool)), None)


def refuse_partners(trainer: L.Trainer, mixing: L.Callback) -> None:
    """Refuse what cannot work beside mixed samples.

    Args:
        trainer: The Trainer.
        mixing: The callback that mixes.

    Raises:
        ValueError: A second one, or a callback that follows single samples.
    """
    name = type(mixing).__name__
    for other in _callbacks(trainer):
        if other is mixing:
            continue
        if getattr(other, "mixes_samples", False):
            raise ValueError(
                f"{name} and {type(other).__name__} would both mix the samples, of which one is mixed already then; "
                "keep one of them. Mixup and CutMix in turn are one mixer, TimmMixup(mixup_alpha=..., "
                "cutmix_alpha=...)."
            )
        if isinstance(other, PerSampleCallback) and other.follows_samples:
            what = type(other.criterion if isinstance(other, Criterion) else other).__name__
            raise ValueError(
                f"{what} remembers what the network says about each sample, but {name} shows it mixtures of two; drop "
                "one of the two."
            )


def refuse_smoothed_pairs(trainer: L.Trainer, pl_module: L.LightningModule, smoothing: float) -> None:
    """Refuse decoupled mixup on labels that the mixer smooths.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        smoothing: That of the mixer.

    Raises:
        ValueError: If decoupled mixup could not tell the two labels of a sample.
    """
    if not smoothing:
        return
    replaced: list[nn.Module] = [cb.criterion for cb in _callbacks(trainer) if isinstance(cb, Criterion)]
    criteria = replaced or [pl_module]
    if any(isinstance(module, DecoupledMixup) for owner in criteria for module in owner.modules()):
        raise ValueError(
            f"DecoupledMixup needs to know which two labels were mixed, but the mixer smooths them "
            f"(label_smoothing={smoothing:g}); set label_smoothing of the mixer to 0."
        )


def _callbacks(trainer: L.Trainer) -> list[Any]:
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return found
