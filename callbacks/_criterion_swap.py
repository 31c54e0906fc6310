# SPDX-License-Identifier: Apache-2.0
"""Standing in for the loss that a LightningModule holds as a sub-module."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust import losses

__all__ = ["CriterionSwap", "find_criterion"]

WHOLE_LOSS = "loss"


def find_criterion(module: nn.Module, name: str | None) -> str | None:
    """Dotted name of the cross-entropy of a module; ``None`` when its whole loss is meant.

    Args:
        module: The LightningModule.
        name: What the user named; ``None`` to look for it.

    Raises:
        ValueError: If there is no such sub-module, or if several may be meant.
    """
    if name is not None and name != WHOLE_LOSS:
        names = [candidate for candidate, _ in module.named_modules() if candidate]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names[:5]
            raise ValueError(
                f"replaces={name!r} names no sub-module of {type(module).__name__}; it has {', '.join(near)}. "
                f'replaces="{WHOLE_LOSS}" replaces the whole loss of the training step.'
            )
        return name
    if name == WHOLE_LOSS:
        return None
    found = [
        candidate
        for candidate, child in module.named_modules()
        if isinstance(child, nn.CrossEntropyLoss | losses.Criterion) and candidate
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) > 1:
        raise ValueError(
            f"{type(module).__name__} has several criteria: {', '.join(outer)}; say which one is replaced with "
            f'replaces="{outer[0]}", or replace the whole loss of the training step with replaces="{WHOLE_LOSS}".'
        )
    return outer[0] if outer else None


class CriterionSwap:
    """Puts a function in the place of a sub-module for the time of a step.

    Args:
        module: The LightningModule.
        name: Dotted name of the sub-module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        parent, _, self._child = name.rpartition(".")
        self._owner = module.get_submodule(parent)
        self._name = name
        self._title = type(module).__name__
        self._stand_in = _StandIn()

    @contextmanager
    def by(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Let ``loss(logits, target)`` answer in its place.

        Args:
            loss: The function.
        """
        own = self._owner._modules[self._child]
        self._stand_in.loss, self._stand_in.calls = loss, 0
        self._owner._modules[self._child] = self._stand_in
        try:
            yield
        finally:
            self._owner._modules[self._child] = own
            self._stand_in.loss = None

    def refuse_uncalled(self) -> None:
        """Refuse a step that found a loss elsewhere.

        Raises:
            ValueError: If nobody called the function that stood in last.
        """
        if not self._stand_in.calls:
            raise ValueError(
                f"The training_step of {self._title} did not call its {self._name}, so its loss was not replaced; "
                f"name the criterion that it calls with replaces=..., or replace its whole loss with "
                f'replaces="{WHOLE_LOSS}".'
            )


class _StandIn(nn.Module):
    """What a module finds in place of its criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: Callable[[Tensor, Tensor], Tensor] | None = None
        self.calls = 0

    # Each step has another context, for which a compiled step would be compiled anew.
    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, logits: Tensor, target: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert self.loss is not None, "stands in during steps only"
        self.calls += 1
        return self.loss(logits, target)
