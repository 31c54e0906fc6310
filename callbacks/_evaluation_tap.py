# SPDX-License-Identifier: Apache-2.0
"""Taking the logits out of a validation or test step at the moment it returns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.losses import full_precision
from lightning_robust.training import LogitsCapture, LogitsFunction, LogitsNotCaptured, ReplacedMethod

__all__ = ["EvaluationTap", "refuse_other_function"]


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
        self._watched: _WatchedStep | None = None

    def attach(self) -> None:
        """Start watching."""
        self._capture.attach()
        self._watched = _WatchedStep(self, self._module, self._step)

    def detach(self) -> None:
        """Give the module its own step back; doing so twice is harmless."""
        self._capture.detach()
        self._taken = None
        if self._watched is not None:
            self._watched.remove()
            self._watched = None

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run a step and keep its logits.

        Args:
            run: runs the step.
        """
        self._capture.clear()
        output = run()
        try:
            self._taken = self._capture.take(output).detach()
        except LogitsNotCaptured as error:  # raised where the logits are asked for
            self._taken = error
        self._capture.clear()
        return output

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


class _WatchedStep(ReplacedMethod):
    """What hides the module's step."""

    def __init__(self, tap: EvaluationTap, module: L.LightningModule, step: str) -> None:
        super().__init__(module, step)
        self._tap = tap

    @override
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._tap.watch(partial(self.inner, *args, **kwargs))


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
            "which is evaluated here, gives for the same images; normalise and scale inside forward, name the "
            'sub-module whose output is the logits with logits_from="...", or return them from the step as entry '
            '"logits".'
        )


def _differ(seen: Tensor, attacked: Tensor) -> bool:
    """Whether two computations of logits disagree by more than rounding; adding a number to a row changes nothing."""
    a, b = (full_precision(logits) - full_precision(logits).mean(1, keepdim=True) for logits in (seen, attacked))
    tolerance = max(1e-2, *(8 * torch.finfo(logits.dtype).eps for logits in (seen, attacked)))
    # NaN is not larger than anything: the attack reports it
    return bool((a - b).norm() > tolerance * a.norm())
