# SPDX-License-Identifier: Apache-2.0
"""Objectives that only change what the labels of a batch are, and leave the loss to another objective."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.checks import check_choice
from lightning_robust.objectives.around import AroundObjective
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared

__all__ = ["SameClasses", "SoftTargets"]


class SoftTargets(AroundObjective):
    r"""Replaces the labels of each batch by class probabilities; the loss and the attack are those of an objective.

    .. math:: L\big(f; x, y'\big), \qquad y' = y'(x, y) \in [0, 1]^{B \times C}

    Subclasses say what :math:`y'` is in :meth:`targets`, which runs once per batch. Any objective that takes
    probabilities can be inside: :class:`AdversarialCrossEntropy`, :class:`TRADES`, :class:`MART`.

    Cost: that of the objective, and of :meth:`targets`.

    Args:
        objective: the loss, which sees :math:`y'` in place of the labels.
        attack_with: ``"targets"``: the attack of the objective gets :math:`y'` too; ``"labels"``: it keeps the labels,
            for objectives whose preparation uses them for nothing but the attack.

    Raises:
        TypeError: ``objective`` is none.
        ValueError: an unknown value of ``attack_with``; when training, targets of other classes than the model's.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.objectives import AdversarialCrossEntropy, SoftTargets
        >>> class Uniform(SoftTargets):
        ...     def targets(self, model, x, y):
        ...         return torch.full((len(y), 3), 1 / 3)
        >>> objective = Uniform(objective=AdversarialCrossEntropy(attack=PGD(eps=0.1, steps=2)))
        >>> objective.prepare(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).y.shape
        torch.Size([2, 3])
    """

    def __init__(self, *, objective: Objective, attack_with: Literal["targets", "labels"] = "targets") -> None:
        super().__init__(objective)
        check_choice("attack_with", attack_with, ("targets", "labels"))
        self.attack_with = attack_with

    @abstractmethod
    def targets(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Class probabilities ``[B, C]`` that take the place of the labels; no gradients flow through them.

        Args:
            model: maps images to logits.
            x: clean images.
            y: classes ``[B]`` or probabilities ``[B, C]``.
        """

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        targets = self.targets(model, x, y).detach()
        model = SameClasses(model, targets, f"targets of {type(self).__name__} have")
        if self.attack_with == "targets":
            return self.objective.prepare(model, x, targets, generator=generator)
        return replace(self.objective.prepare(model, x, y, generator=generator), y=targets)

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        return super().forward(SameClasses(model, prepared.y, f"targets of {type(self).__name__} have"), prepared)


class SameClasses:
    """A model that refuses answers of other classes than its logits have, before a loss or an attack stumbles.

    Args:
        model: maps images to logits.
        answers: ``[B, C]``, of a teacher say.
        whose: what the message calls them, as ``"teacher of LTD has"``.

    Raises:
        ValueError: when called, if the numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives.targets import SameClasses
        >>> model = SameClasses(torch.nn.Linear(4, 3), torch.zeros(2, 3), "teacher has")
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: Model, answers: Tensor, whose: str) -> None:
        self._model = model
        self.module = unwrap(model)[1]
        self._classes = answers.shape[1:]
        self._whose = whose

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        logits = self._model(x)
        if logits.shape[1:] != self._classes:
            raise ValueError(
                f"The {self._whose} {self._classes[0]} classes but the model has {logits.shape[1]}; take a teacher for "
                "the model's classes, or map them with TeacherSource(classes=...)."
            )
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
