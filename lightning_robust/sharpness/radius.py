# SPDX-License-Identifier: Apache-2.0
"""Radii: constant, scheduled, tied to the learning rate, or set per optimizer group."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.schedules import Schedule

__all__ = ["ProportionalToLR", "Radius", "ascent_scales", "check_radius", "radius_at"]


class ProportionalToLR:
    r"""A radius that follows the learning rate of the optimizer group.

    .. math:: \rho_t = \rho_{\min} + (\rho_{\max} - \rho_{\min})
              \frac{\eta_t - \eta_{\min}}{\eta_{\max} - \eta_{\min}}

    with the learning rate of the moment, so that nothing has to be saved: a resumed run has the radius of the
    uninterrupted one.

    Args:
        rho_max: radius at ``lr_max``.
        rho_min: radius at ``lr_min``.
        lr_max: highest learning rate of the schedule.
        lr_min: lowest learning rate of the schedule.

    Raises:
        ValueError: ``lr_max`` is not above ``lr_min``, or a radius is negative.

    References:
        Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065, and the
        ``ProportionScheduler`` of its code.

    Example:
        >>> from lightning_robust.sharpness import ProportionalToLR
        >>> ProportionalToLR(rho_max=0.04, rho_min=0.02, lr_max=0.1).at(0.05)
        0.03
    """

    def __init__(self, *, rho_max: float, rho_min: float = 0.0, lr_max: float, lr_min: float = 0.0) -> None:
        check_non_negative("rho_max", rho_max)
        check_non_negative("rho_min", rho_min)
        check_non_negative("lr_min", lr_min)
        if not lr_max > lr_min:
            raise ValueError(f"Expected `lr_max` to be above `lr_min` ({lr_min!r}) but got {lr_max!r}.")
        self.rho_max = rho_max
        self.rho_min = rho_min
        self.lr_max = lr_max
        self.lr_min = lr_min

    def at(self, lr: float) -> float:
        """The radius at a learning rate.

        Args:
            lr: the learning rate.
        """
        return self.rho_min + (self.rho_max - self.rho_min) * (lr - self.lr_min) / (self.lr_max - self.lr_min)

    def __repr__(self) -> str:
        return f"ProportionalToLR({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


#: A number, a schedule over the optimizer steps, or a function of the learning rate.
Radius = float | Schedule | ProportionalToLR


def check_radius(name: str, radius: Radius) -> None:
    """Raise ``ValueError`` unless ``radius`` is a schedule or a number above zero.

    Args:
        name: argument that a refusal names.
        radius: the value.
    """
    if not isinstance(radius, Schedule | ProportionalToLR):
        check_positive(name, radius)


def radius_at(radius: Radius, name: str, group: dict[str, Any], step: Callable[[], tuple[int, int]]) -> float:
    """The radius of one optimizer group at one step.

    Args:
        radius: the value; an option of the group has been put in already.
        name: what a refusal calls it.
        group: the optimizer group, with its learning rate.
        step: called for ``(step, total_steps)`` if a schedule needs them.

    Raises:
        ValueError: the radius is negative or not a number, or it follows a learning rate that is not known.
    """
    if isinstance(radius, ProportionalToLR):
        if "lr" not in group:
            raise ValueError(
                f"The {name} follows the learning rate, which is not known; give the optimizer instead of parameters."
            )
        radius = radius.at(float(group["lr"]))
    elif isinstance(radius, Schedule):
        radius = radius.at(*step())
    if isinstance(radius, bool) or not isinstance(radius, int | float) or not radius >= 0:
        raise ValueError(f"Expected the {name} to be a number >= 0 but got {radius!r}.")
    return radius


def ascent_scales(radii: list[float], norm: Tensor, norm_eps: float) -> Tensor | list[Tensor]:
    """The factor ``radius / (norm + norm_eps)`` of each weight; one number where all radii are equal.

    Args:
        radii: one radius per weight.
        norm: norm of the ascent direction.
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.
    """
    unit = 1.0 / (norm + norm_eps)
    if all(radius == radii[0] for radius in radii):
        return unit * radii[0]
    return [unit * radius for radius in radii]
