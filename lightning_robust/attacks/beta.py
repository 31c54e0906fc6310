# SPDX-License-Identifier: Apache-2.0
"""The best of targeted margin attacks on every wrong class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.climb import choose
from lightning_robust.attacks.conditions import AttackMode
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.losses import labels_of, towards_class
from lightning_robust.attacks.multi_targeted import likeliest_others
from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.attacks.pgd import NormName
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import region
from lightning_robust.checks import check_choice, check_integer, check_non_negative

__all__ = ["BETA"]


class BETA(Attack):
    r"""Best targeted attack: ascends the margin of every wrong class and takes the best end point.

    .. math:: j^* = \arg\max_{j \ne y} M_j(x + \delta_j), \qquad M_j = z_j - z_y, \qquad
        \delta_j \approx \arg\max_{\|\delta\| \le \epsilon} M_j(x + \delta)

    The attacker of adversarial training as a non-zero-sum game, whose defender minimises cross-entropy there. The
    margin of the largest class alone can follow a class that turns out to be the wrong one; this attack does not have
    to choose beforehand. Only end points count, as published; where samples may leave as soon as they are fooled, as
    in evaluations, ``MultiTargeted(PGD(loss="margin", early_stop=True))`` finds the same for less.

    Cost: one forward for the clean images and, per class, ``steps`` forwards and input-backwards and a forward.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: steps towards a class.
        step_size: length of a step in pixel units; ``eps / 4`` when ``None``.
        optimizer: ``"steepest"``, as in :class:`PGD`; ``"rmsprop"``: the gradient divided
            by the root of its mean square (decay 0.99).
        classes: how many wrong classes, those of largest clean logit; all when ``None``.
        random_start: start towards each class at a point drawn uniformly in the ball, not at the clean images.
        restarts: independent runs.
        mode: mode of the model while it is attacked: ``"eval"``, ``"train"`` or ``"train-frozen-stats"``.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or (when called) ``towards``.

    References:
        Robey et al., Adversarial Training Should Be Cast as a Non-Zero-Sum Game, arXiv 2306.11035. The paper leaves the
        optimiser open.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = BETA(eps=0.1, steps=5)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 10,
        step_size: float | None = None,
        optimizer: Literal["steepest", "rmsprop"] = "steepest",
        classes: int | None = None,
        random_start: bool = True,
        restarts: int = 1,
        mode: AttackMode = "eval",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps=eps,
            restarts=restarts,
            loss="margin",
            mode=mode,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        check_choice("norm", norm, tuple(NORMS))
        check_integer("steps", steps, 0)
        check_choice("optimizer", optimizer, ("steepest", "rmsprop"))
        if step_size is not None:
            check_non_negative("step_size", step_size)
        if classes is not None:
            check_integer("classes", classes, 1)
        if restarts > 1 and not random_start:
            raise ValueError("Without a random start all restarts are the same; set `random_start` or restarts=1.")
        self.norm, self.steps, self.optimizer, self.classes = norm, steps, optimizer, classes
        self.step_size = eps / 4 if step_size is None else step_size
        self.random_start = random_start

    @override
    def adopt(self, problem: Problem) -> Problem:
        if problem.towards is not None:
            raise ValueError("BETA steers to every wrong class itself; use PGD with `towards` for one class.")
        return replace(super().adopt(problem), reference=labels_of(problem.y), steered=towards_class)

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        if not self.random_start:
            return x.clone()
        return self.space.clip(x + self.space.from_pixels(NORMS[self.norm].uniform(x, self.eps, draws)))

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        with torch.no_grad():
            logits = problem.logits(problem.x)
        torch.clear_autocast_cache()  # what it holds now has no graph
        count = logits.shape[1] - 1 if self.classes is None else self.classes
        best, best_margin = x_adv, x_adv.new_full((len(x_adv),), -torch.inf)
        for number, wanted in enumerate(likeliest_others(logits, problem.y, count).T):
            part = replace(problem, towards=wanted)
            end = self._ascend(part, x_adv if number == 0 else self._start(problem))
            reached, _ = part.judge(end)
            best = choose(reached > best_margin, end, best)
            best_margin = torch.maximum(best_margin, reached)
        return best

    @property
    @override
    def run_passes(self) -> float:
        """Passes of one run; with ``classes=None`` those of a model of ten classes."""
        return (self.classes or 9) * (self.steps + 0.5) + 0.5

    def _ascend(self, problem: Problem, point: Tensor) -> Tensor:
        area = region(self.norm, problem.x, self.eps, self.space, problem.dtype)
        point = area.project(point)
        square, scale = torch.zeros_like(point), None
        for _ in range(self.steps):
            gradient, *_ = problem.gradient(point)
            gradient = self.space.pixel_gradient(gradient)
            if self.optimizer == "rmsprop":
                # a scale that all steps share changes nothing but keeps squares of small gradients from underflow
                scale = _inverse_size(gradient) if scale is None else scale
                square = 0.99 * square + 0.01 * (gradient * scale).square()
                direction = gradient * scale / (square.sqrt() + torch.finfo(square.dtype).tiny)
            else:
                direction = NORMS[self.norm].direction_on_images(point, gradient, self.space)
            point = area.project(point + self.space.from_pixels(self.step_size * direction))
        return point


def _inverse_size(gradient: Tensor) -> Tensor:
    size = gradient.abs().flatten(1).amax(1)
    inverse = torch.where(size > 0, 1 / size, 1.0)
    return per_sample(inverse.clamp(max=torch.finfo(size.dtype).max), gradient)
