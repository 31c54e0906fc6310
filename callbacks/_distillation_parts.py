# SPDX-License-Identifier: Apache-2.0
"""Trainable parts of a loss, trained with a LightningModule of which they are no part for anybody else."""

from typing import Any

import lightning as L
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from typing_extensions import override

from lightning_robust.callbacks._strategies import keeps_whole_weights

__all__ = ["TrainedParts"]


class TrainedParts:
    """Puts a loss with parameters on a LightningModule for the time of a fit.

    There the optimizer, the device and precision of the run and DDP find it, while the module's state dictionary does
    not hold it.

    Args:
        loss: The loss.
        name: Tells the parts of several losses apart.
    """

    def __init__(self, loss: nn.Module, name: str) -> None:
        self.loss = loss
        self._name = f"distillation_{name.replace('.', '_')}"
        self._owner: L.LightningModule | None = None

    @property
    def trainable(self) -> bool:
        """Whether there is anything to train."""
        return any(parameter.requires_grad for parameter in self.loss.parameters())

    def install(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parts on the module; in ``setup`` of a fit, before optimizers are made.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule.

        Raises:
            ValueError: The strategy would tear the parts apart.
        """
        if not self.trainable:
            return
        if not keeps_whole_weights(trainer):
            raise ValueError(
                f"{type(self.loss).__name__} trains parts of its own, which {type(trainer.strategy).__name__} would "
                "shard; use strategy='ddp', or a loss without trainable parts."
            )
        left = getattr(pl_module, self._name, None)  # of a fit whose end nobody heard of
        if left is not None and not isinstance(left, _Unsaved):
            raise ValueError(
                f"{type(pl_module).__name__} has an attribute {self._name} of its own; give the callback another "
                "`name`."
            )
        self._owner = pl_module
        setattr(pl_module, self._name, _Unsaved(self.loss))

    def check_optimized(self, trainer: L.Trainer) -> None:
        """Refuse optimizers that leave parts out; when optimizers exist.

        Args:
            trainer: The Trainer.

        Raises:
            ValueError: A trainable parameter of the loss is in no optimizer.
        """
        if self._owner is None:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        optimized = {id(parameter) for group in groups for parameter in group["params"]}
        for name, parameter in self.loss.named_parameters():
            if parameter.requires_grad and id(parameter) not in optimized:
                raise ValueError(
                    f"The parameter {name!r} of {type(self.loss).__name__} is in no optimizer, so it would not learn; "
                    f"let configure_optimizers of {type(self._owner).__name__} use self.parameters(), of which it is "
                    "one during the fit."
                )

    def remove(self) -> None:
        """Take the parts off the module; safe to call at any time and more than once."""
        if self._owner is not None and hasattr(self._owner, self._name):
            delattr(self._owner, self._name)
        self._owner = None


class _Unsaved(nn.Module):
    """Holds a module that is in no state dictionary, and is not missed when one is loaded."""

    stands_apart = True  # no layer of the network, see `own_layers`

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self._prefix = ""
        self.register_load_state_dict_post_hook(_forgive)  # type: ignore[no-untyped-call]

    # as torch declares it, with its defaults
    @override
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._prefix = prefix


def _forgive(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    assert isinstance(module, _Unsaved)
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.startswith(module._prefix)]
