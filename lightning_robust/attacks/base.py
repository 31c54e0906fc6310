# SPDX-License-Identifier: Apache-2.0
"""What all attacks share: the call, its conditions, and the choice of the best restart."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import MODES, AttackMode, Model, attack_conditions, ordinary, unwrap
from lightning_robust.attacks.draws import Draws, GeneratorDraws, SampleDraws
from lightning_robust.attacks.losses import ATTACK_LOSSES, PREDICTION_LOSSES, STEERED_LOSSES
from lightning_robust.attacks.problem import Problem, check_batch, check_probabilities
from lightning_robust.attacks.region import add_inwards
from lightning_robust.attacks.restarts import best_of_runs
from lightning_robust.attacks.space import InputSpace
from lightning_robust.checks import check_choice, check_integer, check_non_negative
from lightning_robust.losses import full_precision

__all__ = ["Attack", "AttackLoss"]

AttackLoss = Literal["ce", "margin", "dlr", "prob-margin", "brier", "kl", "lse", "l1", "js"]


class Attack(ABC):
    """Searches, within a budget around each image, for the point where the model's loss is largest.

    ``start -> run -> best restart``. A subclass says in :meth:`draw_start` where a run begins and in :meth:`run` what
    it does; calling the attack returns the attacked images, detached, in the type of ``x``.

    Two things are called a targeted attack, and both exist: with ``targeted=True`` ``y`` is the class to reach, and
    only its prediction is a success; with ``attack(model, x, y, towards=t)`` the loss steers to ``t``, and any
    misclassification of ``y`` is a success (AutoAttack's meaning).

    In training an attack draws from one generator per call. For evaluations give the ``indices`` of the samples in
    their dataset: each then has a stream of random numbers of its own, so the result depends neither on the batch size
    and the order of the samples nor on the number of processes.

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
            ``"prob-margin"``, ``"brier"``, the squared distance of the probabilities from the label; or a distance from
            the prediction for the clean images (computed once): ``"kl"``, ``"lse"``, ``"l1"`` or ``"js"``, see
            :func:`~lightning_robust.losses.probability_distance`.
        targeted: ``y`` is the class to reach: the loss is lowered, and success is its prediction.
        mode: mode of the model while it is attacked: ``"eval"``; ``"train"``: every sub-module as the attack finds
            it, so BatchNorm uses and updates statistics as in training; ``"train-frozen-stats"``: as it is found, but
            with all buffers put back.
        early_stop: stop working on samples that are fooled and return their first such point.
        evaluate_result: spend the forward that would choose between restarts even if there is only one.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, arguments that exclude each other, or (when called) images, targets or
            logits that make no sense.
        TypeError: when called with images that are not floating-point.
    """

    #: Whether budget and step can differ per sample (``scale`` of a call).
    scales: ClassVar[bool] = False
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments as they were given, for :meth:`replaced`."""
        made = super().__new__(cls)
        # what derives from another argument (a step size from the budget) has to stay so
        made._arguments = dict(inspect.signature(cls).bind_partial(*args, **kwargs).arguments)
        return made

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
        if loss in PREDICTION_LOSSES and targeted:
            raise ValueError(f"loss={loss!r} compares with the clean prediction and knows no target; use another loss.")
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
        indices: Tensor | None = None,
        start: Tensor | None = None,
        towards: Tensor | None = None,
        scale: Tensor | None = None,
        against: Tensor | Model | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: module or callable ``x -> logits``; a callable may name its module in the attribute ``module``.
            x: clean images ``[B, ...]``.
            y: classes ``[B]`` or probabilities ``[B, C]``.
            generator: source of randomness on the device of ``x``; the attack's own when ``None``.
            indices: indices ``[B]`` of the samples in their dataset, in place of a generator: a stream per sample.
            start: the point to start the first run from, used as it is; drawn when ``None``.
            towards: classes ``[B]`` to steer to, while any misclassification of ``y`` is a success.
            scale: multiple ``[B]`` of ``eps`` and the step size for each sample; attacks with ``scales`` take it.
            against: what ``loss="kl"`` and its kin compare with in place of the model's own clean prediction: logits
                ``[B, C]``, or a network, which is asked at each point, with its gradient, and runs as it is.

        Returns:
            Attacked images, shaped and typed like ``x``.
        """
        check_batch(x, y)
        if start is not None and start.shape != x.shape:
            raise ValueError(f"Expected `start` to have shape {list(x.shape)} but got {list(start.shape)}.")
        if len(x) == 0:
            return x.detach().clone()
        with self.posed(
            model, x, y, generator=generator, indices=indices, towards=towards, scale=scale, against=against
        ) as problem:
            x_adv = self.solve(problem, start)
        if x_adv.dtype == x.dtype:
            return x_adv
        # rounding to nearest could lead out of the budget, but what needs no rounding has been looked at as it is
        clean, rounded = full_precision(ordinary(x)), x_adv.to(x.dtype)
        inwards = add_inwards(clean, x_adv - clean, x.dtype, self.space).to(x.dtype)
        return torch.where(rounded == x_adv, rounded, inwards)

    @contextmanager
    def posed(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        indices: Tensor | None = None,
        towards: Tensor | None = None,
        scale: Tensor | None = None,
        against: Tensor | Model | None = None,
    ) -> Iterator[Problem]:
        """This attack's problem for a batch, under the conditions that attacks run in; what a call solves.

        Args:
            model: as in a call, like all others.
            x: clean images, at least one.
            y: classes or probabilities.
            generator: source of randomness.
            indices: indices in the dataset.
            towards: classes to steer to.
            scale: multiple of the budget per sample.
            against: what to compare with.
        """
        network, module = unwrap(model)
        draws = self._draws(x, generator, indices)
        with attack_conditions(module, self.mode, x.device, draws):
            problem = self._problem(network, ordinary(x), ordinary(y), draws, towards, scale)
            if isinstance(against, Tensor):
                _check_per_image(x, against=against[:, 0] if against.ndim == 2 else against)
                against = ordinary(against)
            yield self.adopt(problem if against is None else replace(problem, against=against))

    def __repr__(self) -> str:
        arguments = inspect.signature(type(self)).parameters.values()
        # the budget is always shown: a result means nothing without it
        shown = [each.name for each in arguments if each.name == "eps" or getattr(self, each.name) != each.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __getstate__(self) -> dict[str, Any]:
        # generators cannot travel to another process; the seed makes new ones
        return {**vars(self), "_generators": {}, "_checked_on": set()}

    def stages(self, num_classes: int) -> dict[str, "Attack"]:
        """The attacks that this one consists of, by name, for an evaluation that reports each; itself if it is one.

        Args:
            num_classes: number of classes, on which the members of an ensemble may depend.
        """
        return {type(self).__name__: self}

    def at(self, epoch: int, max_epochs: int) -> "Attack":
        """The attack to train with in ``epoch``; itself unless it is scheduled.

        Args:
            epoch: epoch, counted from 0.
            max_epochs: epochs of the run; -1 if unknown.
        """
        return self

    def replaced(self, **arguments: Any) -> Self:
        """The same attack with other constructor arguments; what was left to its default is worked out anew.

        Args:
            **arguments: those that change.
        """
        return type(self)(**{**self._arguments, **arguments})

    def adopt(self, problem: Problem) -> Problem:
        """The images of another attack's problem with what this one maximises.

        Args:
            problem: images, targets and draws.
        """
        steered = STEERED_LOSSES.get(self.loss)
        if problem.towards is not None and (steered is None or self.targeted):
            raise ValueError(
                f"`towards` steers to a class, which {self!r} cannot do; use loss='ce' or a margin, without targeted."
            )
        if problem.against is not None and self.loss not in PREDICTION_LOSSES:
            raise ValueError(
                f"`against` is what a loss like 'kl' compares with, but {self!r} has loss={self.loss!r}; set 'kl'."
            )
        changed = replace(
            problem,
            loss=ATTACK_LOSSES[self.loss],
            steered=steered,
            reference=problem.y,
            targeted=self.targeted,
        )
        return changed.against_prediction() if self.loss in PREDICTION_LOSSES else changed

    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        """The attacked images of a problem of this attack, the best of its restarts.

        Args:
            problem: what :meth:`adopt` made.
            start: the point to start the first run from; drawn when ``None``.
        """
        first = self._start(problem) if start is None else ordinary(start).to(problem.x)
        x_adv = self.run(problem, first)
        if self.restarts == 1 and not self.evaluate_result:
            return x_adv
        more = self.restarts - 1
        return best_of_runs(problem, x_adv, self.run, lambda: self._start(problem), more, only_robust=self.early_stop)

    @abstractmethod
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        """Where a run begins.

        Args:
            x: clean images.
            draws: random numbers.
            scale: multiple ``[B]`` of the budget for each sample.
        """

    @abstractmethod
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        """One run from a start.

        Args:
            problem: the images, the loss to maximise, and the random numbers for it.
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
        return self.restarts * (self.run_passes + 0.5 * chosen) + 0.5 * (self.loss in PREDICTION_LOSSES)

    def _start(self, problem: Problem) -> Tensor:
        return self.draw_start(problem.x, problem.draws, problem.scale)

    def _draws(self, x: Tensor, generator: torch.Generator | None, indices: Tensor | None) -> Draws:
        if indices is None:
            return GeneratorDraws(self._own_generator(x.device) if generator is None else generator)
        if generator is not None:
            raise ValueError("`generator` and `indices` both say where random numbers come from; give one of them.")
        _check_per_image(x, indices=indices)
        return SampleDraws(self.seed, ordinary(indices).to(x.device))

    def _problem(
        self, model: Model, x: Tensor, y: Tensor, draws: Draws, towards: Tensor | None, scale: Tensor | None
    ) -> Problem:
        _check_per_image(x, towards=towards, scale=scale)
        if scale is not None and not self.scales:
            raise ValueError(f"{type(self).__name__} has one budget for all samples; use PGD where they differ.")
        y = y if y.is_floating_point() else y.long()  # torch indexes with nothing smaller than int32
        check = x.device.type == "cpu" or x.device.type not in self._checked_on
        if check:
            self.space.check(x)
            check_probabilities(y)
            self._checked_on.add(x.device.type)
        return Problem(
            model=model,
            x=full_precision(x),
            y=y,
            loss=ATTACK_LOSSES[self.loss],
            reference=y,
            dtype=x.dtype,
            draws=draws,
            check=check,
            towards=None if towards is None else ordinary(towards).long(),
            scale=None if scale is None else ordinary(scale).to(full_precision(x)),
            capacity=len(x),
            labels=(int(y.min()), int(y.max())) if check and not y.is_floating_point() else None,
        )

    def _own_generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _check_per_image(x: Tensor, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None and value.shape != x.shape[:1]:
            raise ValueError(f"Expected one value of `{name}` per image, [{len(x)}], but got {list(value.shape)}.")
