# SPDX-License-Identifier: Apache-2.0
"""The fast adaptive boundary attack: the closest point at which a model errs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.boundary import boundary_step, nearest_boundary
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.losses import labels_of
from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.attacks.pgd import NormName
from lightning_robust.attacks.problem import Problem, check_batch
from lightning_robust.checks import check_choice, check_in_range, check_integer, check_positive
from lightning_robust.losses import full_precision

__all__ = ["FAB"]


class FAB(Attack):
    r"""Fast adaptive boundary attack: the perturbation of least norm that changes the prediction.

    Each step takes the boundary between the label and another class for a plane,

    .. math:: \{z : f_t(x_k) - f_y(x_k) + w^\top (z - x_k) = 0\}, \qquad w = \nabla_x (f_t - f_y)(x_k),

    projects the iterate and the clean image on it within the possible pixels (steps :math:`d_1` and :math:`d_2`), and
    goes a little beyond, drawn towards the clean image:

    .. math:: x_{k+1} = (1 - \alpha)(x_k + \eta\, d_1) + \alpha (x + \eta\, d_2), \qquad
        \alpha = \min\Bigl(\frac{\|d_1\|}{\|d_1\| + \|d_2\|},\, \alpha_{\max}\Bigr)

    After each adversarial point the search goes on from :math:`x + \beta (x_{k+1} - x)`. It has no step size, and
    neither the scale nor a shift of the logits changes what it does. Without ``towards``, :math:`t` is in each step the
    class whose plane is nearest; with it, this is FAB-T, the form that is used in AutoAttack and that stays affordable
    with many classes.

    What is returned: the first adversarial point within ``eps``, and the clean image of a sample for which none was
    found, also if one was found farther away. With ``minimum_norm`` the closest adversarial point found, at any
    distance, or the clean image. :meth:`closest` returns the distances with it.

    Cost: one forward, then per step 2 forwards and 1 input-backward with ``towards``, or 2 forwards and C - 1
    input-backwards without, for samples not yet fooled.

    Args:
        eps: radius of the ball in pixel units; decides about success and the starts of restarts, not about the path.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: number of steps of a run.
        eta: how far to go, as a multiple of the step to the plane; above 1 crosses it.
        alpha_max: largest weight of the clean image.
        beta: fraction of the perturbation that is kept after an adversarial point.
        restarts: independent runs for samples that are still not fooled; all but the first start at a random point at
            the distance ``eps / 2``.
        minimum_norm: search on for the closest adversarial point, and return it also if it is outside the budget.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range.

    References:
        Croce and Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, arXiv 1907.02044.
        Their code goes on with samples that are fooled within ``eps``, does not look whether the points that gradients
        are taken of are adversarial, and runs K backwards where K - 1 suffice.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = FAB(eps=0.1, steps=5)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 100,
        eta: float = 1.05,
        alpha_max: float = 0.1,
        beta: float = 0.9,
        restarts: int = 1,
        minimum_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        # the margin steered to a class is the difference of logits whose zero is the boundary
        super().__init__(eps=eps, restarts=restarts, loss="margin", mean=mean, std=std, bounds=bounds, seed=seed)
        check_choice("norm", norm, tuple(NORMS))
        check_integer("steps", steps, 0)
        check_positive("eta", eta)
        check_in_range("alpha_max", alpha_max, 0, 1)
        check_in_range("beta", beta, 0, 1)
        self.norm, self.steps, self.minimum_norm = norm, steps, minimum_norm
        self.eta, self.alpha_max, self.beta = eta, alpha_max, beta
        self._norm = NORMS[norm]

    def closest(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        indices: Tensor | None = None,
        towards: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The closest adversarial points and their distances, whatever ``eps``.

        Args:
            model: module or callable ``x -> logits``.
            x: clean images ``[B, ...]``.
            y: classes ``[B]``.
            generator: source of randomness for restarts; the attack's own when ``None``.
            indices: indices ``[B]`` of the samples in their dataset, in place of a generator.
            towards: classes ``[B]`` to steer to.

        Returns:
            Images shaped and typed like ``x``, and distances ``[B]`` in pixel units: 0 where the clean image is
            misclassified, infinity where no adversarial point was found (the image is then the clean one).
        """
        check_batch(x, y)
        if len(x) == 0:
            return x.detach().clone(), full_precision(x.detach()).new_zeros(0)
        attack = self.replaced(minimum_norm=True)
        with attack.posed(model, x, y, generator=generator, indices=indices, towards=towards) as problem:
            x_adv, distance = attack._search(problem, None)
        return x_adv.to(x.dtype), distance

    @override
    def adopt(self, problem: Problem) -> Problem:
        return super().adopt(replace(problem, y=labels_of(problem.y)))

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        x_adv, distance = self._search(problem, start)
        if self.minimum_norm:
            return x_adv
        return torch.where(per_sample(distance <= self.eps, x_adv), x_adv, problem.x)

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        noise = draws.uniform(x, -1.0, 1.0) if self.norm == "linf" else draws.normal(x)
        return self.space.clip(
            x + self.space.from_pixels(noise * per_sample(0.5 * self.eps / self._norm.size(noise), x))
        )

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        return self._follow(problem, x_adv)[0]

    @property
    @override
    def run_passes(self) -> float:
        """Forward-and-backward passes of one run that steers to a class; a lone forward counts half."""
        return 1.5 * self.steps

    @property
    @override
    def passes(self) -> float:
        return self.restarts * self.run_passes + 0.5

    def _search(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Closest adversarial points and distances, over all restarts."""
        x_adv, enough = problem.x.clone(), 0.0 if self.minimum_norm else self.eps
        _, fooled = problem.judge(problem.x)
        distance = torch.where(fooled, 0.0, torch.inf).to(problem.x)
        for restart in range(self.restarts):
            if restart > 0:
                start = self._start(problem)
            left = (distance > enough).nonzero().squeeze(1)
            if len(left) == 0:
                break
            part = problem.select(left)
            found, length = self._follow(part, part.x if start is None else start[left].to(part.x))
            closer = length < distance[left]
            x_adv[left] = torch.where(per_sample(closer, found), found, x_adv[left])
            distance[left] = torch.minimum(length, distance[left])
        return x_adv, distance

    def _follow(self, problem: Problem, start: Tensor) -> tuple[Tensor, Tensor]:
        """One run from samples classified correctly; clean images and infinity where it finds nothing."""
        x_adv, distance = problem.x.clone(), problem.x.new_full((len(start),), torch.inf)
        delta = self.space.to_pixels(start - problem.x)
        left = torch.arange(len(start), device=start.device)

        def keep_closest(points: Tensor, fooled: Tensor) -> None:
            rows = fooled.nonzero().squeeze(1)
            if not len(rows):
                return
            moved = points.index_select(0, rows) - problem.x.index_select(0, rows)
            length = self._norm.size(self.space.to_pixels(moved))
            closer = length < distance[left[rows]]
            rows, length = rows[closer], length[closer]
            x_adv.index_copy_(0, left[rows], points.index_select(0, rows))
            distance[left[rows]] = length

        for _ in range(self.steps):
            points = self._image(problem, delta)
            gap, normal, fooled = nearest_boundary(problem, points, self.norm, self.space)
            keep_closest(points, fooled)
            delta = self._step(problem, delta, gap, normal)
            points = self._image(problem, delta)
            _, fooled = problem.judge(points)
            keep_closest(points, fooled)
            delta = delta * per_sample(torch.where(fooled, self.beta, 1.0).to(delta), delta)
            if self.minimum_norm:
                continue
            unfooled = distance[left] > self.eps
            if not unfooled.all():
                left, delta, problem = left[unfooled], delta[unfooled], problem.select(unfooled)
            if len(left) == 0:
                break
        return x_adv, distance

    def _step(self, problem: Problem, delta: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
        clean = self.space.pixels(problem.x)
        return boundary_step(
            clean, delta, gap, normal, self.norm, eta=self.eta, alpha_max=self.alpha_max, bounds=self.bounds
        )

    def _image(self, problem: Problem, delta: Tensor) -> Tensor:
        # distances are of what the model sees
        moved = self.space.clip(problem.x + self.space.from_pixels(delta))
        return moved.to(problem.dtype).to(moved.dtype)
