# SPDX-License-Identifier: Apache-2.0
"""Taking the logits out of a validation or test step at the moment it returns."""

import inspect
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_robust.losses import full_precision
from lightning_robust.training import LogitsCapture, LogitsFunction, LogitsNotCaptured

__all__ = ["EvaluationTap", "refuse_other_function"]

_ABSENT = object()


class EvaluationTap:
    """Wraps ``validation_step`` or ``test_step`` of a module instance and keeps the logits of its last call.

    The hooks of callbacks would be too late: another callback may have run the network on something else (an attack)
    between the step and ours. Several taps may watch one step, and stop in any order.

    Args:
        pl_module: The module whose step is watched.
        step: ``"validation_step"`` or ``"test_step"``.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when not given.
    """

    def __init__(self, pl_module: L.LightningModule, step: str, logits_from: str | None) -> None:
        self._module = pl_module
        self._step = step
        self._capture = LogitsCapture(pl_module, logits_from)
        self._taken: Tensor | LogitsNotCaptured | None = None
        self._hidden: Any = None
        self._wrapper: Any = None  # None: not attached

    def attach(self) -> None:
        """Start watching."""
        inner = getattr(self._module, self._step)

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._wrapper is None:  # below the wrapper of somebody who came later
                return inner(*args, **kwargs)
            self._capture.clear()
            output = inner(*args, **kwargs)
            try:
                self._taken = self._capture.take(output).detach()
            except LogitsNotCaptured as error:  # raised where the logits are asked for
                self._taken = error
            self._capture.clear()
            return output

        # Lightning reads the parameter names of the step one level deep
        step.__wrapped__ = inspect.unwrap(inner)  # type: ignore[attr-defined]
        step.tap = self  # type: ignore[attr-defined]
        self._capture.attach()
        self._hidden = vars(self._module).get(self._step, _ABSENT)
        self._wrapper = vars(self._module)[self._step] = step

    def detach(self) -> None:
        """Give the module its own step back; doing so twice is harmless."""
        self._capture.detach()
        self._taken = None
        wrapper, self._wrapper = self._wrapper, None
        if wrapper is None or vars(self._module).get(self._step) is not wrapper:
            return  # another wrapper hides ours, which only passes calls on from now
        hidden = self._hidden
        while isinstance(tap := getattr(hidden, "tap", None), EvaluationTap) and tap._wrapper is None:
            hidden = tap._hidden
        if hidden is _ABSENT:
            del vars(self._module)[self._step]
        else:
            vars(self._module)[self._step] = hidden

    def take(self) -> Tensor:
        """The logits of the last step, once.

        Raises:
            LogitsNotCaptured: the step shows none; the message says what to name.
        """
        taken, self._taken = self._taken, None
        assert taken is not None, "no step ran since the last call"
        if isinstance(taken, LogitsNotCaptured):
            raise taken
        return taken


def refuse_other_function(tap: EvaluationTap, function: LogitsFunction, x: Tensor) -> None:
    """Refuse a step whose logits are not those of ``function``; one forward, in the modes of the step.

    Args:
        tap: What watched the step.
        function: Maps images to logits.
        x: The images of the step's batch.

    Raises:
        ValueError: The logits differ by more than rounding.
    """
    if any(child.training for child in function.module.modules()):
        return  # dropout and batch statistics differ by themselves
    try:
        seen = tap.take()
    except LogitsNotCaptured:  # nothing to compare with
        return
    logits = function(x)
    if seen.shape != logits.shape or _differ(seen, logits):
        raise ValueError(
            f"The step of {type(function.module).__name__} computes other logits than its forward (or `logits_from`), "
            "which is attacked, gives for the same images; normalise and scale inside forward, name the sub-module "
            'whose output is the logits with logits_from="...", or return them from the step as entry "logits".'
        )


def _differ(seen: Tensor, attacked: Tensor) -> bool:
    """Whether two computations of logits disagree by more than rounding; adding a number to a row changes nothing."""
    a, b = (full_precision(logits) - full_precision(logits).mean(1, keepdim=True) for logits in (seen, attacked))
    tolerance = max(1e-2, *(8 * torch.finfo(logits.dtype).eps for logits in (seen, attacked)))
    # NaN is not larger than anything: the attack reports it
    return bool((a - b).norm() > tolerance * a.norm())
