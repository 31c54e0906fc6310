# SPDX-License-Identifier: Apache-2.0
"""The algorithm that gradient attacks share: start, then gradient, direction, step, projection, and the best restart."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import MODES, AttackMode, Model, attack_conditions, unwrap
from lightning_robust.attacks.losses import ATTACK_LOSSES
from lightning_robust.attacks.norms import NORMS
from lightning_robust.attacks.problem import Problem, check_batch
from lightning_robust.attacks.space import InputSpace
from lightning_robust.checks import check_choice, check_integer, check_non_negative

__all__ = ["Attack", "AttackLoss", "Projection", "Start"]

AttackLoss = Literal["ce", "margin", "dlr", "prob-margin", "kl"]
Projection = Literal["ball-box", "box-ball", "box"]
Start = Literal["none", "uniform", "normal", "radial"]
_STARTS = (True, False, "none", "uniform", "normal", "radial")
_PROJECTIONS = ("ball-box", "box-ball", "box")


class Attack:
    r"""Searches, within a budget around each image, for the point where the model's loss is largest.

    .. math:: x_{t+1} = P(x_t + \alpha\, s(g_t)), \qquad g_t = \nabla_x \sum_i \ell(f(x_t)_i, y_i)

    with the steepest direction :math:`s` of the norm and the projection :math:`P` on the ball around the clean images
    and on the possible pixels. Calling an attack returns the attacked images, detached, in the type of ``x``.

    What an attack leaves alone: parameters and their ``.grad`` (gradients are taken of the images only), the training
    flag of every sub-module, and the global random generators. It works inside ``torch.no_grad`` and
    ``torch.inference_mode`` and under autocast; images in half precision are moved in float32 and rounded at the end,
    and float16 gradients are taken of a scaled loss. A model in ``DistributedDataParallel`` is attacked inside it.

    Values are checked where that is free: on the CPU in every call; on an accelerator, where it would make the host
    wait for the device, in an attack's first call only. Outside the bounds by more than 1e-6, NaN, and non-finite
    logits are errors.

    Cost: ``steps`` forwards and input-backwards; one more forward per run with several ``restarts`` or with
    ``evaluate_result``, and one for the clean images with ``loss="kl"``. No parameter gradients are computed.

    Args:
        eps: radius of the ball, in pixel units (of ``bounds``).
        norm: ``"linf"`` or ``"l2"``.
        steps: number of steps; 0 returns the start.
        step_size: length of a step in pixel units; ``max(eps / 4, 2.5 * eps / steps)`` when ``None``.
        random_start: ``True`` or ``"uniform"``: uniform in the ball; ``"radial"``: a random direction times
            ``U(0, 1) * eps``; ``"normal"``: ``0.001 * N(0, 1)``, not clipped; ``False`` or ``"none"``: the images.
        start_scale: radius of the random start as a multiple of ``eps``.
        restarts: independent runs; kept is, per sample, the first point that fools the model, else that of highest
            loss.
        loss: what is maximised: ``"ce"`` (also for probabilities as targets), ``"margin"``, ``"dlr"``,
            ``"prob-margin"``, or ``"kl"``, the divergence from the prediction for the clean images (computed once).
        targeted: ``y`` is the class to reach: the loss is lowered, and success is its prediction.
        mode: mode of the model while it is attacked: ``"eval"``; ``"train"``: every sub-module as the attack finds
            it, so BatchNorm uses and updates statistics as in training; ``"train-frozen-stats"``: as it is found, but
            with all buffers put back.
        early_stop: stop working on samples that are fooled and return their first such point. Saves time in
            evaluations; makes the host wait for the device in every step.
        evaluate_result: spend the forward that would choose between restarts even if there is only one, as some
            published code does; with ``mode="train"`` this is one more update of the running statistics.
        projection: ``"ball-box"``: on the ball, then on the possible pixels; ``"box-ball"``: the other way round;
            ``"box"``: on the possible pixels only, so the perturbation may exceed ``eps``.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, arguments that exclude each other, or (when called) images, targets or
            logits that make no sense.
        TypeError: when called with images that are not floating-point.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = Attack(eps=0.1, steps=5)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float,
        steps: int,
        norm: Literal["linf", "l2"] = "linf",
        step_size: float | None = None,
        random_start: bool | Start = True,
        start_scale: float = 1.0,
        restarts: int = 1,
        loss: AttackLoss = "ce",
        targeted: bool = False,
        mode: AttackMode = "eval",
        early_stop: bool = False,
        evaluate_result: bool = False,
        projection: Projection = "ball-box",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        check_non_negative("eps", eps)
        check_integer("steps", steps, 0)
        check_choice("norm", norm, tuple(NORMS))
        check_choice("random_start", random_start, _STARTS)
        check_non_negative("start_scale", start_scale)
        check_integer("restarts", restarts, 1)
        check_choice("loss", loss, tuple(ATTACK_LOSSES))
        check_choice("mode", mode, MODES)
        check_choice("projection", projection, _PROJECTIONS)
        check_integer("seed", seed, 0)
        if step_size is not None:
            check_non_negative("step_size", step_size)
        self.eps, self.norm, self.steps = eps, norm, steps
        self.step_size = max(eps / 4, 2.5 * eps / max(steps, 1)) if step_size is None else step_size
        names: dict[bool | Start, Start] = {True: "uniform", False: "none"}
        self.random_start: Start = names.get(random_start) or random_start  # type: ignore[assignment]
        self.start_scale = start_scale
        self.restarts, self.loss, self.targeted, self.mode = restarts, loss, targeted, mode
        self.early_stop, self.evaluate_result, self.projection = early_stop, evaluate_result, projection
        self.mean, self.std, self.bounds, self.seed = mean, std, bounds, seed
        self.space = InputSpace(mean, std, bounds)
        self._norm = NORMS[norm]
        self._generators: dict[torch.device, torch.Generator] = {}
        self._checked_on: set[str] = set()  # device types whose first call has been checked
        self._refuse_contradictions()

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: module or callable ``x -> logits``; a callable may name its module in the attribute ``module``.
            x: clean images ``[B, ...]``.
            y: classes ``[B]`` or probabilities ``[B, C]``.
            generator: source of randomness on the device of ``x``; the attack's own when ``None``.
            start: the point to start the first run from, used as it is; drawn according to ``random_start`` when
                ``None``.

        Returns:
            Attacked images, shaped and typed like ``x``.
        """
        check_batch(x, y)
        if len(x) == 0:
            return x.detach().clone()
        if start is not None and start.shape != x.shape:
            raise ValueError(f"Expected `start` to have shape {list(x.shape)} but got {list(start.shape)}.")
        network, module = unwrap(model)
        generator = self._generator(x.device) if generator is None else generator
        with attack_conditions(module, self.mode, x.device, generator):
            problem = self._problem(network, _ordinary(x), _ordinary(y))
            x_adv = self._best_of_restarts(problem, generator, None if start is None else _ordinary(start))
        return x_adv.to(x.dtype)

    def __repr__(self) -> str:
        arguments = inspect.signature(type(self)).parameters.values()
        given = {each.name: getattr(self, each.name) for each in arguments if getattr(self, each.name) != each.default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        # Generators cannot be copied to another process; the seed makes new ones.
        return {**vars(self), "_generators": {}, "_checked_on": set()}

    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        """One run from ``x_adv``: what subclasses with another algorithm override.

        Args:
            problem: the images and the loss to maximise.
            x_adv: where to start.

        Returns:
            The attacked images of this run.
        """
        if self.early_stop:
            return self._run_until_fooled(problem, x_adv)
        for _ in range(self.steps):
            gradient, _ = problem.gradient(x_adv)
            x_adv = self.step(problem.x, x_adv, gradient)
        return x_adv

    def step(self, x: Tensor, x_adv: Tensor, gradient: Tensor) -> Tensor:
        """Move along the gradient, then back into the budget and the possible pixels.

        Args:
            x: clean images.
            x_adv: current iterate.
            gradient: gradient of the loss at the iterate.
        """
        direction = self._norm.direction(self.space.pixel_gradient(gradient))
        delta = self.space.to_pixels(x_adv - x) + self.step_size * direction
        return self.feasible(x, delta)

    def feasible(self, x: Tensor, delta: Tensor) -> Tensor:
        """The images ``x`` moved by ``delta`` (in pixel units), brought into the budget and the possible pixels.

        Args:
            x: clean images.
            delta: perturbation in pixel units.
        """
        if self.projection == "ball-box":
            delta = self._norm.project(delta, self.eps)
        moved = self.space.clip(x + self.space.from_pixels(delta))
        if self.projection == "box-ball":
            delta = self._norm.project(self.space.to_pixels(moved - x), self.eps)
            moved = self.space.clip(x + self.space.from_pixels(delta))
        return moved

    def draw_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A start according to ``random_start``.

        Args:
            x: clean images.
            generator: source of randomness on the device of ``x``.
        """
        radius = self.eps * self.start_scale
        if self.random_start == "none":
            return x
        if self.random_start == "normal":
            noise = 0.001 * torch.empty_like(x).normal_(generator=generator)
            return x + self.space.from_pixels(noise) if self.steps else self.feasible(x, noise)
        draw = self._norm.uniform if self.random_start == "uniform" else self._norm.radial
        return self.space.clip(x + self.space.from_pixels(draw(x, radius, generator)))

    def _best_of_restarts(self, problem: Problem, generator: torch.Generator, start: Tensor | None) -> Tensor:
        x_adv = self.run(problem, self.draw_start(problem.x, generator) if start is None else start)
        if self.restarts == 1 and not self.evaluate_result:
            return x_adv
        loss, fooled = problem.judge(x_adv)
        for _ in range(self.restarts - 1):
            start = self.draw_start(problem.x, generator)  # for all samples: draws do not depend on who is fooled
            left = (~fooled).nonzero().squeeze(1) if self.early_stop else torch.arange(len(fooled), device=fooled.device)
            if len(left) == 0:
                break
            part = problem.select(left)
            candidate = self.run(part, start[left])
            new_loss, new_fooled = part.judge(candidate)
            better = ~fooled[left] & (new_fooled | (new_loss > loss[left]))
            x_adv = x_adv.index_copy(0, left, torch.where(_like(better, candidate), candidate, x_adv[left]))
            loss = loss.index_copy(0, left, torch.where(better, new_loss, loss[left]))
            fooled = fooled.index_copy(0, left, fooled[left] | new_fooled)
        return x_adv

    def _run_until_fooled(self, problem: Problem, x_adv: Tensor) -> Tensor:
        x_adv = x_adv.clone()
        left = torch.arange(len(x_adv), device=x_adv.device)
        for _ in range(self.steps):
            gradient, logits = problem.gradient(x_adv[left])
            robust = ~problem.fooled(logits)
            if not robust.all():
                left, gradient, problem = left[robust], gradient[robust], problem.select(robust)
            if len(left) == 0:
                break
            x_adv[left] = self.step(problem.x, x_adv[left], gradient)
        return x_adv

    def _problem(self, model: Model, x: Tensor, y: Tensor) -> Problem:
        check = x.device.type == "cpu" or x.device.type not in self._checked_on
        if check:
            self.space.check(x)
            self._checked_on.add(x.device.type)
        working = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        problem = Problem(
            model=model,
            x=working,
            y=y,
            loss=ATTACK_LOSSES[self.loss],
            reference=y,
            dtype=x.dtype,
            targeted=self.targeted,
            check=check,
        )
        return problem if self.loss != "kl" else problem.with_reference(problem.clean_log_probabilities())

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def _refuse_contradictions(self) -> None:
        if self.early_stop and self.mode != "eval":
            raise ValueError(f"`early_stop` changes the batch that BatchNorm sees; it needs mode='eval', not {self.mode!r}.")
        if self.loss == "kl" and self.targeted:
            raise ValueError("loss='kl' compares with the clean prediction and knows no target; use another loss.")
        if self.random_start == "none" and self.loss == "kl":
            raise ValueError("loss='kl' has no gradient at the clean images; it needs a random start.")
        if self.random_start == "none" and self.restarts > 1:
            raise ValueError("Without a random start all restarts are the same; set `random_start` or restarts=1.")


def _ordinary(value: Tensor) -> Tensor:
    # autograd cannot save tensors that were made in inference mode; a clone made outside it is an ordinary one
    return value.clone() if value.is_inference() else value.detach()


def _like(mask: Tensor, images: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (images.ndim - 1))
