# SPDX-License-Identifier: Apache-2.0
"""Values that change during a run, as small value objects that a configuration can hold.

Penalties evaluate them once per epoch, the radii of sharpness-aware methods once per optimizer step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer

__all__ = ["Coefficient", "Constant", "Cosine", "Linear", "Piecewise", "Schedule", "as_schedule"]


class Schedule(ABC):
    """A number as a function of the epoch; it has no state, so nothing has to be saved or resumed.

    Where a value is read in every optimizer step (a radius), "epoch" means step.
    """

    @abstractmethod
    def at(self, epoch: int, max_epochs: int) -> float:
        """Return the value in ``epoch`` (counted from 0) of a run of ``max_epochs`` epochs (-1: unknown)."""

    def __eq__(self, other: object) -> bool:
        """Two schedules are equal when they are of one class and have the same arguments."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class Constant(Schedule):
    """The same value in every epoch.

    Args:
        value: The value.

    Example:
        >>> from lightning_robust.losses import Constant
        >>> Constant(value=0.1).at(epoch=7, max_epochs=-1)
        0.1
    """

    def __init__(self, *, value: float) -> None:
        _check_finite("value", value)
        self.value = value

    @override
    def at(self, epoch: int, max_epochs: int) -> float:
        check_integer("epoch", epoch, 0)
        return self.value


class _Ramp(Schedule):
    """From one value to another in a number of epochs.

    Args:
        start: Value in epoch 0.
        end: Value at the end.
        denominator: ``"T-1"`` to reach ``end`` in the last epoch, ``"T"`` to stop one step before it.
        epochs: Number of epochs ``T``; by default ``max_epochs`` of the run.
    """

    def __init__(
        self, *, start: float, end: float, denominator: Literal["T-1", "T"] = "T-1", epochs: int | None = None
    ) -> None:
        _check_finite("start", start)
        _check_finite("end", end)
        check_choice("denominator", denominator, ("T-1", "T"))
        if epochs is not None:
            check_integer("epochs", epochs, 1)
        self.start = start
        self.end = end
        self.denominator = denominator
        self.epochs = epochs

    def _progress(self, epoch: int, max_epochs: int) -> float:
        """How much of the way is done: from 0 to 1."""
        check_integer("epoch", epoch, 0)
        length = max_epochs if self.epochs is None else self.epochs
        if length < 1:
            raise ValueError(
                f"Expected `max_epochs` to be known for a {type(self).__name__.lower()} schedule but got "
                f"{max_epochs!r}; set `max_epochs` of the Trainer, or `epochs` of the schedule."
            )
        steps = length - 1 if self.denominator == "T-1" else length
        # "T-1" with one epoch has no second point: it stays at its start.
        return min(epoch / steps, 1.0) if steps else 0.0


class Linear(_Ramp):
    """A straight line from ``start`` to ``end``, one value per epoch; after its last epoch it stays there.

    ``value(t) = start + (end - start) * t / D`` with ``D = T - 1`` (``end`` is reached in the last epoch) or
    ``D = T`` (``end`` is approached but not reached), where ``T`` is ``epochs`` or, by default, the length of the run.

    The three published MaxSup schedules from 0.1 to 0.2 are ``denominator="T"`` (the paper's text and its ImageNet
    loss class), ``denominator="T-1"`` (its ResNet and long-tail code), and ``denominator="T-1", epochs=300``, which
    is the division by 299 in its DeiT code.

    Args:
        start: Value in epoch 0.
        end: Value at the end of the line.
        denominator: ``"T-1"`` to reach ``end`` in the last epoch, ``"T"`` to stop one step before it.
        epochs: Number of epochs ``T`` of the line; by default ``max_epochs`` of the run.

    Example:
        >>> from lightning_robust.losses import Linear
        >>> schedule = Linear(start=0.1, end=0.2)
        >>> [round(schedule.at(epoch, max_epochs=3), 3) for epoch in range(3)]
        [0.1, 0.15, 0.2]
    """

    @override
    def at(self, epoch: int, max_epochs: int) -> float:
        return self.start + (self.end - self.start) * self._progress(epoch, max_epochs)


class Cosine(_Ramp):
    """Half a wave of the cosine from ``start`` to ``end``; after its last epoch it stays there.

    ``value(t) = end + (start - end) * (1 + cos(pi t / D)) / 2`` with ``D`` as in :class:`Linear`.

    Args:
        start: Value in epoch 0.
        end: Value at the end.
        denominator: ``"T-1"`` to reach ``end`` in the last epoch, ``"T"`` to stop one step before it.
        epochs: Number of epochs ``T``; by default ``max_epochs`` of the run.

    Example:
        >>> from lightning_robust.losses import Cosine
        >>> schedule = Cosine(start=1.0, end=0.0)
        >>> [round(schedule.at(epoch, max_epochs=3), 3) for epoch in range(3)]
        [1.0, 0.5, 0.0]
    """

    @override
    def at(self, epoch: int, max_epochs: int) -> float:
        wave = (1 + math.cos(math.pi * self._progress(epoch, max_epochs))) / 2
        return self.end + (self.start - self.end) * wave


class Piecewise(Schedule):
    """Constant pieces: each value holds from its epoch on.

    Args:
        values: value by the epoch that it begins with; epoch 0 must be among them.

    Raises:
        ValueError: epoch 0 is missing, or a key is not an epoch.

    Example:
        >>> from lightning_robust.losses import Piecewise
        >>> schedule = Piecewise(values={0: 0.05, 5: 0.1, 160: 0.5})
        >>> [schedule.at(epoch, max_epochs=200) for epoch in (0, 4, 5, 199)]
        [0.05, 0.05, 0.1, 0.5]
    """

    def __init__(self, *, values: Mapping[int, float]) -> None:
        for epoch, value in values.items():
            check_integer("values", epoch, 0)
            _check_finite("values", value)
        if 0 not in values:
            raise ValueError(f"Expected `values` to begin with epoch 0 but got the epochs {sorted(values)}.")
        self.values = dict(sorted(values.items()))

    @override
    def at(self, epoch: int, max_epochs: int) -> float:
        check_integer("epoch", epoch, 0)
        return next(value for begin, value in reversed(self.values.items()) if begin <= epoch)


class Coefficient:
    """A number or a schedule that is told the epoch; it has no value before.

    Args:
        name: argument that a refusal names.
        value: the number or schedule.
        owner: what it is a coefficient of, for messages.
        callback: the callback that tells the epoch, for messages.

    Example:
        >>> ramp = Linear(start=0.0, end=1.0)
        >>> coefficient = Coefficient("alpha", ramp, owner="MaxSup", callback="LogitRegularization")
        >>> coefficient.set_progress(1, max_epochs=3)
        >>> coefficient.value
        0.5
    """

    def __init__(self, name: str, value: float | Schedule, *, owner: str, callback: str) -> None:
        self.schedule = as_schedule(name, value)
        self._owner = owner
        self._callback = callback
        self._value = self.schedule.value if isinstance(self.schedule, Constant) else None

    @property
    def value(self) -> float:
        """The value in the current epoch."""
        if self._value is None:
            raise RuntimeError(
                f"The coefficient of {self._owner} follows a schedule that was not told the epoch; call "
                f"`set_progress(epoch, max_epochs)` at the start of every epoch, as {self._callback} does."
            )
        return self._value

    def set_progress(self, epoch: int, max_epochs: int) -> None:
        """Tell the epoch.

        Args:
            epoch: counted from 0.
            max_epochs: number of epochs of the run; -1 if unknown.
        """
        self._value = self.schedule.at(epoch, max_epochs)


def as_schedule(name: str, value: float | Schedule) -> Schedule:
    """Return ``value`` as a schedule.

    Args:
        name: argument that a refusal names.
        value: a number or a schedule.
    """
    if isinstance(value, Schedule):
        return value
    _check_finite(name, value)
    return Constant(value=value)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"Expected `{name}` to be a finite number but got {value!r}.")
