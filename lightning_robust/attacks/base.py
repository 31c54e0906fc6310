# SPDX-License-Identifier: Apache-2.0
"""What all attacks share: the call, its conditions, and the choice of the best restart."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import MODES, AttackMode, Model, attack_conditions, unwrap
from lightning_robust.attacks.losses import ATTACK_LOSSES
from lightning_robust.attacks.problem import Problem, check_batch, check_probabilities
from lightning_robust.attacks.space import InputSpace
from lightning_robust.checks import check_choice, check_integer, check_non_negative
from lightning_robust.losses import full_precision

__all__ = ["Attack", "AttackLoss"]

AttackLoss = Literal["ce", "margin", "dlr", "prob-margin", "kl"]


class Attack(ABC):
    """Searches, within a budget around each image, for the point where the model's loss is largest.

    ``start -> run -> best restart``. A subclass says in :meth:`draw_start` where a run begins and in :meth:`run` what
    it does; calling the attack returns the attacked images, detached, in the type of ``x``.

    What an attack leaves alone: parameters and their ``.grad`` (gradients are taken of the images only), the training
    flag of every sub-module, and the global random generators, also when an exception escapes. It works inside
    ``torch.no_grad`` and ``torch.inference_mode`` and under autocast; images in half precision are moved in float32
    and rounded at the end; float16 gradients are taken of a scaled loss. A model in ``DistributedDataParallel`` is
    attacked inside it.

    Values are checked where that is free: on the CPU in every call; on an accelerator, where it would make the host
    wait for the device, in an attack's first call only. Outside the bounds by more than 1e-6, NaN, rows of
    probabilities that do not add up to 1, and non-finite logits are errors.

    Args:
        eps: radius of the budget, in pixel units (those of ``bounds``).
        restarts: independent runs; kept is, per sample, the first point that fools the model, else that of highest
            loss. More than one costs a further forward per run.
        loss: what is maximised: ``"ce"`` (also for probabilities as targets), ``"margin"``, ``"dlr"``,
            ``"prob-margin"``, or ``"kl"``, the divergence from the prediction for the clean images (computed once).
        targeted: ``y`` is the class to reach: the loss is lowered, and success is its prediction.
        mode: mode of the model while it is attacked: ``"eval"``; ``"train"``: every sub-module as the attack finds
            it, so BatchNorm uses and updates statistics as in training; ``"train-frozen-stats"``: as it is found, but
            with all buffers put back.
        early_stop: stop working on samples that are fooled and return their first such point.
        evaluate_result: spend the forward that would choose between restarts even if there is only one.
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
    """

    def __init__(
        self,
        *,
        eps: float,
        restarts: int = 1,
        loss: AttackLoss = "ce",
        targeted: bool = False,
        mode: AttackMode = "eval",
        early_stop: bool = False,
        evaluate_result: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        check_non_negative("eps", eps)
        check_integer("restarts", restarts, 1)
        check_choice("loss", loss, tuple(ATTACK_LOSSES))
        check_choice("mode", mode, MODES)
        check_integer("seed", seed, 0)
        if early_stop and mode != "eval":
            raise ValueError(f"`early_stop` changes the batch that BatchNorm sees; it needs mode='eval', not {mode!r}.")
        if loss == "kl" and targeted:
            raise ValueError("loss='kl' compares with the clean prediction and knows no target; use another loss.")
        self.eps, self.restarts, self.loss, self.targeted = eps, restarts, loss, targeted
        self.mode, self.early_stop, self.evaluate_result = mode, early_stop, evaluate_result
        self.mean, self.std, self.bounds, self.seed = mean, std, bounds, seed
        self.space = InputSpace(mean, std, bounds)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._checked_on: set[str] = set()  # device types that have seen their first call

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
            start: the point to start the first run from, used as it is; drawn when ``None``.

        Returns:
            Attacked images, shaped and typed like ``x``.
        """
        check_batch(x, y)
        if start is not None and start.shape != x.shape:
            raise ValueError(f"Expected `start` to have shape {list(x.shape)} but got {list(start.shape)}.")
        if len(x) == 0:
            return x.detach().clone()
        network, module = unwrap(model)
        generator = self._own_generator(x.device) if generator is None else generator
        with attack_conditions(module, self.mode, x.device, generator):
            problem = self._problem(network, _ordinary(x), _ordinary(y))
            x_adv = self._best_of_restarts(problem, generator, start)
            return x_adv.to(x.dtype)

    def __repr__(self) -> str:
        arguments = inspect.signature(type(self)).parameters.values()
        # the budget is always shown: a result means nothing without it
        shown = [each.name for each in arguments if each.name == "eps" or getattr(self, each.name) != each.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __getstate__(self) -> dict[str, Any]:
        # generators cannot travel to another process; the seed makes new ones
        return {**vars(self), "_generators": {}, "_checked_on": set()}

    @abstractmethod
    def draw_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where a run begins.

        Args:
            x: clean images.
            generator: source of randomness on the device of ``x``.
        """

    @abstractmethod
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        """One run from a start.

        Args:
            problem: the images and the loss to maximise.
            x_adv: where to start.

        Returns:
            The attacked images of this run.
        """

    @property
    @abstractmethod
    def run_passes(self) -> float:
        """Forward-and-backward passes of one run."""

    @property
    def passes(self) -> float:
        """Cost of attacking a batch in forward-and-backward passes of the model; a lone forward counts half."""
        chosen = self.restarts > 1 or self.evaluate_result
        return self.restarts * (self.run_passes + 0.5 * chosen) + 0.5 * (self.loss == "kl")

    def _best_of_restarts(self, problem: Problem, generator: torch.Generator, start: Tensor | None) -> Tensor:
        first = self.draw_start(problem.x, generator) if start is None else _ordinary(start).to(problem.x)
        x_adv = self.run(problem, first)
        if self.restarts == 1 and not self.evaluate_result:
            return x_adv
        loss, fooled = problem.judge(x_adv)
        for _ in range(self.restarts - 1):
            # drawn for all samples, so that the draws of one do not depend on the success of another
            start = self.draw_start(problem.x, generator)
            left = (~fooled).nonzero().squeeze(1) if self.early_stop else torch.arange(len(x_adv), device=x_adv.device)
            if len(left) == 0:
                break
            part = problem.select(left)
            candidate = self.run(part, start[left])
            new_loss, new_fooled = part.judge(candidate)
            better = ~fooled[left] & (new_fooled | (new_loss > loss[left]))
            kept = torch.where(better.view(-1, *[1] * (x_adv.ndim - 1)), candidate, x_adv[left])
            x_adv = x_adv.index_copy(0, left, kept)
            loss = loss.index_copy(0, left, torch.where(better, new_loss, loss[left]))
            fooled = fooled.index_copy(0, left, fooled[left] | new_fooled)
        return x_adv

    def _problem(self, model: Model, x: Tensor, y: Tensor) -> Problem:
        check = x.device.type == "cpu" or x.device.type not in self._checked_on
        if check:
            self.space.check(x)
            check_probabilities(y)
            self._checked_on.add(x.device.type)
        problem = Problem(
            model=model,
            x=full_precision(x),
            y=y,
            loss=ATTACK_LOSSES[self.loss],
            reference=y,
            dtype=x.dtype,
            targeted=self.targeted,
            check=check,
        )
        return problem.against_own_prediction() if self.loss == "kl" else problem

    def _own_generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _ordinary(value: Tensor) -> Tensor:
    # autograd cannot save what was made in inference mode; a clone made outside it is an ordinary tensor
    return value.clone() if value.is_inference() else value.detach()
