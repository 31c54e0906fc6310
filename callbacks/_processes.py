# SPDX-License-Identifier: Apache-2.0
"""Sums over the processes of a run."""

import lightning as L
from torch import Tensor

__all__ = ["total"]


def total(trainer: L.Trainer, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; each of them has to ask.

    Args:
        trainer: The Trainer.
        tensor: A tensor, which stays as it is.
    """
    summed: Tensor = trainer.strategy.reduce(tensor.detach().clone(), reduce_op="sum")
    return summed
