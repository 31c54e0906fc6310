# SPDX-License-Identifier: Apache-2.0
"""What a sharpness-aware method may ask of the training step it works in."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.sharpness.backup import Scale, WeightBackup
from lightning_robust.sharpness.moves import PendingMoves
from lightning_robust.sharpness.radius import Radius, radius_at
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["GradientHere", "Probe"]

GradientHere = Callable[[], Gradients]


class Probe:
    """Evaluates gradients at chosen weights, and knows the step, the radii and the other processes.

    Offsets belong to the perturbed weights, ``weights.perturbed``, in their order; gradients come back for all weights.

    Args:
        weights: the weights of the step.
        gradient_here: gradient of the training loss at whatever values the weights have when it is called.
        ascent_here: the same for the loss that the method climbs; ``gradient_here`` when ``None``.
        backup: holds the copy of the weights; a new one when ``None``.
        optimizer: the base optimizer, where there is one.
        step: optimizer steps taken so far, and how many the run has (-1: unknown).
        average: mean over processes of a list of tensors, in place; nothing to do in a single process.
        moves: takes the moves that wait for the optimizer's step.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> probe = Probe(Weights.of([w]), lambda: list(torch.autograd.grad((w**2).sum(), [w])))
        >>> probe.backup.save([w])
        >>> probe.gradient_at([torch.ones(1)], 0.5)  # at 2.5
        [tensor([5.])]
        >>> probe.backup.restore()
    """

    def __init__(
        self,
        weights: Weights,
        gradient_here: GradientHere,
        *,
        ascent_here: GradientHere | None = None,
        backup: WeightBackup | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        step: Callable[[], tuple[int, int]] | None = None,
        average: Callable[[list[Tensor]], None] | None = None,
        moves: Callable[[], PendingMoves] | None = None,
    ) -> None:
        self.weights = weights
        self.optimizer = optimizer
        self.backup = backup if backup is not None else WeightBackup()
        self._gradient_here = gradient_here
        self._ascent_here = ascent_here if ascent_here is not None else gradient_here
        self._step = step if step is not None else _no_step
        self._average = average
        self._moves = moves

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._step()[0]

    def gradient_at(self, offsets: Gradients, scale: Scale = 1.0) -> Gradients:
        """Gradient of the training loss at the unperturbed weights plus ``scale * offsets``.

        Args:
            offsets: one tensor per perturbed weight; they stay as they are.
            scale: a number, a scalar tensor, or a scalar tensor per perturbed weight.
        """
        self.backup.move(offsets, scale)
        with torch.enable_grad():
            return self._gradient_here()

    def ascent_gradient_at(self, offsets: Gradients, scale: Scale = 1.0) -> Gradients:
        """The same for the loss that the method climbs.

        Args:
            offsets: one tensor per perturbed weight.
            scale: a number, a scalar tensor, or a scalar tensor per perturbed weight.
        """
        self.backup.move(offsets, scale)
        with torch.enable_grad():
            return self._ascent_here()

    def radii(self, radius: Radius, option: str = "rho") -> list[float]:
        """The radius of each perturbed weight: that of its optimizer group where it names one, else ``radius``.

        Args:
            radius: a number, a schedule, or a function of the learning rate.
            option: name of the group option.
        """
        moved = self.weights.perturbed
        groups = moved.groups or [{}] * len(moved)
        known: dict[int, float] = {}
        for own, group in zip(moved.options, groups, strict=True):
            if id(own) not in known:
                named = f"optimizer group option `{option}`" if option in own else f"radius `{option}`"
                known[id(own)] = radius_at(own.get(option, radius), named, group, self._step)
        return [known[id(own)] for own in moved.options]

    def average(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over processes of each tensor, in place.

        Args:
            tensors: as many of the same shapes in every process.
        """
        if self._average is not None:
            self._average(tensors)
        return tensors

    def move_after_step(self, offsets: Gradients) -> None:
        """Add ``offsets`` to the perturbed weights once the optimizer has stepped.

        They are averaged over processes and accumulated batches, as gradients are, and dropped with a step that a loss
        scaler skips.

        Args:
            offsets: one tensor per perturbed weight; they are handed over.
        """
        if self._moves is None:
            raise ValueError(
                "This method moves weights after the optimizer's step, so it needs the optimizer; give that instead of "
                "parameters."
            )
        self._moves().add(self.weights.perturbed.tensors, offsets)


def unknown_step(who: str = "This method") -> ValueError:
    """The refusal of a method that asks for a step that nobody told.

    Args:
        who: what it begins with.
    """
    return ValueError(
        f"{who} needs to know the step, for an interval or a schedule; pass step=... (and total_steps=...) to "
        "sharp_backward."
    )


def _no_step() -> tuple[int, int]:
    raise unknown_step()
