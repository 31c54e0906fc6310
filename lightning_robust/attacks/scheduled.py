# SPDX-License-Identifier: Apache-2.0
"""An attack whose strength changes while a model is trained with it."""

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.problem import Problem
from lightning_robust.schedules import Schedule

__all__ = ["ScheduledAttack"]


class ScheduledAttack(Attack):
    r"""An attack with its budget, or its number of steps, as a function of the epoch.

    .. math:: \epsilon(e), \qquad \alpha(e) = \alpha\, \epsilon(e) / \epsilon, \qquad T(e) = \mathrm{round}(s(e))

    A growing budget helps single-step training of large budgets through its first epochs (5 of 30 in N-FGSM on SVHN),
    and few steps at first save time. Training callbacks and objectives ask for the attack of each epoch; called
    directly, or in an evaluation, it is the full ``attack``.

    Cost: that of the attack of the epoch.

    Args:
        attack: the attack at full strength.
        eps: radius of the budget by epoch; the step size keeps its ratio to it. Constant when ``None``.
        steps: number of steps by epoch, rounded; the step size stays. Constant when ``None``.

    Raises:
        ValueError: there is no schedule, or, when an epoch starts, a schedule gives a negative value.

    Example:
        >>> from lightning_robust.schedules import Linear
        >>> attack = ScheduledAttack(PGD(eps=0.4, steps=10, step_size=0.1), eps=Linear(start=0.0, end=0.4, epochs=5))
        >>> attack.at(epoch=2, max_epochs=30)
        PGD(eps=0.2, step_size=0.05)
    """

    scales: ClassVar[bool] = True

    def __init__(self, attack: PGD, *, eps: Schedule | None = None, steps: Schedule | None = None) -> None:
        if eps is None and steps is None:
            raise ValueError("Expected a schedule of `eps` or of `steps`; without one give the attack itself.")
        super().__init__(
            eps=attack.eps,
            loss=attack.loss,
            mode=attack.mode,
            mean=attack.mean,
            std=attack.std,
            bounds=attack.bounds,
            seed=attack.seed,
        )
        self.attack = attack
        self.eps_schedule = eps
        self.steps_schedule = steps
        self._made: dict[tuple[tuple[str, Any], ...], PGD] = {}

    @override
    def at(self, epoch: int, max_epochs: int) -> Attack:
        changes: dict[str, Any] = {}
        if self.eps_schedule is not None:
            changes["eps"] = self.eps_schedule.at(epoch, max_epochs)
            ratio = self.attack.step_size / self.attack.eps if self.attack.eps else 0.0
            changes["step_size"] = ratio * changes["eps"]
        if self.steps_schedule is not None:
            changes["steps"] = round(self.steps_schedule.at(epoch, max_epochs))
        key = tuple(changes.items())
        if key not in self._made:
            # only the attack of the running epoch is kept
            self._made = {key: self.attack.replaced(**changes)}
        return self._made[key]

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attack(*args, **kwargs)

    @override
    def stages(self, num_classes: int) -> dict[str, Attack]:
        return self.attack.stages(num_classes)

    @override
    def __repr__(self) -> str:
        return f"ScheduledAttack({self.attack!r}, eps={self.eps_schedule!r}, steps={self.steps_schedule!r})"

    @override
    def adopt(self, problem: Problem) -> Problem:
        return self.attack.adopt(problem)

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        return self.attack.draw_start(x, draws, scale)

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        return self.attack.run(problem, x_adv)

    @property
    @override
    def run_passes(self) -> float:
        return self.attack.run_passes

    @property
    @override
    def passes(self) -> float:
        return self.attack.passes
