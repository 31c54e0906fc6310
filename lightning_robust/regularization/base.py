# SPDX-License-Identifier: Apache-2.0
"""Base class of the penalties on weights."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.regularization.names import NamePatterns, plain_name
from lightning_robust.schedules import Coefficient, Schedule

__all__ = ["WeightRegularizer"]

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WeightRegularizer:
    """A coefficient times the sum of a penalty over the weights of the chosen layers; adds to any loss.

    Chosen are convolutions and, if the method counts them, linear layers; never biases, normalisation layers,
    embeddings or transposed convolutions. Frozen weights do not count, and a weight that two layers share counts once.
    Subclasses implement :meth:`penalty` for one weight. The coefficient is a number or a
    :class:`~lightning_robust.losses.Schedule`; a schedule is told the epoch by :meth:`set_progress`, which the callback
    ``WeightRegularization`` calls at the start of every epoch.

    Args:
        coefficient: Factor of the sum.
        linear: Whether linear layers count.
        include: Regular expressions, one of which must occur in the name of a layer; any name when ``None``.
        exclude: Regular expressions, none of which may occur in the name of a layer.

    Raises:
        ValueError: If a pattern is not a regular expression, or, when called, if no layer is chosen.
        RuntimeError: If a schedule was never told the epoch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_robust.regularization import WeightRegularizer
        >>> class SquaredNorm(WeightRegularizer):
        ...     name = "squared_norm"
        ...     def penalty(self, weight):
        ...         return weight.square().sum()
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.eye_(layer.weight)
        >>> SquaredNorm(coefficient=0.5, linear=True)(layer).item()
        1.0
    """

    name: ClassVar[str] = "weight_penalty"  # the callback logs the penalty under this name
    coefficient_name: ClassVar[str] = "coefficient"  # what the constructor of the subclass calls it
    replaces_weight_decay: ClassVar[bool] = False  # the callback warns when the optimizer decays the same weights

    def __init__(
        self,
        *,
        coefficient: float | Schedule,
        linear: bool = False,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
    ) -> None:
        self._coefficient = Coefficient(
            self.coefficient_name, coefficient, owner=type(self).__name__, callback="WeightRegularization"
        )
        self.linear = linear
        self.names = NamePatterns(include=include, exclude=exclude)

    @property
    def schedule(self) -> Schedule:
        """The coefficient over the run."""
        return self._coefficient.schedule

    @property
    def coefficient(self) -> float:
        """Factor of the sum in the current epoch."""
        return self._coefficient.value

    def set_progress(self, epoch: int, max_epochs: int) -> None:
        """Tell the schedule the epoch (counted from 0) and the number of epochs of the run (-1: unknown)."""
        self._coefficient.set_progress(epoch, max_epochs)

    def penalty(self, weight: Tensor) -> Tensor:
        """Return the penalty of one weight ``[out, ...]``, a scalar, without the coefficient."""
        raise NotImplementedError

    def check(self, name: str, weight: Tensor) -> None:
        """Refuse a weight for which the penalty is not defined; any weight will do unless a subclass says otherwise.

        Args:
            name: Name of the layer.
            weight: Its weight.
        """

    def layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the chosen layers of a module by name, frozen ones included.

        Args:
            module: The network.

        Raises:
            ValueError: None is chosen, or the penalty is not defined for one of them.
        """
        kinds: tuple[type[nn.Module], ...] = (*_CONVOLUTIONS, nn.Linear) if self.linear else _CONVOLUTIONS
        named = ((plain_name(name), layer) for name, layer in module.named_modules())
        chosen: dict[str, nn.Module] = {
            name: layer for name, layer in named if isinstance(layer, kinds) and name in self.names
        }
        if not chosen:
            kind = "convolutions and linear layers" if self.linear else "convolutions (linear=True adds linear layers)"
            raise ValueError(
                f"{type(self).__name__} found no weight in {type(module).__name__} to work on: it looks at {kind} "
                f"of certain names ({self.names})."
            )
        for name, weight in self.weights(chosen).items():
            self.check(name, weight)
        return chosen

    def weights(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Return the weights of layers as they are now, without frozen ones; a shared one appears once.

        Args:
            layers: Layers by name, from :meth:`layers`.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        for name, layer in layers.items():
            weight = layer.weight
            assert isinstance(weight, Tensor), "the chosen kinds of layers have one"
            if weight.requires_grad or not isinstance(weight, nn.Parameter):
                found.setdefault(id(weight), (name, weight))
        return dict(found.values())

    def total(self, weights: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the penalties without the coefficient, computed in float32 (float64 for such weights).

        Args:
            weights: A network, or weights by name, from :meth:`weights`.
        """
        if isinstance(weights, nn.Module):
            weights = self.weights(self.layers(weights))
        if not weights:  # everything is frozen at the moment
            return torch.zeros(())
        with autocast_off(next(iter(weights.values()))):
            return torch.stack([self.penalty(full_precision(weight)) for weight in weights.values()]).sum()

    def __call__(self, weights: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Return the coefficient times :meth:`total`."""
        return self.coefficient * self.total(weights)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.coefficient_name}={self.schedule!r}, linear={self.linear}, {self.names})"
