# SPDX-License-Identifier: Apache-2.0
"""The order in which callbacks wrap a training step, as data."""

from enum import StrEnum

__all__ = ["REASONS", "Stage"]


class Stage(StrEnum):
    """Where a callback stands around the training step; declared outermost first.

    ``BATCH`` makes a new batch, ``OBJECTIVE`` replaces the module's loss, ``WEIGHTS`` evaluates what is inside it at
    several weights, ``LOSS`` adds terms to the returned loss.
    """

    BATCH = "batch"
    OBJECTIVE = "objective"
    WEIGHTS = "weights"
    LOSS = "loss"


#: Why a stage stands where it stands; shown by ``lightning-robust check`` and in the documentation.
REASONS: dict[Stage, str] = {
    Stage.BATCH: "computed once at the current weights, so that every later pass sees the same batch",
    Stage.OBJECTIVE: "an objective is the loss whose sharpness is wanted, so it is chosen before weights are perturbed",
    Stage.WEIGHTS: "perturbs the loss of everything inside it",
    Stage.LOSS: "these terms belong to the loss that a sharpness-aware method sees",
}
