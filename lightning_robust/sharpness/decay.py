# SPDX-License-Identifier: Apache-2.0
"""Weight decay of an optimizer that is meant to step at perturbed weights."""

from typing import Any

import torch

from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["add_decay", "check_decay", "decays_apart", "shrink_as_decay"]

_ADD_TO_GRADIENT = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)


def decays_apart(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weights shrink apart from the gradient, as in AdamW; if not, their decay is added to it.

    Args:
        optimizer: the optimizer.
        group: one of its groups.
    """
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))


def check_decay(method: str, optimizer: torch.optim.Optimizer | None, *, apart: bool = False) -> None:
    """Refuse an optimizer whose weight decay would not act where the method says it does.

    Args:
        method: name that a refusal begins with.
        optimizer: the base optimizer, where there is one.
        apart: whether the method also copes with decay apart from the gradient.

    Raises:
        ValueError: the optimizer decays weights apart from the gradient, or in a way that is not known.
    """
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        if not group.get("weight_decay"):
            continue
        name = type(optimizer).__name__
        known = isinstance(optimizer, (*_ADD_TO_GRADIENT, torch.optim.AdamW))
        if known and (apart or not decays_apart(optimizer, group)):
            continue
        how = "decays weights apart from the gradient" if known else "may apply its weight decay in any way"
        raise ValueError(
            f"{method} lets weight decay act at the perturbed weights, as published, but {name} {how}; set "
            "decay_at_perturbed=False to decay the unperturbed weights."
        )


def add_decay(
    directions: Gradients, offsets: Gradients, weights: Weights, optimizer: torch.optim.Optimizer | None
) -> None:
    r"""Make a step at :math:`w` decay as one at :math:`w + e` would: add :math:`\lambda e` to the direction.

    The optimizer itself adds :math:`\lambda w`. The result is exact for any optimizer that adds its decay to the
    gradient, with momentum too; nothing happens for groups that decay apart from it.

    Args:
        directions: one per weight; changed in place.
        offsets: the perturbation of each weight; they stay as they are.
        weights: the weights, with their optimizer groups.
        optimizer: the base optimizer; nothing happens without one.
    """
    if optimizer is None:
        return
    rates = [0.0 if decays_apart(optimizer, group) else _rate(group) for group in weights.groups]
    for rate in set(rates) - {0.0}:
        chosen = [index for index, own in enumerate(rates) if own == rate]
        torch._foreach_add_([directions[i] for i in chosen], [offsets[i] for i in chosen], alpha=rate)


def shrink_as_decay(offsets: Gradients, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
    r"""Shrink a move that follows the step as decay in the step would have: by :math:`1 - \eta\lambda`.

    Args:
        offsets: the move of each weight; changed in place in groups that decay apart from the gradient, as in AdamW.
        weights: the weights, with their optimizer groups.
        optimizer: the base optimizer.
    """
    rates = [
        1 - float(group["lr"]) * group.get("weight_decay", 0.0) if decays_apart(optimizer, group) else 1.0
        for group in weights.groups
    ]
    if any(rate != 1 for rate in rates):
        torch._foreach_mul_(offsets, rates)


def _rate(group: dict[str, Any]) -> float:
    rate: float = group.get("weight_decay", 0.0)
    return -rate if group.get("maximize") else rate
