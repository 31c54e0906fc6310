# SPDX-License-Identifier: Apache-2.0
"""Early and late dropout: drop rates that change from step to step."""

import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range, check_integer
from lightning_robust.regularization import DropLayers, drop_rate_at

__all__ = ["DropSchedule"]


class DropSchedule(Callback):
    """Early or late dropout: sets the drop rates of any module anew in every optimizer step.

    Runs in ``on_train_batch_start``. Early dropout (with rates that fall to 0) helps networks that underfit, late
    dropout those that overfit. Drop-path rates keep their proportions over the depth; see
    :class:`~lightning_robust.regularization.DropLayers`. The rate is a function of the number of optimizer steps that
    were done, so it continues exactly after a resume, in mid-epoch, too, and stays the same within an accumulated step
    (a module that steps its optimizers by hand counts batches). It is logged as ``train/drop_path`` or
    ``train/dropout``. After the fit the layers have the rates with which they came.

    Cost: none to speak of; a compiled module compiles anew for each rate.

    Args:
        rate: Rate where the schedule drops; a linear one begins with it. In the paper 0.1 for dropout, 0.5 for early
            and 0.4 for late drop paths.
        mode: ``"early"``: drops before the cut-off; ``"late"``: drops from it on.
        kind: ``"linear"``: an early schedule falls from ``rate`` in the first step to 0 in the last one before the
            cut-off; ``"constant"``: it keeps the rate until then. A late schedule is constant.
        cutoff_epochs: Number of epochs until an early schedule ends or a late one begins.
        what: ``"drop_path"`` or ``"dropout"``.

    Raises:
        ValueError: If an argument is out of range; at setup, for a run that ends before the cut-off, or for two
            schedules of the same layers; when the fit starts, if the module has no such layers, or if the number of
            batches in an epoch is not known.

    References:
        Liu et al., Dropout Reduces Underfitting, ICML 2023, arXiv 2303.01500.

    Example:
        >>> import lightning as L
        >>> from lightning_robust.callbacks import DropSchedule
        >>> callback = DropSchedule(0.5, mode="early", cutoff_epochs=5)
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rate: float,
        *,
        mode: Literal["early", "late"] = "early",
        kind: Literal["linear", "constant"] = "linear",
        cutoff_epochs: int = 50,
        what: Literal["drop_path", "dropout"] = "drop_path",
    ) -> None:
        check_in_range("rate", rate, 0.0, 1.0)
        check_choice("mode", mode, ("early", "late"))
        check_choice("kind", kind, ("linear", "constant"))
        check_integer("cutoff_epochs", cutoff_epochs, 0)
        check_choice("what", what, ("drop_path", "dropout"))
        self.rate = rate
        self.mode: Literal["early", "late"] = mode
        self.kind: Literal["linear", "constant"] = kind
        self.cutoff_epochs = cutoff_epochs
        self.what: Literal["drop_path", "dropout"] = what
        self._layers: DropLayers | None = None
        self._cutoff_steps = 0
        self._current: float | None = None

    def rate_at(self, step: int) -> float:
        """Return the rate in an optimizer step of the running fit.

        Args:
            step: Step, counted from 0.
        """
        return drop_rate_at(step, rate=self.rate, cutoff_steps=self._cutoff_steps, mode=self.mode, kind=self.kind)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()
        if stage != "fit":
            return
        rivals = [other for other in trainer.callbacks if isinstance(other, DropSchedule) and other.what == self.what]  # type: ignore[attr-defined]
        if len(rivals) > 1:
            raise ValueError(f"Two DropSchedule callbacks of this Trainer set the rates of {self.what}; keep one.")
        debugging = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # cuts every run to one epoch
        if not debugging and trainer.max_epochs is not None and 0 <= trainer.max_epochs < self.cutoff_epochs:
            raise ValueError(
                f"Expected `cutoff_epochs` to be at most the {trainer.max_epochs} epochs of the run but got "
                f"{self.cutoff_epochs}."
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layers = DropLayers(pl_module, what=self.what)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cutoff_steps = sum(_steps_of(trainer, pl_module, epoch) for epoch in range(self.cutoff_epochs))
        if self.mode == "early" and self.kind == "linear" and _is_compiled(pl_module):
            rank_zero_warn(
                f"{type(pl_module).__name__} is compiled, and a linear DropSchedule changes the rate in every step, "
                'each of which would be compiled anew, until PyTorch gives up compiling; use kind="constant", or do '
                "not compile before the cut-off."
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._layers is not None, "made in on_fit_start"
        if pl_module.automatic_optimization:
            step = trainer.global_step
        else:
            step = trainer.current_epoch * _steps_of(trainer, pl_module, trainer.current_epoch) + batch_idx
        rate = self.rate_at(step)
        if rate != self._current:
            self._layers.set_rate(rate)
            self._current = rate
        if not trainer.barebones:
            pl_module.log(f"train/{self.what}", rate, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._layers is not None:
            self._layers.restore()
            self._layers = None
        self._current = None


def _steps_of(trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> int:
    """Optimizer steps of an epoch; batches where the module steps its optimizers by hand."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        raise ValueError(
            "Expected a known number of training batches per epoch for DropSchedule, but the loader has no length; set "
            "`limit_train_batches` of the Trainer to that number."
        )
    if not pl_module.automatic_optimization:
        return int(batches)
    schedulers = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    accumulated = trainer.accumulate_grad_batches
    if schedulers:
        accumulated = schedulers[0].get_accumulate_grad_batches(epoch)
    return math.ceil(batches / accumulated)  # an epoch ends with a step


def _is_compiled(pl_module: L.LightningModule) -> bool:
    def compiled(module: torch.nn.Module) -> bool:
        return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None

    return getattr(pl_module, "_compiler_ctx", None) is not None or any(map(compiled, pl_module.modules()))
