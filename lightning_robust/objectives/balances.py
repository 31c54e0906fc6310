# SPDX-License-Identifier: Apache-2.0
"""Balances between several losses and several teachers: numbers that move a little in each optimizer step."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer, check_non_negative, check_positive
from lightning_robust.objectives.balance_rules import Comparison, balanced_temperatures, balanced_weights

__all__ = ["LossBalance", "TemperatureBalance"]


class _Balance(nn.Module):
    """Buffers that keep their precision when the module around them changes its own."""

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Steps of a thousandth vanish in half precision, so only the move to another device is followed.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(torch.empty(0, device=buffer.device)).device
                single = device.type == "mps" and buffer.is_floating_point()  # which has no float64
                self._buffers[name] = buffer.to(device, torch.float32 if single else buffer.dtype)
        return self


class LossBalance(_Balance):
    r"""Weights of several losses that keep them falling at the same relative pace (Normalization Loss Balance).

    .. math:: w_i \leftarrow w_i - r \Big(w_i - \frac{l_i}{\sum_j l_j}\Big), \qquad
              l_i = \Big(\frac{L_i}{L_i(0)}\Big)^{\beta}

    :meth:`update` is called once per optimizer step; what comes first is :math:`L(0)`, which a checkpoint keeps. A step
    with a loss that is not finite changes nothing. All state is on the device, and nothing waits for it.

    Cost: a few operations on ``num_losses`` numbers.

    Args:
        num_losses: number of losses.
        exponent: :math:`\beta`.
        init_steps: steps over which :math:`L(0)` is averaged; the published code takes the first alone. Until then
            it is the average so far.
        initial_weights: weights at the start, which sum to 1; all equal when ``None``.

    Raises:
        ValueError: a number out of range, or weights that are negative or do not sum to 1.

    References:
        Zhao et al., arXiv:2306.16170, and ECCV 2022, doi:10.1007/978-3-031-19772-7_34, for two losses. Their weights
        are floats of the host, and they do not say what follows when a loss begins at 0.

    Example:
        >>> balance = LossBalance(2)
        >>> for losses in ([4.0, 2.0], [2.0, 2.0]):
        ...     weights = balance.update(torch.tensor(losses), rate=0.1)
        >>> [round(weight, 4) for weight in weights.tolist()]
        [0.4833, 0.5167]
    """

    weights: Tensor
    initial: Tensor
    steps: Tensor

    def __init__(
        self,
        num_losses: int = 2,
        *,
        exponent: float = 1.0,
        init_steps: int = 1,
        initial_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_losses", num_losses, 2)
        check_non_negative("exponent", exponent)
        check_integer("init_steps", init_steps, 1)
        start = [1 / num_losses] * num_losses if initial_weights is None else list(initial_weights)
        if len(start) != num_losses or min(start) < 0 or abs(sum(start) - 1) > 1e-6:
            raise ValueError(
                f"Expected `initial_weights` to be {num_losses} numbers >= 0 that sum to 1 but got {start}."
            )
        self.num_losses, self.exponent, self.init_steps = num_losses, exponent, init_steps
        self.register_buffer("weights", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("initial", torch.zeros(num_losses, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def proposed(self, losses: Tensor, rate: float) -> Tensor:
        """Weights ``[N]`` that :meth:`update` would give; nothing changes.

        Args:
            losses: the present losses, ``[N]``, over all processes.
            rate: how fast the weights move.
        """
        return self._moved(self._checked(losses), rate)[0]

    def update(self, losses: Tensor, rate: float) -> Tensor:
        """Move the weights by one step.

        Args:
            losses: the present losses, ``[N]``, over all processes.
            rate: how fast the weights move.

        Returns:
            The new weights, ``[N]``.
        """
        losses = self._checked(losses)
        weights, initial = self._moved(losses, rate)
        self.weights.copy_(weights)
        self.initial.copy_(initial)
        self.steps += losses.isfinite().all()
        return self.weights.clone()

    def _checked(self, losses: Tensor) -> Tensor:
        if losses.shape != self.weights.shape:
            raise ValueError(f"Expected {self.num_losses} losses (`num_losses`) but got {tuple(losses.shape)}.")
        return losses.detach().to(self.weights)

    def _moved(self, losses: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        mean = self.initial + (losses - self.initial) / (self.steps + 1)
        initial = torch.where(self.steps < self.init_steps, mean, self.initial)
        weights = balanced_weights(self.weights, losses, initial, rate, exponent=self.exponent)
        usable = losses.isfinite().all()
        return torch.where(usable, weights, self.weights), torch.where(usable, initial, self.initial)

    @override
    def extra_repr(self) -> str:
        return f"num_losses={self.num_losses}, exponent={self.exponent}, init_steps={self.init_steps}"


class TemperatureBalance(_Balance):
    r"""Temperatures of several teachers that bring their predictions to the same entropy (Entropy-Based Balance).

    .. math:: \tau_i \leftarrow \mathrm{clip}\Big(\tau_i - r\, \mathrm{sign}\big(H_i - \bar H_{\ne i}\big),\,
              \tau_{\min}, \tau_{\max}\Big)

    :meth:`update` is called once per optimizer step, with the entropies at the present temperatures; the new ones are
    for the next step. There is no dead zone: in equilibrium the temperatures jitter by :math:`r`. A step with an
    entropy that is not finite changes nothing. All state is on the device, and nothing waits for it.

    Cost: a few operations on ``num_teachers`` numbers.

    Args:
        num_teachers: number of teachers.
        limits: smallest and largest temperature.
        initial_temperatures: temperatures at the start; 1 when ``None``. Outside ``limits`` they are in use until the
            first update.
        comparison: see :func:`balanced_temperatures`.

    Raises:
        ValueError: a number out of range, or an unknown value of ``comparison``.

    References:
        Zhao et al., arXiv:2306.16170, for two teachers; with more, each is compared with the mean of the others. Their
        code compares the ratio of sums with a constant in the logarithm to 1 (``comparison="ratio"`` and
        ``entropies(logits, eps=1e-5)``), which heats both teachers once one of them is so certain that its sum changes
        sign.

    Example:
        >>> balance = TemperatureBalance(2)
        >>> for _ in range(3):
        ...     temperatures = balance.update(torch.tensor([0.1, 0.8]), rate=0.5)
        >>> temperatures.tolist()
        [2.5, 1.0]
    """

    temperatures: Tensor

    def __init__(
        self,
        num_teachers: int = 2,
        *,
        limits: tuple[float, float] = (1.0, 10.0),
        initial_temperatures: Sequence[float] | None = None,
        comparison: Comparison = "difference",
    ) -> None:
        super().__init__()
        check_integer("num_teachers", num_teachers, 2)
        check_choice("comparison", comparison, ("difference", "ratio"))
        low, high = limits
        check_positive("limits", low)
        if high < low:
            raise ValueError(f"Expected `limits` to be (smallest, largest) temperature but got {limits}.")
        start = [1.0] * num_teachers if initial_temperatures is None else list(initial_temperatures)
        if len(start) != num_teachers:
            raise ValueError(f"Expected `initial_temperatures` to be {num_teachers} numbers but got {start}.")
        for temperature in start:
            check_positive("initial_temperatures", temperature)
        self.num_teachers, self.limits, self.comparison = num_teachers, (low, high), comparison
        self.register_buffer("temperatures", torch.tensor(start, dtype=torch.float64))

    def update(self, entropy: Tensor, rate: float) -> Tensor:
        """Move the temperatures by one step.

        Args:
            entropy: mean entropy of the predictions of each teacher, at the present temperatures, ``[N]``, over all
                processes.
            rate: the step.

        Returns:
            The new temperatures, ``[N]``.
        """
        if entropy.shape != self.temperatures.shape:
            raise ValueError(f"Expected {self.num_teachers} entropies (`num_teachers`) but got {tuple(entropy.shape)}.")
        entropy = entropy.detach().to(self.temperatures)
        moved = balanced_temperatures(self.temperatures, entropy, rate, self.limits, comparison=self.comparison)
        self.temperatures.copy_(torch.where(moved.isfinite().all(), moved, self.temperatures))
        return self.temperatures.clone()

    @override
    def extra_repr(self) -> str:
        return f"num_teachers={self.num_teachers}, limits={self.limits}, comparison={self.comparison!r}"
