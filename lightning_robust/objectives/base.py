# SPDX-License-Identifier: Apache-2.0
"""A whole training loss that owns its forward passes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.attacks import Attack
from lightning_robust.attacks.conditions import Model

__all__ = ["AttackedObjective", "Objective", "ObjectiveOutput", "Prepared", "Running", "Total"]

#: The sum of a tensor over all processes; the tensor itself in a plain loop.
Total = Callable[[Tensor], Tensor]


def _alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True)
class Running:
    """How the running batch stands in the training; the defaults fit a plain loop on one process.

    Args:
        counted: whether this evaluation counts; that of a sharpness-aware ascent, for one, does not.
        first: whether the batch is the first of those whose gradients one optimizer step accumulates.
        last: whether it is the last of them.
        step: optimizer steps done so far.
        max_steps: optimizer steps of the run; -1 if unknown.
        index: positions of the samples in the training set ``[B]``, for an objective that needs them.
        total: sum over processes; all of them have to call it equally often.
    """

    counted: bool = True
    first: bool = True
    last: bool = True
    step: int = 0
    max_steps: int = -1
    index: Tensor | None = None
    total: Total = _alone


@dataclass(frozen=True)
class Prepared:
    """What an objective computes once per batch, at the current weights, before any loss is evaluated.

    Args:
        x: clean images ``[B, ...]``.
        y: classes ``[B]`` or probabilities ``[B, C]``.
        x_adv: attacked images, if the objective attacks.
        extra: anything else that is fixed for the batch.
    """

    x: Tensor
    y: Tensor
    x_adv: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveOutput:
    """The value of an objective on one batch.

    Args:
        loss: the scalar to minimise.
        logits: logits ``[B, C]`` that the other terms of a training step and its metrics refer to.
        logs: detached scalars to log, by name.
        sample_losses: what each sample adds to the loss, ``[B]`` with graph, for methods that choose among samples;
            ``None`` where the loss is no mean over samples.
    """

    loss: Tensor
    logits: Tensor
    logs: dict[str, Tensor]
    sample_losses: Tensor | None = None


class Objective(nn.Module, ABC):
    """Takes the place of a module's own loss, and runs the model itself as often as it needs.

    :meth:`prepare` runs once per batch (an attack, say); :meth:`forward` may run several times on what it made, for
    example at the weights that a sharpness-aware method perturbs. State that has to survive a restart belongs in
    buffers.

    An objective that changes during training says so in :meth:`epoch_starts`, :meth:`batch_ends`, :meth:`step_ends` and
    :meth:`epoch_ends`, which do nothing by default, and reads off :attr:`running` where in the training it is.
    :class:`~lightning_robust.callbacks.ObjectiveTraining` calls and sets them; a plain loop calls those that the
    objective overrides, with ``total=lambda tensor: tensor`` on one process.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``, logits ``[B, C]``.
    """

    #: Whether :meth:`prepare` attacks the images; such an objective must get clean ones.
    attacks: bool = False

    def __init__(self) -> None:
        super().__init__()
        #: Where in the training the batch stands that is prepared or evaluated.
        self.running = Running()

    @property
    def recording(self) -> bool:
        """Whether an evaluation may change what the objective remembers: in training mode, in a pass that counts."""
        return self.training and self.running.counted

    @property
    def needs_index(self) -> bool:
        """Whether the positions of samples in the training set have to be known."""
        return False

    def ready(self, num_classes: int | None = None, in_chans: int | None = None) -> None:
        """Read files and refuse what cannot work, before a fit.

        Args:
            num_classes: classes of the model, if known.
            in_chans: channels of its inputs, if known.
        """

    @abstractmethod
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        """Compute what stays fixed for this batch.

        Args:
            model: maps images to logits.
            x: clean images.
            y: targets.
            generator: source of randomness on the device of ``x``.
        """

    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        """Before the first batch of an epoch, also when training continues in its middle.

        Args:
            epoch: epoch, counted from 0.
            max_epochs: epochs of the run; -1 if unknown.
        """

    def batch_ends(self, output: ObjectiveOutput, total: Total) -> None:
        """Once after the loss of each batch, with its value at the weights that count; before the optimizer's step.

        Args:
            output: what :meth:`forward` returned.
            total: sum over processes; all of them have to call it equally often.
        """

    def step_ends(self, model: Model, total: Total) -> None:
        """After each step of the optimizer.

        Args:
            model: maps images to logits, at the new weights.
            total: sum over processes; all of them have to call it equally often.
        """

    def epoch_ends(self, epoch: int, total: Total) -> None:
        """After the last batch of an epoch.

        Args:
            epoch: epoch, counted from 0.
            total: sum over processes; all of them have to call it equally often.
        """

    def fit_ends(self) -> None:
        """Let go of the model, after a fit and after an exception in one."""

    def passes(self, inner: float) -> float:
        """Forward+backward passes of the model in a training step with this objective; teachers are not counted.

        Args:
            inner: how often the loss is evaluated; 1 in a plain step.
        """
        return inner

    @abstractmethod
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        """Evaluate the loss at the model's present weights.

        Args:
            model: maps images to logits, in the mode and precision of the training step.
            prepared: what :meth:`prepare` made of the batch.
        """


class AttackedObjective(Objective):
    """An objective that looks at clean images beside attacked ones, which are made once per batch.

    Args:
        attack: finds the attacked images.
    """

    attacks: bool = True

    def __init__(self, attack: Attack) -> None:
        super().__init__()
        self.attack = attack
        #: The attack of the running epoch; another one than :attr:`attack` if that is scheduled.
        self.current_attack = attack

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        self.current_attack = self.attack.at(epoch, max_epochs)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        return Prepared(x, y, self.current_attack(model, x, y, generator=generator))

    def clean_and_attacked(self, model: Model, prepared: Prepared, *, joint: bool) -> tuple[Tensor, Tensor]:
        """Logits of the clean and of the attacked images.

        Args:
            model: maps images to logits.
            prepared: what :meth:`prepare` made of the batch.
            joint: run both in one batch, which matters for BatchNorm; otherwise clean, then attacked.
        """
        assert prepared.x_adv is not None, "made by prepare"
        if not joint:
            return model(prepared.x), model(prepared.x_adv)
        clean, adv = model(torch.cat([prepared.x, prepared.x_adv])).chunk(2)
        return clean, adv
