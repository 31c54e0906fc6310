# SPDX-License-Identifier: Apache-2.0
"""The epochs in which a term of the loss acts."""

from dataclasses import dataclass

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_robust.checks import check_integer

__all__ = ["EpochWindow"]


@dataclass(frozen=True)
class EpochWindow:
    """The epochs strictly between two others.

    Args:
        start_epoch: The last epoch before.
        end_epoch: The first epoch after; ``None`` for no end.

    Raises:
        ValueError: There is no epoch between them.
    """

    start_epoch: int
    end_epoch: int | None

    def __post_init__(self) -> None:
        check_integer("start_epoch", self.start_epoch, -1)
        if self.end_epoch is not None:
            check_integer("end_epoch", self.end_epoch, self.start_epoch + 2)

    def __contains__(self, epoch: int) -> bool:
        return self.start_epoch < epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def warn_if_missed(self, trainer: L.Trainer, name: str, first: int = 0) -> None:
        """Warn when the run is over before the term acts for the first time; a run of so many steps is not judged.

        Args:
            trainer: The Trainer.
            name: What acts.
            first: First epoch in which it can act whatever the window says.
        """
        first = max(first, self.start_epoch + 1)
        epochs = trainer.max_epochs
        if epochs is not None and -1 < epochs <= first and trainer.max_steps == -1:
            rank_zero_warn(
                f"{name} acts from epoch {first} on (counted from 0), and this run has {epochs}: it trains as without. "
                "Lower start_epoch."
            )
