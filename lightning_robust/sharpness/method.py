# SPDX-License-Identifier: Apache-2.0
"""What every sharpness-aware method is: a function from gradients at some points to a descent direction."""

from collections.abc import Callable
from typing import ClassVar

import torch

from lightning_robust.sharpness.weights import Gradients, Scale, WeightBackup, Weights

__all__ = ["GradientAt", "SharpnessMethod", "sharp_direction"]

#: ``gradient_at(offsets, scale)``: the gradient at the unperturbed weights plus ``scale * offsets``.
GradientAt = Callable[[Gradients, Scale], Gradients]


class SharpnessMethod:
    """A rule that turns gradients at chosen weights into the direction for the base optimizer.

    A method is pure arithmetic. Passes, randomness, BatchNorm, precision and distribution are the caller's business:
    :class:`~lightning_robust.callbacks.SharpnessAware` inside Lightning, :func:`sharp_backward` in a plain loop.
    """

    #: Passes beyond the one at the unperturbed weights.
    extra_passes: ClassVar[int] = 1

    def direction(self, weights: Weights, gradients: Gradients, gradient_at: GradientAt) -> Gradients:
        """Return the descent direction, one tensor per weight; runs without gradient tracking.

        Args:
            weights: what is perturbed, at the unperturbed values until ``gradient_at`` is called.
            gradients: the gradient at the unperturbed weights; the method may overwrite it.
            gradient_at: ``gradient_at(offsets, scale)`` returns the gradient at the unperturbed weights plus
                ``scale * offsets``; ``scale`` is a number, a scalar tensor, or a scalar tensor per weight.
        """
        raise NotImplementedError


def sharp_direction(
    method: SharpnessMethod,
    weights: Weights,
    gradients: Gradients,
    gradient_here: Callable[[], Gradients],
    backup: WeightBackup,
) -> Gradients:
    """Evaluate ``method`` and put the weights back, bit for bit, whatever happens.

    Args:
        method: the rule.
        weights: the weights to perturb.
        gradients: the gradient at their present values; may be overwritten.
        gradient_here: returns the gradient at whatever values the weights have when it is called.
        backup: holds the copy of the weights between calls.
    """
    backup.save(weights.tensors)

    def gradient_at(offsets: Gradients, scale: Scale) -> Gradients:
        backup.move(offsets, scale)
        with torch.enable_grad():
            return gradient_here()

    try:
        with torch.no_grad():
            return method.direction(weights, gradients, gradient_at)
    finally:
        backup.restore()
