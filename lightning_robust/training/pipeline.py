# SPDX-License-Identifier: Apache-2.0
"""The step pipeline: the one wrapper around ``training_step`` that all step callbacks share."""

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from typing_extensions import override

from lightning_robust.training.context import RunStep, StepContext
from lightning_robust.training.logits import LogitsCapture
from lightning_robust.training.quiet import QuietGate
from lightning_robust.training.replaced import ReplacedMethod
from lightning_robust.training.stages import REASONS, Stage

if TYPE_CHECKING:
    from lightning_robust.training.callback import StepCallback

__all__ = ["StepPipeline"]

_ORDER = {stage: position for position, stage in enumerate(Stage)}


class StepPipeline:
    """Wraps ``pl_module.training_step`` in the step callbacks of a Trainer, outermost stage first.

    Args:
        trainer: the Trainer whose callbacks take part.
        pl_module: the module whose step is wrapped.

    Raises:
        ValueError: two callbacks that must not meet, or a step that consumes the loader's iterator itself.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.callbacks = sorted(step_callbacks(trainer), key=lambda callback: _ORDER[callback.stage])
        self._gate = QuietGate(pl_module)
        self._captures: dict[str | None, LogitsCapture] = {}
        self._step: _WrappedStep | None = None
        self._installed = False
        self._seed = ""
        self._refuse_conflicts()

    @staticmethod
    def leader(trainer: L.Trainer) -> "StepCallback | None":
        """The step callback that owns the pipeline: the first in the Trainer's list."""
        return next(iter(step_callbacks(trainer)), None)

    def describe(self) -> str:
        """The installed order, one line per callback, outermost first."""
        lines = [f"{callback.stage:<9} {type(callback).__name__}" for callback in self.callbacks]
        return "\n".join([*lines, f"{'step':<9} {type(self.pl_module).__name__}.training_step"])

    def reasons(self) -> dict[Stage, str]:
        """Why each occupied stage stands where it stands."""
        return {callback.stage: REASONS[callback.stage] for callback in self.callbacks}

    def passes(self) -> float:
        """Forward+backward passes of one training step; a plain step has 1."""
        count = 1.0
        for callback in reversed(self.callbacks):
            count = callback.passes(count)
        return count

    def install(self) -> None:
        """Hide the module's ``training_step`` behind the pipeline."""
        if self._installed:
            return
        self._installed = True
        module = self.pl_module
        # read once: a callback may re-seed torch during the fit
        self._seed = os.environ.get("PL_GLOBAL_SEED", str(torch.initial_seed()))
        _take_off(module)  # what a fit with another Trainer may have left
        for callback in self.callbacks:
            callback.check_optimization(module)
            callback.on_pipeline_start(self.trainer, module)
        self._gate.install()
        for name in {callback.logits_from for callback in self.callbacks if callback.needs_logits}:
            self._captures[name] = LogitsCapture(module, name, needs_grad=True)
            self._captures[name].attach()
        self._step = _WrappedStep(self)
        rank_zero_info("Training step, outermost first:\n" + self.describe())

    def remove(self) -> None:
        """Give the module its own step back; safe to call at any time and more than once."""
        if not self._installed:
            return
        self._installed = False
        if self._step is not None:
            self._step.remove()
            self._step = None
        for capture in self._captures.values():
            capture.detach()
        self._captures.clear()
        self._gate.remove()
        for callback in self.callbacks:
            callback.on_pipeline_end()

    def run(self, inner: RunStep, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        """Run a training step inside the callbacks.

        Args:
            inner: the module's own step.
            batch: its first argument.
            *rest: its further arguments.
            **kwargs: its named arguments.
        """
        if not self.trainer.training:  # a validation_step that calls training_step
            return inner(batch, *rest, **kwargs)
        batch_idx = rest[0] if rest else kwargs.get("batch_idx", self.trainer.fit_loop.batch_idx)
        context = StepContext(self.trainer, self.pl_module, batch, batch_idx, self._captures, self._gate, self._seed)
        run: RunStep = partial(context._run_core, lambda inner_batch: inner(inner_batch, *rest, **kwargs))
        for callback in reversed(self.callbacks):
            run = partial(callback.around_step, context, run=run)
        return run(batch)

    def _refuse_conflicts(self) -> None:
        for stage in Stage:
            rivals = [type(cb).__name__ for cb in self.callbacks if cb.stage is stage and cb.exclusive]
            if len(rivals) > 1:
                raise ValueError(
                    f"{rivals[0]} and {rivals[1]} cannot work in one Trainer: each of them decides the '{stage}' stage "
                    "of the training step alone; keep one."
                )
        if is_param_in_hook_signature(self.pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                f"{type(self.pl_module).__name__}.training_step takes `dataloader_iter`, so there is no batch to work "
                "on; write it as training_step(self, batch, batch_idx)."
            )


class _WrappedStep(ReplacedMethod):
    """What hides the module's ``training_step``."""

    def __init__(self, pipeline: StepPipeline) -> None:
        super().__init__(pipeline.pl_module, "training_step")
        self.pipeline = pipeline

    @override
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipeline.run(self.inner, *args, **kwargs)


def _take_off(module: L.LightningModule) -> None:
    step = vars(module).get("training_step")
    if isinstance(step, _WrappedStep):
        step.pipeline.remove()


def step_callbacks(trainer: L.Trainer) -> list["StepCallback"]:
    """The Trainer's step callbacks in listed order."""
    from lightning_robust.training.callback import StepCallback

    # `callbacks` is set by the Trainer's constructor and missing from its annotations
    return [callback for callback in trainer.callbacks if isinstance(callback, StepCallback)]  # type: ignore[attr-defined]
