# SPDX-License-Identifier: Apache-2.0
"""Training with an objective in place of the module's own loss."""

from functools import partial
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from lightning_robust.callbacks._processes import total
from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.objectives import Objective, ObjectiveOutput
from lightning_robust.training import BatchAdapter, RunStep, Stage, StepCallback, StepContext

__all__ = ["ObjectiveTraining"]


class ObjectiveTraining(StepCallback):
    """Trains any module with an objective, TRADES for example; the module's own ``training_step`` does not run.

    The objective prepares each batch once (its attack, at the current weights) and is then the loss that everything
    further inside sees: sharpness-aware callbacks evaluate it at several weights, logit penalties and distillation add
    to it and get its logits. It is told when an epoch starts or ends and when a batch is done. ``train/loss`` and the
    objective's own parts (``train/NAME``) are logged per epoch; metrics that the module computes in its
    ``training_step`` are not.

    Cost: that of the objective; see there.

    Args:
        objective: the training loss.
        logits_from: dotted name of the sub-module whose output is the logits; found by itself when ``None``.
        batch: how to read images and targets from a batch; the usual forms are understood when ``None``.

    Raises:
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
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
    ) -> None:
        super().__init__(logits_from=logits_from, batch=batch)
        self.objective = objective
        self._epoch = -1  # of the last batch

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

    @override
    def on_pipeline_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.objective.to(pl_module.device)
        self._epoch = -1

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.objective.epoch_ends(trainer.current_epoch, partial(total, trainer))

    @override
    def around_step(self, context: StepContext, batch: Any, run: RunStep) -> Any:
        x, y = self.batch.unpack(batch)
        model = context.model(self)
        # Lightning has no hook for the start of an epoch that is continued in its middle
        if context.trainer.current_epoch != self._epoch:
            self._epoch = context.trainer.current_epoch
            self.objective.epoch_starts(self._epoch, context.max_epochs)
        prepared = self.objective.prepare(model, x, y, generator=context.generator(x.device, "objective"))

        counted: list[ObjectiveOutput] = []

        def step(_: Any) -> Any:
            output = self.objective(model, prepared)
            if context.counted:
                counted[:] = [output]
            for name, value in {"loss": output.loss, **output.logs}.items():
                context.log(f"train/{name}", value, batch_size=len(x), prog_bar=name == "loss")
            return {"loss": output.loss, "logits": output.logits, "sample_losses": output.sample_losses}

        context.replace_core(step)
        result = run(batch)
        self.objective.batch_ends(counted[0], partial(total, context.trainer))
        return result

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"objective": self.objective.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.objective.load_state_dict(state_dict["objective"])
