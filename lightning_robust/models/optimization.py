# SPDX-License-Identifier: Apache-2.0
"""What configure_optimizers returns."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

__all__ = ["Interval", "Scheduler", "optimization"]

Interval = Literal["epoch", "step"]
# "cosine" first: jsonargparse would take it for the path of a callable
Scheduler = Literal["cosine"] | LRSchedulerCallable | None


def optimization(
    optimizer: Optimizer, lr_scheduler: Scheduler, interval: Interval, trainer: L.Trainer | None = None
) -> OptimizerLRScheduler:
    """Combine an optimizer with a schedule, in the form that Lightning expects.

    Args:
        optimizer: the optimizer.
        lr_scheduler: "cosine" (to zero over the whole run), makes a scheduler from the optimizer, or ``None``.
        interval: step the scheduler per "epoch" or per "step".
        trainer: the Trainer, whose length "cosine" takes.

    Raises:
        ValueError: "cosine" without an end of the run.
    """
    if lr_scheduler is None:
        return optimizer
    if lr_scheduler == "cosine":
        scheduler: Any = CosineAnnealingLR(optimizer, T_max=_length(trainer, interval))
    else:
        scheduler = lr_scheduler(optimizer)
    settings: Any = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        settings["monitor"] = scheduler.monitor
    return {"optimizer": optimizer, "lr_scheduler": settings}


def _length(trainer: L.Trainer | None, interval: Interval) -> int:
    length: float = -1
    if trainer is not None:
        length = trainer.estimated_stepping_batches if interval == "step" else (trainer.max_epochs or -1)
    if not 0 < length < float("inf"):
        raise ValueError('Expected a Trainer with max_epochs (or max_steps, by "step") for lr_scheduler="cosine".')
    return int(length)
