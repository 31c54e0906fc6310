# SPDX-License-Identifier: Apache-2.0
"""What a module and its data say about themselves."""

import lightning as L

__all__ = ["told"]


def told(name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
    """A number that the module, its data or its hyper-parameters name; ``None`` if none of them does.

    Args:
        name: ``"num_classes"``, say.
        trainer: The Trainer.
        pl_module: The LightningModule.
    """
    owners = (pl_module, getattr(trainer, "datamodule", None))
    said = [getattr(owner, name, None) for owner in owners] + [pl_module.hparams.get(name)]
    return next((value for value in said if isinstance(value, int)), None)
