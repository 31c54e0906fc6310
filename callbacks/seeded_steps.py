# SPDX-License-Identifier: Apache-2.0
"""Dropout and other random layers that continue exactly after a resume."""

import os
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.training import derive_seed

__all__ = ["SeededSteps"]


class SeededSteps(Callback):
    """Seeds the global random generators at every training step.

    Runs in ``on_train_batch_start``: torch (CPU and the device of the module), NumPy and Python get a seed that is a
    function of the global seed, rank, epoch and batch index. Dropout, stochastic depth and whatever else draws from
    these generators during a step then depends on nothing that happened before, so a run that continues in mid-epoch
    repeats the uninterrupted run; checkpoints do not hold the generators' states. Put it first in the list of
    callbacks.

    Cost: some 10 microseconds per step. The random numbers are other ones than without this callback, and
    whatever is drawn between two steps no longer changes the next.

    Args:
        seed: the global seed; ``None`` takes the one of ``seed_everything``.

    Raises:
        ValueError: ``seed`` is negative; or, at the start of a fit, ``None`` without ``seed_everything``.

    Example:
        >>> from lightning_robust.callbacks import SeededSteps
        >>> trainer = L.Trainer(callbacks=[SeededSteps(seed=0)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, seed: int | None = None) -> None:
        if seed is not None:
            check_integer("seed", seed, 0)
        self.seed = seed

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.seed is None and "PL_GLOBAL_SEED" not in os.environ:
            raise ValueError("Expected a seed for SeededSteps: call seed_everything(...) or pass seed=....")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        base = self.seed if self.seed is not None else os.environ["PL_GLOBAL_SEED"]
        seed = derive_seed(base, trainer.global_rank, trainer.current_epoch, batch_idx, "step")
        # torch.manual_seed would walk through every backend, at fifty times the cost
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device.type).manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
