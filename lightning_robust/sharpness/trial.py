# SPDX-License-Identifier: Apache-2.0
"""What an optimizer would do, without letting it."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lightning_robust.sharpness.weights import Gradients

__all__ = ["trial_step"]


@torch.no_grad()
def trial_step(optimizer: torch.optim.Optimizer, tensors: list[Tensor], gradients: Gradients) -> Gradients:
    """What ``optimizer.step()`` would add to each tensor, given these gradients.

    A copy of the optimizer steps: its momentum and decay count, while its state, its hooks and the weights stay as they
    are.

    Args:
        optimizer: the optimizer.
        tensors: parameters of it.
        gradients: one per parameter; the optimizer may change them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> trial_step(optimizer, [weight], [torch.ones(1)]), weight.item()
        ([tensor([-0.1000])], 1.0)
    """
    twins = {
        id(parameter): parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for tensor, gradient in zip(tensors, gradients, strict=True):
        twins[id(tensor)].grad = gradient
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, kept in optimizer.state.items():
        state[twins.get(id(key), key)] = _copied(kept)
    groups = [
        {name: [twins[id(p)] for p in value] if name == "params" else _copied(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    copied = object.__new__(type(optimizer))
    # as copy.deepcopy does it, which takes ten times as long
    copied.__setstate__({"defaults": optimizer.defaults, "state": state, "param_groups": groups})
    copied.step()
    moved = [twins[id(tensor)].detach() for tensor in tensors]
    torch._foreach_sub_(moved, tensors)
    return moved


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return copy.deepcopy(value)
