# SPDX-License-Identifier: Apache-2.0
"""What a forward may change behind one's back: state, generators, and gradients of its own."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_robust.evaluation.conditions import evaluation_conditions
from lightning_robust.guards import RandomState, buffers_restored
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["Seen", "backwards_seen", "module_state", "same_generators", "seeded_conditions", "state_changes"]


@dataclass
class Seen:
    """How often something was seen.

    Args:
        count: so often.
    """

    count: int = 0


@contextmanager
def backwards_seen() -> Iterator[Seen]:
    """Counts what is read back from graphs in the body: a backward there reads what its forward has saved."""
    seen = Seen()

    def read(saved: Tensor) -> Tensor:
        seen.count += 1
        return saved

    # detached: a graph that saves its own output would otherwise never be freed
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, read):
        yield seen


def module_state(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that a forward may change, by a name to show.

    Args:
        module: the module.
    """
    parameters = dict(module.named_parameters())
    return {
        **{f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()},
        **{f"weight {name}": _digest(parameter) for name, parameter in parameters.items()},
        **{f"requires_grad of {name}": parameter.requires_grad for name, parameter in parameters.items()},
        **{f"gradient of {name}": _digest(parameter.grad) for name, parameter in parameters.items()},
        **{f"mode of {name or 'the model'}": child.training for name, child in module.named_modules()},
    }


def _digest(tensor: Tensor | None) -> tuple[float, float] | None:
    """Two numbers that a change of the tensor moves; a copy of all weights may not fit."""
    if tensor is None:
        return None
    flat = full_precision(tensor.detach())
    return float(flat.sum()), float(flat.square().sum())


def state_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two states.

    Args:
        before: what :func:`module_state` returned.
        after: what it returned later.
    """
    return sorted(key for key in before.keys() | after.keys() if not _equal(before.get(key), after.get(key)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    return repr(one) == repr(other)  # NaN is equal to NaN


def same_generators(one: RandomState, other: RandomState) -> bool:
    """Whether the random generators stand where they stood.

    Args:
        one: their state.
        other: their state later.
    """
    devices = all(torch.equal(state, other.devices[device]) for device, state in one.devices.items())
    keys = [(state.numpy["state"]["pos"], state.numpy["state"]["key"].tobytes()) for state in (one, other)]
    return devices and keys[0] == keys[1] and torch.equal(one.cpu, other.cpu) and one.python == other.python


@contextmanager
def seeded_conditions(module: nn.Module | None, x: Tensor, *, seed: int, grad: bool, precise: bool) -> Iterator[None]:
    """Evaluation mode, outside inference mode, seeded generators; modes, buffers and generators are put back.

    Args:
        module: the module whose modes and buffers they are; ``None`` for a plain callable.
        x: images on the device in question.
        seed: seed of the global generators.
        grad: record a graph.
        precise: switch autocast off.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_conditions(module, x.device))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(autocast_off(x) if precise else nullcontext())
        _seed_generators(x.device, seed)
        if module is not None:
            stack.enter_context(buffers_restored(module))
        yield


def _seed_generators(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device.type).manual_seed(seed)
