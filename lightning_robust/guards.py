# SPDX-License-Identifier: Apache-2.0
"""Context managers that leave a model and the random generators as they were found.

They need torch only, so attacks and plain training loops use the same ones as the Lightning callbacks.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "RandomState",
    "TransientHook",
    "buffers_restored",
    "evaluation_mode",
    "frozen_modes",
    "module_devices",
    "rng_preserved",
]


@dataclass(frozen=True)
class RandomState:
    """The state of every generator a forward pass may draw from: torch (CPU and devices), NumPy and Python.

    Example:
        >>> state = RandomState.capture()
        >>> first = torch.rand(2)
        >>> state.restore()
        >>> bool((torch.rand(2) == first).all())
        True
    """

    cpu: Tensor
    numpy: dict[str, Any]
    python: tuple[Any, ...]
    devices: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> "RandomState":
        """Read the generators; ``devices`` names the accelerators whose generators count too."""
        states = {
            device: _generator_module(device).get_rng_state(*_index(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        }
        numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
        return cls(torch.get_rng_state(), numpy_state, random.getstate(), states)

    def restore(self) -> None:
        """Set every captured generator back."""
        torch.set_rng_state(self.cpu)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        for device, state in self.devices.items():
            _generator_module(device).set_rng_state(state, *_index(device))


def _generator_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    # Apple's GPU is one, and its functions take no index
    return () if device.type == "mps" else (device,)


def module_devices(module: nn.Module) -> set[torch.device]:
    """Devices that hold parameters of ``module``."""
    return {parameter.device for parameter in module.parameters()}


@contextmanager
def rng_preserved(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Whatever the body draws, the generators stand afterwards where they stood before.

    Args:
        devices: accelerators whose generators are preserved too.
    """
    state = RandomState.capture(devices)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def frozen_modes(module: nn.Module) -> Iterator[None]:
    """Restore the training flag of every sub-module on exit, one by one.

    A bare ``module.train()`` would also switch on the layers that the user had frozen in evaluation mode.

    Args:
        module: the module whose flags are kept.
    """
    flags = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run the body with ``module`` in evaluation mode and restore every flag afterwards.

    Args:
        module: the module to switch.
    """
    with frozen_modes(module):
        # flags only: eval() may do more in a user's module (merge adapters) that flags would not undo
        for child in module.modules():
            child.training = False
        yield


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Put every buffer (norm statistics, counters, queues) back on exit, values and identity.

    Args:
        module: the module whose buffers are kept.
    """
    entries = [
        (owner, name, buffer) for owner in module.modules() for name, buffer in owner.named_buffers(recurse=False)
    ]
    tensors = [buffer for _, _, buffer in entries]
    with torch.no_grad():
        saved = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for owner, name, buffer in entries:
            if getattr(owner, name) is not buffer:
                setattr(owner, name, buffer)
        if tensors:
            with torch.no_grad():
                torch._foreach_copy_(tensors, saved)


class TransientHook:
    """Base of forward hooks that belong to one module: a copy of the module (an EMA, say) gets one that does nothing.

    Example:
        >>> import copy
        >>> class Count(TransientHook):
        ...     calls = 0
        ...     def __call__(self, *_):
        ...         self.calls += 1
        >>> layer, count = nn.Linear(1, 1), Count()
        >>> handle = layer.register_forward_hook(count)
        >>> _ = layer(torch.zeros(1, 1)), copy.deepcopy(layer)(torch.zeros(1, 1))
        >>> count.calls
        1
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _hook_of_a_copy, ()


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    return None
