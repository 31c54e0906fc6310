# SPDX-License-Identifier: Apache-2.0
"""Training with an objective in place of the module's own loss."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.conditions import Model
from lightning_robust.callbacks._processes import total
from lightning_robust.callbacks._teacher_checks import (
    banks_of,
    check_cached_data,
    refuse_changed_inputs,
    refuse_different_processes,
    warn_of_smoothed_teachers,
)
from lightning_robust.callbacks._told import told
from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.checks import check_kind
from lightning_robust.objectives import Objective, ObjectiveOutput, Running
from lightning_robust.training import BatchAdapter, PerSampleCallback, RunStep, Stage, StepContext

__all__ = ["ObjectiveTraining"]


class ObjectiveTraining(PerSampleCallback):
    """Trains any module with an objective, TRADES for example; the module's own ``training_step`` does not run.

    The objective prepares each batch once (its attack, at the current weights) and is then the loss that everything
    further inside sees: sharpness-aware callbacks evaluate it at several weights, logit penalties and distillation add
    to it and get its logits. It is told when an epoch starts or ends, when a batch is done and when the optimizer has
    stepped, and reads its files (a teacher's weights) when a fit is set up. ``train/loss`` and the objective's own
    parts (``train/NAME``) are logged per epoch; metrics that the module computes in its ``training_step`` are not.

    What the objective remembers (balances, averages, statistics) is in the callback's part of a checkpoint and
    continues exactly. A second fit begins with it as it was when the callback was made.

    Cost: that of the objective; see there.

    Args:
        objective: the training loss.
        index_key: key or position of the samples' indices in a batch, for an objective that needs them; read off the
            loader's sampler when ``None``.
        num_samples: number of training samples, for such an objective; that of the loader's dataset when ``None``.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
        TypeError: ``objective`` is none.
        ValueError: together with :class:`~lightning_robust.callbacks.AdversarialTraining` if the objective attacks by
            itself, or if the objective has trainable parameters that the module does not know.

    Example:
        >>> from lightning_robust.callbacks import ObjectiveTraining
        >>> from lightning_robust.objectives import TRADES
        >>> ObjectiveTraining(TRADES(beta=6.0)).passes(1)
        12.5
    """

    stage: ClassVar[Stage] = Stage.OBJECTIVE
    exclusive: ClassVar[bool] = True

    def __init__(
        self,
        objective: Objective,
        *,
        index_key: int | str | None = None,
        num_samples: int | None = None,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(index_key=index_key, num_samples=num_samples, logits_from=logits_from, batch=batch)
        check_kind("objective", objective, Objective, "give one of lightning_robust.objectives")
        self.objective = objective
        self._fresh = copy.deepcopy(objective.state_dict())
        self._used = False  # whether a fit or a checkpoint has changed what the objective remembers
        self._epoch = -1  # of the last batch
        self._first = True  # whether the next batch is the first of an optimizer step
        self._max_steps: int | None = None
        self._stepping: Model | None = None  # what the optimizer is about to change

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(objective=type(self.objective).__qualname__)

    @override
    def passes(self, inner: float) -> float:
        return self.objective.passes(inner)

    @override
    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().check(trainer, pl_module)
        if self._used:
            self._begin_anew()
        self._used = True  # a checkpoint to continue from is read after this
        name = type(self.objective).__name__
        attacked = any(isinstance(callback, AdversarialTraining) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self.objective.attacks and attacked:
            raise ValueError(
                f"{name} attacks the images itself and needs clean ones, which AdversarialTraining would replace; "
                f"remove AdversarialTraining, and give its attack to {name}(attack=...)."
            )
        known = {id(parameter) for parameter in pl_module.parameters()}
        if any(id(parameter) not in known for parameter in self.objective.parameters() if parameter.requires_grad):
            raise ValueError(
                f"{name} has trainable parameters that no optimizer would update; make it an attribute of "
                f"{type(pl_module).__name__}, so that configure_optimizers can see them."
            )
        self.objective.ready(told("num_classes", trainer, pl_module), told("in_chans", trainer, pl_module))
        for bank in banks_of(self.objective):
            warn_of_smoothed_teachers(bank)

    @property
    @override
    def follows_samples(self) -> bool:
        return self.objective.needs_index

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.objective.to(pl_module.device)
        for bank in banks_of(self.objective):
            bank.build()  # compared with the checkpoint's
            refuse_different_processes(trainer, bank)
            bank.to(trainer.strategy.root_device)
        self._epoch, self._first, self._max_steps = -1, True, None

    @override
    def on_samples_known(self, trainer: L.Trainer, pl_module: L.LightningModule, num_samples: int) -> None:
        for bank in banks_of(self.objective):
            check_cached_data(trainer, bank)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.objective.epoch_ends(trainer.current_epoch, partial(total, trainer))

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        x, y = self.batch.unpack(batch)
        model = context.model(self)
        if self.follows_samples and self._epoch == -1:  # the first batch of the fit shows whether it will fit
            for bank in banks_of(self.objective):
                refuse_changed_inputs(bank, x, self.batch.input_of(context.batch_as_loaded))
        # Lightning has no hook for the start of an epoch that is continued in its middle
        if context.trainer.current_epoch != self._epoch:
            self._epoch = context.trainer.current_epoch
            self.objective.epoch_starts(self._epoch, context.max_epochs)
        running = self._where(context, x)
        with self._running(running):
            prepared = self.objective.prepare(model, x, y, generator=context.generator(x.device, "objective"))

        counted: list[ObjectiveOutput] = []

        def step(_: Any) -> Any:
            with self._running(replace(running, counted=context.counted)):
                output = self.objective(model, prepared)
            if context.counted:
                counted[:] = [output]
            for name, value in {"loss": output.loss, **output.logs}.items():
                context.log(f"train/{name}", value, batch_size=len(x), prog_bar=name == "loss")
            return {"loss": output.loss, "logits": output.logits, "sample_losses": output.sample_losses}

        context.replace_core(step)
        result = run(batch)
        self.objective.batch_ends(counted[0], running.total)
        self._stepping = model if running.last else None
        self._first = running.last
        return result

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._stepping is not None:
            model, self._stepping = self._stepping, None
            self.objective.step_ends(model, partial(total, trainer))

    @override
    def on_pipeline_end(self) -> None:
        super().on_pipeline_end()
        self._stepping = None
        self.objective.fit_ends()

    def _where(self, context: StepContext, x: Tensor) -> Running:
        trainer = context.trainer
        if self._max_steps is None:
            steps = trainer.estimated_stepping_batches
            self._max_steps = int(steps) if math.isfinite(steps) else -1
        return Running(
            first=self._first,
            last=not trainer.fit_loop.epoch_loop._should_accumulate(),
            step=trainer.global_step,
            max_steps=self._max_steps,
            index=self.indices_of(context, len(x)) if self.follows_samples else None,
            total=partial(total, trainer),
        )

    @contextmanager
    def _running(self, running: Running) -> Iterator[None]:
        # not longer than needed: it reaches the Trainer, which copies of the objective must not
        before, self.objective.running = self.objective.running, running
        try:
            yield
        finally:
            self.objective.running = before

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"objective": self.objective.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._used = True
        self.objective.load_state_dict(state_dict["objective"])

    def _begin_anew(self) -> None:
        # parameters are the module's, which goes on with the weights that it has
        trained = {name for name, _ in self.objective.named_parameters()}
        state = {name: value for name, value in self._fresh.items() if name not in trained}
        self.objective.load_state_dict(state, strict=False)
        for bank in banks_of(self.objective):
            bank.forget()
