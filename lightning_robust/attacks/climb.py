# SPDX-License-Identifier: Apache-2.0
"""The loop of APGD: ascend, remember the best points, and go back to them where the rule of the steps says so."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.norms import per_sample
from lightning_robust.attacks.problem import Problem

__all__ = ["Outcome", "Steps", "choose", "climb"]


@dataclass
class Outcome:
    """Points, and what the model makes of them.

    Args:
        x_adv: points ``[B, ...]``.
        loss: their loss ``[B]``.
        fooled: whether they are adversarial ``[B]``.
    """

    x_adv: Tensor
    loss: Tensor
    fooled: Tensor

    def rows(self, rows: Tensor) -> "Outcome":
        """The points of some samples."""
        return Outcome(self.x_adv[rows], self.loss[rows], self.fooled[rows])

    def put(self, rows: Tensor, part: "Outcome") -> None:
        """Write the points of some samples."""
        self.x_adv[rows], self.loss[rows], self.fooled[rows] = part.x_adv, part.loss, part.fooled

    def or_better(self, other: "Outcome", *, by_loss: bool) -> "Outcome":
        """Per sample the adversarial point, and of two alike the one of larger loss.

        Args:
            other: points that must be better to be taken.
            by_loss: compare nothing but the loss.
        """
        better = other.loss > self.loss
        if not by_loss:
            better = (other.fooled & ~self.fooled) | ((other.fooled == self.fooled) & better)
        return Outcome(
            choose(better, other.x_adv, self.x_adv),
            torch.where(better, other.loss, self.loss),
            torch.where(better, other.fooled, self.fooled),
        )


class Steps(ABC):
    """How a run moves and when it returns to its best point: the state of the samples still attacked."""

    @abstractmethod
    def begin(self, x_adv: Tensor) -> Tensor:
        """The start, brought into the budget."""

    @abstractmethod
    def move(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        """The next iterate."""

    @abstractmethod
    def check(self, loss: Tensor, best: Outcome) -> Tensor | None:
        """Which samples go back to their best point, given the loss of the iterate; ``None`` between checkpoints.

        The first call is for the start.
        """

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Leave out all samples but ``rows``."""


def climb(
    problem: Problem, start: Tensor, steps: Steps, *, count: int, eot: int, early_stop: bool, best_loss: bool
) -> Outcome:
    """One run of APGD.

    Cost: ``count + 1`` forwards and ``count`` input-backwards, each ``eot`` times.

    Args:
        problem: images and loss.
        start: where to start.
        steps: how to move; used up.
        count: number of steps.
        eot: forwards over which gradients, losses and probabilities are averaged.
        early_stop: samples leave at their first adversarial point.
        best_loss: return the point of largest loss, also where another one is adversarial.
    """
    x_adv = steps.begin(start)
    now, gradient = _look(problem, x_adv, eot, with_gradient=count > 0)
    best, best_gradient, answer = now, gradient, now
    result = Outcome(x_adv.clone(), now.loss.clone(), now.fooled.clone())
    left = torch.arange(len(x_adv), device=x_adv.device)
    steps.check(now.loss, best)
    for step in range(count):
        if early_stop and bool(now.fooled.any()):
            result.put(left, now)
            rows = (~now.fooled).nonzero().squeeze(1)
            if not len(rows):
                return result
            left, problem, best = left[rows], problem.select(rows), best.rows(rows)
            x_adv, gradient, best_gradient = x_adv[rows], gradient[rows], best_gradient[rows]
            steps.keep(rows)
        x_adv = steps.move(x_adv, gradient)
        now, new_gradient = _look(problem, x_adv, eot, with_gradient=step + 1 < count)
        if not early_stop and not best_loss:
            answer = answer.or_better(now, by_loss=False)
        higher = now.loss > best.loss
        best = best.or_better(now, by_loss=True)
        back = steps.check(now.loss, best)
        if step + 1 < count:
            gradient, best_gradient = new_gradient, choose(higher, new_gradient, best_gradient)
            if back is not None:
                x_adv, gradient = choose(back, best.x_adv, x_adv), choose(back, best_gradient, gradient)
    if best_loss:
        return best
    result.put(left, best.or_better(now, by_loss=False) if early_stop else answer)
    return result


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per sample the one or the other image.

    Args:
        mask: ``[B]``.
        yes: images where it is true.
        no: images elsewhere.
    """
    return torch.where(per_sample(mask, yes), yes, no)


def _look(problem: Problem, x_adv: Tensor, eot: int, *, with_gradient: bool) -> tuple[Outcome, Tensor]:
    gradient: Tensor = x_adv.new_zeros(())
    loss, probability = x_adv.new_zeros(len(x_adv)), torch.zeros(())
    for _ in range(eot):
        if with_gradient:
            part, logits, losses = problem.gradient(x_adv)
            gradient = part if eot == 1 else gradient + part / eot
        else:
            logits = _logits_only(problem, x_adv)
            losses = problem.losses(logits, x_adv)
        loss = loss + losses / eot
        # what a randomised model predicts is what it predicts in the mean
        probability = logits if eot == 1 else probability + logits.softmax(1)
    return Outcome(x_adv, loss, problem.fooled(probability)), gradient


def _logits_only(problem: Problem, x_adv: Tensor) -> Tensor:
    with torch.no_grad():
        logits = problem.logits(x_adv)
    torch.clear_autocast_cache()  # what it holds now has no graph
    return logits
