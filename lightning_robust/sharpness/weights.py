# SPDX-License-Identifier: Apache-2.0
"""The weights a sharpness-aware method works on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Gradients", "Weights"]

Gradients = list[Tensor]


@dataclass(frozen=True)
class Weights:
    """Trainable weights of one model, in a fixed order.

    Attributes:
        tensors: the parameters themselves.
        names: one name per parameter, as in ``named_parameters``.
        options: what the optimizer group of each parameter says beyond the optimizer's own options: ``rho`` for
            example, which a method reads from there.
        groups: the optimizer group of each parameter, with the learning rate; empty without an optimizer.
        owners: the module that holds each parameter, where it is known.
        positions: the place of each parameter among those of the module, whatever the order of the optimizer's groups;
            all equal where it is not known.
        movable: which of them a method may perturb; all of them when ``None``.
    """

    tensors: list[Tensor]
    names: list[str]
    options: list[dict[str, Any]]
    groups: list[dict[str, Any]] = field(default_factory=list)
    owners: list[nn.Module | None] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    movable: list[bool] | None = None

    @classmethod
    def of(
        cls, source: torch.optim.Optimizer | nn.Module | Iterable[Tensor], module: nn.Module | None = None
    ) -> "Weights":
        """Collect the trainable parameters of an optimizer (with its group options), a module or a list.

        Args:
            source: where the parameters come from.
            module: gives the parameters their names and owners.
        """
        if isinstance(source, nn.Module):
            module = source
            source = source.parameters()
        names = {id(parameter): name for name, parameter in module.named_parameters()} if module is not None else {}
        owners = _owners(module) if module is not None else {}
        known = module.parameters() if module is not None else ()
        places = {id(parameter): place for place, parameter in enumerate(known)}
        if isinstance(source, torch.optim.Optimizer):
            # the optimizer's own options are not ours: Adadelta has a `rho` too
            own = set(source.defaults)
            pairs = [(group, {k: v for k, v in group.items() if k not in own}) for group in source.param_groups]
        else:
            pairs = [({"params": list(source)}, {})]
        found = [
            (parameter, options, group)
            for group, options in pairs
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        return cls(
            tensors=[parameter for parameter, _, _ in found],
            names=[names.get(id(parameter), str(i)) for i, (parameter, _, _) in enumerate(found)],
            options=[options for _, options, _ in found],
            groups=[group for _, _, group in found],
            owners=[owners.get(id(parameter)) for parameter, _, _ in found],
            positions=[places.get(id(parameter), len(places)) for parameter, _, _ in found],
        )

    def subset(self, keep: Sequence[bool]) -> "Weights":
        """The weights whose entry in ``keep`` is true."""

        def kept(values: list[Any]) -> list[Any]:
            return [value for value, chosen in zip(values, keep, strict=True) if chosen] if values else []

        return Weights(
            tensors=kept(self.tensors),
            names=kept(self.names),
            options=kept(self.options),
            groups=kept(self.groups),
            owners=kept(self.owners),
            positions=kept(self.positions),
            movable=None if self.movable is None else kept(self.movable),
        )

    def with_movable(self, movable: Sequence[bool]) -> "Weights":
        """The same weights, of which only those with a true entry may be perturbed."""
        return replace(self, movable=None if all(movable) else list(movable))

    @cached_property
    def perturbed(self) -> "Weights":
        """The weights that a method may perturb."""
        return self if self.movable is None else self.subset(self.movable).with_movable(())

    def pick(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of one tensor per weight, those of the perturbed weights; the list itself if these are all.

        Args:
            tensors: gradients, say.
        """
        if self.movable is None:
            return tensors
        return [tensor for tensor, chosen in zip(tensors, self.movable, strict=True) if chosen]

    def __len__(self) -> int:
        return len(self.tensors)


def _owners(module: nn.Module) -> dict[int, nn.Module]:
    return {id(parameter): owner for owner in module.modules() for parameter in owner.parameters(recurse=False)}
