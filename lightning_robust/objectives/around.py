# SPDX-License-Identifier: Apache-2.0
"""Objectives around another one, which they leave most of the work to."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_kind
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared, Running, Total

__all__ = ["AroundObjective"]


class AroundObjective(Objective):
    """Hands everything on to another objective; subclasses change what they are about.

    Args:
        objective: the one inside.

    Raises:
        TypeError: ``objective`` is none.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        check_kind("objective", objective, Objective, "give the loss that this one stands on")
        self.objective = objective
        self.attacks = objective.attacks  # what is inside decides

    @property
    def running(self) -> Running:
        """Where in the training the batch stands; the objective inside is told the same."""
        return self._running

    @running.setter
    def running(self, running: Running) -> None:
        self._running = running
        if "objective" in self._modules:  # not yet while this object is made
            self.objective.running = running

    @property
    def attack(self) -> Attack | None:
        """The attack of the objective inside, if it has one."""
        attack: Attack | None = getattr(self.objective, "attack", None)
        return attack

    @property
    def current_attack(self) -> Attack | None:
        """Its attack in the running epoch."""
        attack: Attack | None = getattr(self.objective, "current_attack", None)
        return attack

    @property
    @override
    def needs_index(self) -> bool:
        return self.objective.needs_index

    @override
    def ready(self, num_classes: int | None = None, in_chans: int | None = None) -> None:
        self.objective.ready(num_classes, in_chans)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        return self.objective.prepare(model, x, y, generator=generator)

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        output: ObjectiveOutput = self.objective(model, prepared)
        return output

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        self.objective.epoch_starts(epoch, max_epochs)

    @override
    def batch_ends(self, output: ObjectiveOutput, total: Total) -> None:
        self.objective.batch_ends(output, total)

    @override
    def step_ends(self, model: Model, total: Total) -> None:
        self.objective.step_ends(model, total)

    @override
    def epoch_ends(self, epoch: int, total: Total) -> None:
        self.objective.epoch_ends(epoch, total)

    @override
    def fit_ends(self) -> None:
        self.objective.fit_ends()

    @override
    def passes(self, inner: float) -> float:
        return self.objective.passes(inner)
