# SPDX-License-Identifier: Apache-2.0
"""Attacks in two rounds of two stages: one term of a margin alone, then the margin."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack, AttackLoss
from lightning_robust.attacks.climb import Outcome
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.losses import margin_terms
from lightning_robust.attacks.norms import NORMS
from lightning_robust.attacks.pgd import NormName
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import region
from lightning_robust.checks import check_choice, check_integer

__all__ = ["TwoStage", "two_stage_step"]


def two_stage_step(step: int, steps: int, first_stage: int, eps: float) -> float:
    r"""Length of a step: :math:`\epsilon\,(1 + \cos(\pi\, j / (N - K)))`, from ``2 * eps`` down in each stage.

    Args:
        step: number ``i`` of the step, from 0; :math:`j` is ``i - 1``, in the second stage ``i - K - 1``.
        steps: number ``N`` of steps.
        first_stage: number ``K`` of steps of the first stage.
        eps: budget.

    Example:
        >>> [round(two_stage_step(step, 50, 20, 1.0), 2) for step in (1, 20, 21, 49)]
        [2.0, 0.59, 2.0, 0.02]
    """
    within = step - first_stage if step > first_stage else step
    progress = min((within - 1) / max(steps - first_stage, 1), 1.0)
    return eps * (1 + math.cos(math.pi * progress))


class TwoStage(Attack):
    """Two rounds from starts of their own, each of a stage with one term of a margin and a stage with the margin.

    The first round lowers the value of the true class, the second raises that of the largest other class; the very
    first step of both raises the value of the true class, to explore. A subclass says in :meth:`values` of what the
    margin is.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: steps of a round.
        first_stage: steps with one term; a part of ``steps`` when ``None``.
        restarts: independent runs of two rounds.
        loss: what tells how good a point is.
        targeted: ``y`` is the class to reach.
        mean: mean per channel, if the images are normalised.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.
    """

    #: The part of the steps that the first stage takes.
    first_part: ClassVar[float] = 0.5

    def __init__(
        self,
        *,
        eps: float,
        norm: NormName,
        steps: int,
        first_stage: int | None,
        restarts: int,
        loss: AttackLoss,
        targeted: bool,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        bounds: tuple[float, float],
        seed: int,
    ) -> None:
        check_choice("norm", norm, tuple(NORMS))
        check_integer("steps", steps, 0)
        if first_stage is not None:
            check_integer("first_stage", first_stage, 0)
            if first_stage > steps:
                raise ValueError(f"Expected `first_stage` to be at most steps={steps} but got {first_stage}.")
        super().__init__(
            eps=eps,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            early_stop=True,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        self.norm, self.steps, self.first_stage = norm, steps, first_stage
        self._first_stage = int(steps * self.first_part) if first_stage is None else first_stage

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """What the margin is a difference of: the logits, or a function of them.

        Args:
            logits: ``[B, C]``.
            target: true classes ``[B]``.
        """
        return logits

    def second_stage(self, problem: Problem) -> Problem:
        """The problem of the second stage.

        Args:
            problem: the problem of the attack's loss.
        """
        return problem

    def weighted(self, problem: Problem, own: float, other: float) -> Problem:
        """The problem of maximising a weighted sum of the terms of the margin.

        Args:
            problem: images and targets.
            own: weight of the true class.
            other: weight of the class to compare with.
        """

        def loss(logits: Tensor, target: Tensor, wanted: Tensor | None = None) -> Tensor:
            terms = margin_terms(self.values(logits, target), target, wanted)
            return own * terms[0] + other * terms[1]

        return replace(problem, loss=loss, steered=loss)

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        return self.space.clip(x + self.space.from_pixels(NORMS[self.norm].uniform(x, self.eps, draws)))

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        best = Outcome(problem.x.clone(), *problem.judge(problem.x))
        for number in range(2):
            left = (~best.fooled).nonzero().squeeze(1)
            if len(left) == 0:
                break
            part = problem.select(left)
            self._round(part, number, x_adv[left] if number == 0 else self._start(part), left, best)
        return best.x_adv

    @property
    @override
    def run_passes(self) -> float:
        return 2 * self.steps + 1.5

    def _round(self, problem: Problem, number: int, point: Tensor, left: Tensor, best: Outcome) -> None:
        area = region(self.norm, problem.x, self.eps, self.space, problem.dtype)
        point = area.project(point)
        for step in range(self.steps):
            gradient, logits, _ = self._stage(problem, number, step).gradient(point)
            seen = Outcome(point, problem.losses(logits, point), problem.fooled(logits))
            best.put(left, best.rows(left).or_better(seen, by_loss=False))
            if seen.fooled.any():
                kept = (~seen.fooled).nonzero().squeeze(1)
                left, problem, point, gradient = left[kept], problem.select(kept), point[kept], gradient[kept]
                area.keep(kept)
                if len(left) == 0:
                    return
            direction = NORMS[self.norm].direction_on_images(point, self.space.pixel_gradient(gradient), self.space)
            size = two_stage_step(step, self.steps, self._first_stage, self.eps)
            point = area.project(point + self.space.from_pixels(size * direction))
        best.put(left, best.rows(left).or_better(Outcome(point, *problem.judge(point)), by_loss=False))

    def _stage(self, problem: Problem, number: int, step: int) -> Problem:
        if step >= max(self._first_stage, 1):
            return self.second_stage(problem)
        if step == 0:
            return self.weighted(problem, 1, 0)
        return self.weighted(problem, -1, 0) if number == 0 else self.weighted(problem, 0, 1)
