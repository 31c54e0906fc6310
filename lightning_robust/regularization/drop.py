# SPDX-License-Identifier: Apache-2.0
"""Drop rates that change during a run: early and late dropout."""

from typing import Literal

from lightning_robust.checks import check_choice, check_in_range, check_integer

__all__ = ["drop_rate_at", "drop_schedule"]


def drop_rate_at(
    step: int,
    *,
    rate: float,
    cutoff_steps: int,
    mode: Literal["standard", "early", "late"] = "early",
    kind: Literal["linear", "constant"] = "linear",
) -> float:
    """Drop rate in one optimizer step of a run that drops early or late.

    Args:
        step: Step, counted from 0.
        rate: Rate where the schedule drops; a linear one begins with it.
        cutoff_steps: Number of steps until an early schedule ends or a late one begins.
        mode: ``"early"``: drops before the cut-off; ``"late"``: drops from it on; ``"standard"``: drops always.
        kind: ``"linear"``: an early schedule falls from ``rate`` in step 0 to 0 in the last step before the cut-off;
            ``"constant"``: it keeps the rate until then. Late and standard schedules are constant.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Liu et al., Dropout Reduces Underfitting, arXiv 2303.01500.

    Example:
        >>> from lightning_robust.regularization import drop_rate_at
        >>> [drop_rate_at(step, rate=0.5, cutoff_steps=3) for step in range(5)]
        [0.5, 0.25, 0.0, 0.0, 0.0]
    """
    check_integer("step", step, 0)
    check_in_range("rate", rate, 0.0, 1.0)
    check_integer("cutoff_steps", cutoff_steps, 0)
    check_choice("mode", mode, ("standard", "early", "late"))
    check_choice("kind", kind, ("linear", "constant"))
    if mode == "standard":
        return rate
    if mode == "late":
        return rate if step >= cutoff_steps else 0.0
    if step >= cutoff_steps:
        return 0.0
    if kind == "constant" or cutoff_steps == 1:  # one step has no second point: it stays at its start
        return rate
    return rate * (cutoff_steps - 1 - step) / (cutoff_steps - 1)


def drop_schedule(
    rate: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    cutoff_epochs: int = 50,
    mode: Literal["standard", "early", "late"] = "early",
    kind: Literal["linear", "constant"] = "linear",
) -> list[float]:
    """Drop rates of all optimizer steps of a run that drops early or late, for a plain training loop.

    Args:
        rate: Rate where the schedule drops; a linear one begins with it.
        epochs: Epochs of the run.
        steps_per_epoch: Optimizer steps of an epoch.
        cutoff_epochs: Number of epochs until an early schedule ends or a late one begins.
        mode: See :func:`drop_rate_at`.
        kind: See :func:`drop_rate_at`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_robust.regularization import drop_schedule
        >>> drop_schedule(0.4, epochs=3, steps_per_epoch=2, cutoff_epochs=2, mode="late")
        [0.0, 0.0, 0.0, 0.0, 0.4, 0.4]
    """
    check_integer("epochs", epochs, 1)
    check_integer("steps_per_epoch", steps_per_epoch, 1)
    check_integer("cutoff_epochs", cutoff_epochs, 0)
    if cutoff_epochs > epochs:
        raise ValueError(f"Expected `cutoff_epochs` to be at most `epochs` ({epochs}) but got {cutoff_epochs}.")
    cutoff = cutoff_epochs * steps_per_epoch
    steps = range(epochs * steps_per_epoch)
    return [drop_rate_at(step, rate=rate, cutoff_steps=cutoff, mode=mode, kind=kind) for step in steps]
