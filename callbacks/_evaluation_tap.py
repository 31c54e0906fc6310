# SPDX-License-Identifier: Apache-2.0
"""Taking the logits out of a validation or test step at the moment it returns."""

import inspect
from typing import Any

import lightning as L
from torch import Tensor

from lightning_robust.training import LogitsCapture

__all__ = ["EvaluationTap"]

_ABSENT = object()


class EvaluationTap:
    """Wraps ``validation_step`` or ``test_step`` of a module instance and keeps the logits of its last call.

    The hooks of callbacks would be too late: another callback may have run the network on something else (an attack)
    between the step and ours.

    Args:
        pl_module: The module whose step is watched.
        step: ``"validation_step"`` or ``"test_step"``.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when not given.
    """

    def __init__(self, pl_module: L.LightningModule, step: str, logits_from: str | None) -> None:
        self._module = pl_module
        self._step = step
        self._capture = LogitsCapture(pl_module, logits_from)
        self._logits: Tensor | None = None
        self._hidden: Any = None

    def attach(self) -> None:
        """Start watching."""
        inner = getattr(self._module, self._step)

        def step(*args: Any, **kwargs: Any) -> Any:
            self._capture.clear()
            output = inner(*args, **kwargs)
            self._logits = self._capture.take(output).detach()
            self._capture.clear()
            return output

        # Lightning reads the parameter names of the step one level deep
        step.__wrapped__ = inspect.unwrap(inner)  # type: ignore[attr-defined]
        self._capture.attach()
        self._hidden = vars(self._module).get(self._step, _ABSENT)
        vars(self._module)[self._step] = step

    def detach(self) -> None:
        """Give the module its own step back."""
        self._capture.detach()
        self._logits = None
        if self._hidden is _ABSENT:
            del vars(self._module)[self._step]
        else:
            vars(self._module)[self._step] = self._hidden

    def take(self) -> Tensor:
        """The logits of the last step, once."""
        assert self._logits is not None, "no step ran since the last call"
        logits, self._logits = self._logits, None
        return logits
