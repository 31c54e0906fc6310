# SPDX-License-Identifier: Apache-2.0
"""One sharpness-aware training step, whoever runs its passes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lightning_robust.guards import RandomState
from lightning_robust.sharpness.backup import WeightBackup
from lightning_robust.sharpness.gradients import take_gradients, take_hidden_gradients
from lightning_robust.sharpness.method import Evaluation, SharpnessMethod, sharp_direction
from lightning_robust.sharpness.moves import PendingMoves
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.sharded import is_sharded, sharded_passes, take_sharded_gradients
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["SharpStep"]

LossOf = Callable[[Evaluation], Tensor]


class SharpStep(ABC):
    """The order of passes in a sharpness-aware step, and what each of them may leave behind.

    One pass is *counted*: it logs, moves BatchNorm statistics and leaves the random generators where a plain step would
    have left them. A subclass says how a pass is run and how gradients are taken.

    Args:
        method: the rule.
        weights: the weights of the step.
        backup: holds the copy of the weights between steps.
        replay: every pass sees the random numbers of the first.
        devices: accelerators whose generators count.
        module: holds the weights, where it is known.
        inputs: leaf tensors besides the weights, images say, whose ``.grad`` is set by passes that do not count.
        bystanders: trainable tensors that are not optimized; their gradients are those of the counted pass.
        ascent_apart: the ascent is led by another loss than the counted one, of a part of the batch for example.
    """

    def __init__(
        self,
        method: SharpnessMethod,
        weights: Weights,
        *,
        backup: WeightBackup,
        replay: bool,
        devices: Iterable[torch.device],
        module: nn.Module | None = None,
        inputs: Iterable[Tensor] = (),
        bystanders: list[Tensor] | None = None,
        ascent_apart: bool = False,
    ) -> None:
        self.method = method
        self.weights = weights
        self.module = module
        self.sharded = is_sharded(weights.tensors)
        self.bystanders = bystanders or []
        self.ascent_apart = ascent_apart
        self.clean_loss: Tensor | None = None
        self.moved_loss: Tensor | None = None
        self.counted_loss: Tensor | None = None
        self.inputs = list(inputs)
        self._backup = backup
        self._replay = replay
        self._devices = set(devices)
        self._before: RandomState | None = None
        self._after: RandomState | None = None
        self._passes = 0
        self._took_part: list[bool] = []
        self._bystanding: list[tuple[Tensor, Tensor]] = []

    @abstractmethod
    def evaluate(self, *, counted: bool, ascent: bool) -> Evaluation | None:
        """Run one pass at the present weights.

        Args:
            counted: whether its output is that of the step.
            ascent: whether it leads the ascent.

        Returns:
            The loss, or ``None`` if the step was skipped.
        """

    @abstractmethod
    def uncounted(self, *, restore_buffers: bool) -> AbstractContextManager[None]:
        """What surrounds a pass and its backward that must leave no trace in logs and metrics.

        Args:
            restore_buffers: nor in buffers.
        """

    @abstractmethod
    def gradients(self, loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
        """Take gradients; ``None`` for tensors that took no part.

        Args:
            loss: scalar with its graph.
            tensors: leaf tensors.
        """

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The base optimizer, where there is one."""

    @abstractmethod
    def clock(self) -> tuple[int, int]:
        """Optimizer steps taken so far, and how many the run has (-1: unknown)."""

    @abstractmethod
    def average(self, tensors: list[Tensor]) -> None:
        """Mean over processes of each tensor, in place.

        Args:
            tensors: as many of the same shapes in every process.
        """

    @abstractmethod
    def moves(self) -> PendingMoves:
        """What takes moves that wait for the optimizer's step."""

    def ready_for_ascent(self, gradients: Gradients) -> Gradients:
        """The gradient that leads the ascent, repaired where it is not usable.

        Args:
            gradients: one per weight; may be changed in place.
        """
        return gradients

    def run(self) -> tuple[list[Tensor], Gradients] | None:
        """Run all passes; the weights are back when this returns or raises.

        Returns:
            The tensors that took part and the direction of each, or ``None`` if there was no loss to work on.

        Raises:
            ValueError: the loss depends on none of the weights.
        """
        if self.sharded and not self.method.sharded:
            raise ValueError(
                f"{type(self.method).__name__} cannot work on parameters in shards; use SAM, ASAM, GSAM or GAM, or "
                "train with DistributedDataParallel."
            )
        self._before = RandomState.capture(self._devices) if self._replay else None
        try:
            with sharded_passes(self.weights.tensors, self.module) if self.sharded else nullcontext():
                return self._run()
        finally:
            torch.clear_autocast_cache()
            if self._after is not None:
                self._after.restore()

    def take(self, loss: Tensor, tensors: list[Tensor], *, hidden: bool) -> list[Tensor | None]:
        """The gradients of a loss by the way that reaches them; ``None`` for tensors that took no part.

        Args:
            loss: scalar with its graph.
            tensors: leaf tensors.
            hidden: whether re-entrant activation checkpoints hide some.
        """
        if self.sharded and self.module is not None:
            return take_sharded_gradients(loss, tensors, self.module)
        if hidden:
            return take_hidden_gradients(loss, tensors, self.module.parameters() if self.module is not None else ())
        return take_gradients(loss, tensors)

    def _run(self) -> tuple[list[Tensor], Gradients] | None:
        late = self.ascent_apart or self.method.counted == "perturbed"
        gradients: Gradients = []
        if not late or self.method.needs_ascent:
            first = self._pass(counted=not late, ascent=late, loss_of=self.method.ascent_loss)
            if first is None:
                if late:
                    self._evaluate(counted=True, ascent=False)  # what a plain step would have run
                return None
            loss, gradients = first
            if not self.ascent_apart:
                self.clean_loss = loss
            gradients = self.ready_for_ascent(gradients)
        probe = Probe(
            self.weights,
            self._moved_gradient,
            ascent_here=self._ascent_gradient,
            backup=self._backup,
            optimizer=self.optimizer,
            step=self.clock,
            average=self.average,
            moves=self.moves if self.optimizer is not None else None,
        )
        try:
            direction = sharp_direction(self.method, self.weights, gradients, probe)
        except _SkippedError:
            return None
        return self._taking_part(direction)

    def _moved_gradient(self) -> Gradients:
        # without a counted pass so far, this is the one
        self.moved_loss, gradients = self._again(
            counted=self.counted_loss is None, ascent=False, loss_of=_training_loss
        )
        return gradients

    def _ascent_gradient(self) -> Gradients:
        gradients = self._again(counted=False, ascent=True, loss_of=self.method.ascent_loss)[1]
        return self.ready_for_ascent(gradients)

    def _again(self, *, counted: bool, ascent: bool, loss_of: LossOf) -> tuple[Tensor, Gradients]:
        first = not self._passes
        found = self._pass(counted=counted, ascent=ascent, loss_of=loss_of)
        if found is None:
            if first:
                raise _SkippedError
            raise RuntimeError(
                "training_step returned a loss at first and None when evaluated again on the same batch; a "
                "sharpness-aware step needs the loss of the same batch at other weights."
            )
        return found

    def _pass(self, *, counted: bool, ascent: bool, loss_of: LossOf) -> tuple[Tensor, Gradients] | None:
        """The training loss at the present weights, and the gradient of what ``loss_of`` makes of the pass."""
        moves_buffers = ascent and self.method.ascent_moves_buffers
        with nullcontext() if counted else self.uncounted(restore_buffers=not moves_buffers):
            evaluation = self._evaluate(counted=counted, ascent=ascent)
            if evaluation is None or not evaluation.loss.requires_grad:
                return None
            loss = evaluation.loss.detach()
            if counted:
                self.counted_loss = loss
            return loss, self._take(loss_of(evaluation), counted=counted)

    def _evaluate(self, *, counted: bool, ascent: bool) -> Evaluation | None:
        if self._passes:
            # autocast keeps low-precision copies of weights; they belong to the values before the move
            torch.clear_autocast_cache()
            if self._before is not None:
                self._before.restore()
        self._passes += 1
        evaluation = self.evaluate(counted=counted, ascent=ascent)
        if counted and self._replay:
            self._after = RandomState.capture(self._devices)
        return evaluation

    def _take(self, loss: Tensor, *, counted: bool) -> Gradients:
        tensors = self.weights.tensors
        further = self.bystanders if counted else self.inputs
        found = self.gradients(loss, [*tensors, *further])
        ours = found[: len(tensors)]
        if all(gradient is None for gradient in ours):
            raise ValueError(
                "The loss depends on none of the given parameters; pass the ones of the model it comes from."
            )
        if counted:
            self._took_part = [gradient is not None for gradient in ours]
            others = zip(self.bystanders, found[len(tensors) :], strict=True)
            self._bystanding = [(tensor, gradient) for tensor, gradient in others if gradient is not None]
        else:
            for tensor, gradient in zip(further, found[len(tensors) :], strict=True):
                tensor.grad = gradient
        return [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(tensors, ours, strict=True)
        ]

    def _taking_part(self, direction: Gradients) -> tuple[list[Tensor], Gradients]:
        # what took no part is left out, so that the optimizer and DDP treat it as in a plain step
        ours = zip(self.weights.tensors, direction, self._took_part, strict=True)
        pairs = [(tensor, each) for tensor, each, took_part in ours if took_part] + self._bystanding
        return [tensor for tensor, _ in pairs], [each for _, each in pairs]


class _SkippedError(Exception):
    """The only pass of a step had no loss; ends the method's work on it."""


def _training_loss(evaluation: Evaluation) -> Tensor:
    return evaluation.loss
