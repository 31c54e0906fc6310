# SPDX-License-Identifier: Apache-2.0
"""Projected gradient descent."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack, AttackLoss
from lightning_robust.attacks.conditions import AttackMode
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.losses import PREDICTION_LOSSES
from lightning_robust.attacks.norms import L1, NORMS, Norm, per_sample
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import add_inwards
from lightning_robust.checks import check_choice, check_in_range, check_integer, check_non_negative

__all__ = ["PGD", "NormName", "Projection", "Start"]

NormName = Literal["linf", "l2", "l1"]
Projection = Literal["ball-box", "box-ball", "box"]
Start = Literal["none", "uniform", "normal", "radial"]


class PGD(Attack):
    r"""Projected gradient descent on the negative loss: repeated steps of steepest ascent within the budget.

    .. math:: x_{t+1} = P(x_t + \alpha\, s(g_t)), \qquad g_t = \nabla_x \sum_i \ell(f(x_t)_i, y_i)

    with :math:`s(g) = \mathrm{sign}(g)` for linf, :math:`g / \|g\|_2` per sample for l2 and the signs of the largest
    entries of :math:`g` divided by their number for l1, and :math:`P` the projection on the ball around the clean
    images and on the possible pixels, in l1 the exact one on both together. See
    :class:`~lightning_robust.attacks.Attack` for what is left alone and what is checked.

    Cost: exactly ``steps`` forwards and input-backwards. One more forward per run with several ``restarts`` or with
    ``evaluate_result``, and one for the clean images with ``loss="kl"`` and its kin. No parameter gradients
    are computed.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: number of steps; 0 returns the start.
        step_size: length of a step in pixel units; ``max(eps / 4, 2.5 * eps / steps)`` when ``None``.
        random_start: ``True`` or ``"uniform"``: uniform in the ball; ``"radial"``: a random direction times
            ``U(0, 1) * eps`` (the l2 start of Rice et al.); ``"normal"``: ``0.001 * N(0, 1)``, not clipped (the start
            of TRADES); ``False`` or ``"none"``: the clean images.
        restarts: independent runs; kept is, per sample, the first point that fools the model, else that of highest
            loss.
        loss: what is maximised: ``"ce"`` (also for probabilities as targets), ``"margin"``, ``"dlr"``,
            ``"prob-margin"``, ``"brier"``, the squared distance of the probabilities from the label; or a distance from
            the prediction for the clean images (computed once): ``"kl"``, ``"lse"``, ``"l1"`` or ``"js"``, see
            :func:`~lightning_robust.losses.probability_distance`.
        targeted: ``y`` is the class to reach: the loss is lowered, and success is its prediction.
        mode: mode of the model while it is attacked: ``"eval"``; ``"train"``: every sub-module as the attack finds
            it, so BatchNorm uses and updates statistics as in training; ``"train-frozen-stats"``: as it is found, but
            with all buffers put back.
        early_stop: stop working on samples that are fooled and return their first such point. Saves time in
            evaluations, where most samples fall soon; the host waits for the device in every step.
        evaluate_result: spend the forward that chooses between restarts even if there is only one, as the code of Rice
            et al. does; with ``mode="train"`` this is one more update of the running statistics.
        projection: ``"ball-box"``: on the ball, then on the possible pixels; ``"box-ball"``: the other way round
            (TRADES in l2); ``"box"``: on the possible pixels only, so the perturbation may exceed ``eps``.
        top_fraction: fraction of the entries that a step in l1 moves, those of largest gradient, at least one; other
            norms ignore it. SLIDE draws it for each call, between 0.01 and 0.2.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or arguments that exclude each other.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083. Losses are summed
        where their code averages, which changes no direction; the l2 direction of a zero gradient is zero.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = PGD(eps=0.1, steps=5)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    scales: ClassVar[bool] = True

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool | Start = True,
        restarts: int = 1,
        loss: AttackLoss = "ce",
        targeted: bool = False,
        mode: AttackMode = "eval",
        early_stop: bool = False,
        evaluate_result: bool = False,
        projection: Projection = "ball-box",
        top_fraction: float = 0.01,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps=eps,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            mode=mode,
            early_stop=early_stop,
            evaluate_result=evaluate_result,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        check_choice("norm", norm, tuple(NORMS))
        check_integer("steps", steps, 0)
        check_choice("random_start", random_start, (True, False, "none", "uniform", "normal", "radial"))
        check_choice("projection", projection, ("ball-box", "box-ball", "box"))
        check_in_range("top_fraction", top_fraction, 0, 1)
        if step_size is not None:
            check_non_negative("step_size", step_size)
        self.norm, self.steps, self.projection = norm, steps, projection
        self.step_size = max(eps / 4, 2.5 * eps / max(steps, 1)) if step_size is None else step_size
        self.random_start = random_start
        self._start_kind: Start = {True: "uniform", False: "none"}.get(random_start, random_start)  # type: ignore
        self._start_radius = eps
        self.top_fraction = top_fraction
        self._norm: Norm = L1(top_fraction) if norm == "l1" else NORMS[norm]
        if self._start_kind == "none" and loss in PREDICTION_LOSSES:
            raise ValueError(f"loss={loss!r} has no gradient at the clean images; it needs a random start.")
        if self._start_kind == "none" and restarts > 1:
            raise ValueError("Without a random start all restarts are the same; set `random_start` or restarts=1.")

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        if self._start_kind == "none":
            return x.clone()
        if self._start_kind == "normal":
            noise = 0.001 * draws.normal(x)
            # the projection of the first step, if there is one, brings it into the budget
            return x + self.space.from_pixels(noise) if self.steps else self.feasible(x, noise, scale)
        draw = self._norm.uniform if self._start_kind == "uniform" else self._norm.radial
        radius = self._start_radius if scale is None else self._start_radius * scale
        return self.space.clip(x + self.space.from_pixels(draw(x, radius, draws)))

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        if self.early_stop:
            return self._run_until_fooled(problem, x_adv)
        for _ in range(self.steps):
            gradient, *_ = problem.gradient(x_adv)
            x_adv = self.step(problem.x, x_adv, gradient, problem.scale)
        return self._in_type(problem, x_adv)

    @property
    @override
    def run_passes(self) -> float:
        return self.steps

    def step(self, x: Tensor, x_adv: Tensor, gradient: Tensor, scale: Tensor | None = None) -> Tensor:
        """Move along the steepest direction, then back into the budget and the possible pixels.

        Args:
            x: clean images.
            x_adv: current iterate.
            gradient: gradient of the loss at the iterate.
            scale: multiple ``[B]`` of step and budget for each sample.
        """
        gradient = self.space.pixel_gradient(gradient)
        move = self.step_size * self._norm.direction_on_images(x_adv, gradient, self.space)
        if scale is not None:
            move = move * per_sample(scale, move)
        return self.feasible(x, self.space.to_pixels(x_adv - x) + move, scale)

    def feasible(self, x: Tensor, delta: Tensor, scale: Tensor | None = None) -> Tensor:
        """Images ``x`` moved by ``delta`` (in pixel units), brought into the budget and the possible pixels.

        Args:
            x: clean images.
            delta: perturbation in pixel units.
            scale: multiple ``[B]`` of the budget for each sample.
        """
        eps = self.eps if scale is None else self.eps * scale
        if self.projection == "ball-box":
            delta = self._norm.project_on_images(x, delta, eps, self.space)
        moved = self.space.clip(x + self.space.from_pixels(delta))
        if self.projection == "box-ball":
            delta = self._norm.project(self.space.to_pixels(moved - x), eps)
            moved = self.space.clip(x + self.space.from_pixels(delta))
        return moved

    def _run_until_fooled(self, problem: Problem, x_adv: Tensor) -> Tensor:
        x_adv = self._in_type(problem, x_adv).clone()
        left = torch.arange(len(x_adv), device=x_adv.device)
        for _ in range(self.steps):
            gradient, logits, _ = problem.gradient(x_adv[left])
            robust = ~problem.fooled(logits)
            if not robust.all():
                left, gradient, problem = left[robust], gradient[robust], problem.select(robust)
            if len(left) == 0:
                break
            x_adv[left] = self._in_type(problem, self.step(problem.x, x_adv[left], gradient, problem.scale))
        return x_adv

    def _in_type(self, problem: Problem, x_adv: Tensor) -> Tensor:
        # what the model is asked about, in half precision, has to be what is returned
        if problem.dtype == x_adv.dtype:
            return x_adv
        return add_inwards(problem.x, x_adv - problem.x, problem.dtype, self.space)
