# SPDX-License-Identifier: Apache-2.0
"""What the strategy of a Trainer does with the weights."""

import lightning as L

__all__ = ["is_strategy", "keeps_whole_weights"]


def is_strategy(trainer: L.Trainer, *names: str) -> bool:
    """Whether the Trainer's strategy is one of these, or made from one.

    Args:
        trainer: The Trainer.
        *names: Names of classes; they exist twice, in ``lightning`` and in ``pytorch_lightning``.
    """
    return any(cls.__name__ in names for cls in type(trainer.strategy).__mro__)


def keeps_whole_weights(trainer: L.Trainer) -> bool:
    """Whether every process has all weights on its device.

    Args:
        trainer: The Trainer.
    """
    whole = is_strategy(trainer, "SingleDeviceStrategy", "DDPStrategy")
    return whole and not is_strategy(trainer, "DeepSpeedStrategy")  # which is made from that of DDP
