# SPDX-License-Identifier: Apache-2.0
"""Noticing that a training step shows its network something else than the batch holds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.guards import evaluation_mode, rng_preserved

__all__ = ["NetworkInput"]


class NetworkInput:
    """Watches, between enter and exit, whether a tensor reaches a module or one of its networks unchanged.

    It costs a comparison of values in every call, so it is meant for one batch. Code that runs compiled is not seen.

    Args:
        module: The LightningModule.
        x: The tensor that should arrive.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self._module = module
        self._x = x.detach()
        self._handles: list[Any] = []
        self.arrived = False
        #: What the first network inside the module got; ``None`` if no call was seen.
        self.first: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether networks were called, and none of them with the tensor."""
        return self.first is not None and not self.arrived

    def same_as_in(self, function: Callable[[Tensor], Any]) -> bool:
        """Whether ``function`` shows its network what the watched code showed it; one forward in evaluation mode.

        Args:
            function: maps ``x`` to logits, as the attacked function does.
        """
        watch = NetworkInput(self._module, self._x)
        with rng_preserved({self._x.device}), evaluation_mode(self._module), torch.no_grad(), watch:
            function(self._x)
        # before torch 2.7 autocast may have kept copies of the weights that carry no gradient
        torch.clear_autocast_cache()
        return watch.first is not None and self.first is not None and _same(watch.first, self.first)

    def __enter__(self) -> "NetworkInput":
        for child in self._module.modules():
            # a layer without parameters (normalisation, augmentation) is no network
            if child is self._module or any(True for _ in child.parameters()):
                self._handles.append(child.register_forward_pre_hook(self._look, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _look(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # constant while compiling, so that nothing of this stays in a compiled step
        if torch.compiler.is_compiling() or (self.arrived and self.first is not None):
            return
        inputs = [value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor)]
        if self.first is None and inputs and child is not self._module:
            self.first = inputs[0].detach()
        self.arrived = self.arrived or any(_same(value, self._x) for value in inputs)


def _same(value: Tensor, x: Tensor) -> bool:
    """Whether ``value`` holds ``x``: perhaps reshaped, in another precision, or with more or fewer samples behind."""
    if value is x:
        return True
    if (
        not value.ndim
        or not value.numel()
        or value.device != x.device
        or value.numel() * len(x) != x.numel() * len(value)
    ):
        return False
    count = min(len(value), len(x))
    return torch.equal(value[:count].reshape(count, -1), x[:count].reshape(count, -1).to(value.dtype))
