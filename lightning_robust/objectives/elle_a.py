# SPDX-License-Identifier: Apache-2.0
"""ELLE-A: ELLE whose weight rises when the loss stops being linear."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_in_range, check_non_negative
from lightning_robust.objectives.base import ObjectiveOutput, Prepared, Total
from lightning_robust.objectives.elle import LocalLinearity

__all__ = ["ELLEA"]


class ELLEA(LocalLinearity):
    r"""ELLE-A: ELLE whose weight jumps up when the linearity error does, and fades otherwise.

    .. math:: \lambda \leftarrow \begin{cases} \lambda_{\max} & E_t > \mu_{t-1} + s\, \sigma_{t-1} \\
              \gamma\, \lambda & \text{otherwise} \end{cases}

    after each batch, with :math:`\mu, \sigma` the mean and the (population) standard deviation of all earlier errors,
    of which there have to be three; :math:`\lambda` begins at 0. The penalty is only paid for where catastrophic
    overfitting shows.

    With several processes the errors are averaged over the samples of all, so every process has the same weight.
    Weight and statistics are buffers: checkpoints hold them. A batch whose error is not finite changes nothing. With
    accumulated gradients each batch counts.

    Cost: that of :class:`~lightning_robust.objectives.ELLE`, also while the weight is 0.

    Args:
        attack: as in :class:`~lightning_robust.objectives.ELLE`.
        max_weight: the weight after a jump; 4000 for every eps.
        decay: factor :math:`\gamma` of each other batch.
        sensitivity: number :math:`s` of standard deviations that count as a jump.
        clamp: as in :class:`~lightning_robust.objectives.ELLE`.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or an attack in another norm than linf.

    References:
        As :class:`~lightning_robust.objectives.ELLE`. Their code keeps all errors and goes over them in every step;
        here mean and variance are updated (Welford).

    Example:
        >>> objective = ELLEA()
        >>> sorted(name for name, _ in objective.named_buffers())
        ['count', 'mean', 'squares', 'weight']
    """

    weight: Tensor
    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        max_weight: float = 4000.0,
        decay: float = 0.99,
        sensitivity: float = 2.0,
        clamp: bool = False,
    ) -> None:
        super().__init__(attack=attack, clamp=clamp)
        check_non_negative("max_weight", max_weight)
        check_in_range("decay", decay, 0.0, 1.0)
        check_non_negative("sensitivity", sensitivity)
        self.max_weight = max_weight
        self.decay = decay
        self.sensitivity = sensitivity
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("squares", torch.zeros(()))  # sum of the squared distances from the mean

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        output = super().forward(model, prepared)
        return ObjectiveOutput(output.loss, output.logits, {**output.logs, "weight": self.weight}, output.sample_losses)

    @override
    def batch_ends(self, output: ObjectiveOutput, total: Total) -> None:
        error = output.logs["linearity"]
        samples = torch.full_like(error, len(output.logits))
        summed = total(torch.stack([error * samples, samples]))
        self.observe(summed[0] / summed[1])

    @torch.no_grad()
    def observe(self, error: Tensor) -> None:
        """Adapt the weight to the linearity error of a batch.

        Args:
            error: scalar, the same in every process.
        """
        error = error.to(self.mean)
        deviation = (self.squares / self.count.clamp(min=1)).clamp(min=0).sqrt()
        jumped = (self.count > 2) & (error > self.mean + self.sensitivity * deviation)
        weight = torch.where(jumped, self.max_weight, self.decay * self.weight)
        count = self.count + 1
        mean = self.mean + (error - self.mean) / count
        squares = self.squares + (error - self.mean) * (error - mean)
        finite = error.isfinite()
        # new tensors: the graph of the batch and the logger may still hold the old ones
        self.weight = torch.where(finite, weight, self.weight)
        self.mean = torch.where(finite, mean, self.mean)
        self.squares = torch.where(finite, squares, self.squares)
        self.count = torch.where(finite, count, self.count)

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, max_weight={self.max_weight}, decay={self.decay}, "
            f"sensitivity={self.sensitivity}, clamp={self.clamp}"
        )
