# SPDX-License-Identifier: Apache-2.0
"""MTARD: a clean and a robust teacher, whose losses and temperatures are balanced during training."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range, check_non_negative, check_positive
from lightning_robust.distillation import Source
from lightning_robust.losses import full_precision
from lightning_robust.objectives.balance_rules import entropies
from lightning_robust.objectives.balances import LossBalance, TemperatureBalance
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import KLReduction, kl_scale, teacher_divergences
from lightning_robust.schedules import Constant, Schedule, as_schedule

__all__ = ["MTARD"]

_CLEAN, _ROBUST = "clean teacher", "robust teacher"  # the order of every pair of numbers
_ENTROPY_EPS = 1e-5  # of the published code


class MTARD(TaughtObjective):
    r"""Multi-teacher adversarial robustness distillation: learns clean images from one teacher, attacked from another.

    .. math:: w_c\, \mathrm{KL}\big(q^c(x) \,\|\, p(x)\big) + w_r\, \mathrm{KL}\big(q^r(x') \,\|\, p(x')\big), \qquad
              q = \mathrm{softmax}(t / \tau), \quad p = \mathrm{softmax}(z)

    with :math:`t^c, t^r` the logits of the clean and the robust teacher, :math:`z` those of the student, which has no
    temperature, and :math:`x'` the images that an attack on the student finds; labels enter through the attack alone.
    Once per optimizer step, from its losses and entropies over all processes and accumulated batches,

    - :class:`LossBalance` moves the weights :math:`w` so that both losses fall at the same relative pace; the new
      weights are used in the same step;
    - :class:`TemperatureBalance` moves the temperatures :math:`\tau` so that both teachers are equally certain; the new
      ones are used from the next step on. ``temperature_balance=False`` is the conference version, without it.

    Weights, first losses and temperatures are buffers: checkpoints hold them, and a resumed run goes on with them. All
    are pairs (clean, robust).

    When several batches are accumulated, those before the last cannot know what follows: each is weighted by what the
    update would give for the batches so far, and the last one's is kept. With ``weights_from="previous-step"`` all
    batches have the weights that the step before has left, and accumulation changes nothing at all.

    Cost: with 10 attack steps 10 forwards and input-backwards for the attack, then 2 forwards and backwards, and one
    forward of each teacher per batch, however often the loss is evaluated. One sum of 5 numbers over the processes.

    Args:
        clean_teacher: asked about the clean images; may be a cache.
        robust_teacher: asked about the attacked images.
        temperature_balance: adapt the temperatures of the teachers.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, random_start="normal")`` in evaluation mode.
        weight_lr: how fast the weights move, in [0, 1]; a schedule is read at the start of each epoch. The authors
            multiply both rates by 0.1 whenever they do so with the learning rate.
        temperature_lr: step of the temperatures, likewise.
        temperature_range: smallest and largest temperature.
        initial_temperatures: temperatures at the start.
        initial_weights: weights at the start, which sum to 1.
        exponent: :math:`\beta` of :class:`LossBalance`.
        init_steps: steps over which the losses at the start are averaged.
        eps_log: added to the teacher's probabilities inside the logarithm; shifts the losses that are balanced.
        reduction: over the classes: ``"elementmean"``, as in the published code, or ``"batchmean"``, a sum, which is
            ``C`` times as large.
        loss_factor: multiplies both losses; 10 in the authors' conference code for CIFAR-100.
        entropy: how the certainties of the teachers are compared: ``"exact"``: by their entropies; ``"published"``: by
            the ratio of sums with 1e-5 in the logarithm, which heats both when one is saturated.
        weights_from: ``"this-step"``, as in the paper, or ``"previous-step"``.
        forwards: ``"separate"``: attacked, then clean, which BatchNorm sees last; ``"joint"``: both in one batch.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a number out of range, an unknown choice, a cache for the robust teacher, or, when training, a
            teacher with other classes than the model.

    References:
        Zhao et al., Mitigating Accuracy-Robustness Trade-off via Multi-Teacher Adversarial Distillation,
        arXiv:2306.16170 (B-MTARD); Enhanced Accuracy and Robustness via Multi-Teacher Adversarial Distillation,
        ECCV 2022, doi:10.1007/978-3-031-19772-7_34 (the conference version). Their attack leaves the whole network in
        training mode, this one leaves it as it was; their balances are those of one process. ``entropy`` differs for
        saturated teachers, see there.

    Example:
        >>> student, clean, robust = (torch.nn.Linear(4, 3) for _ in range(3))
        >>> objective = MTARD(clean, robust, attack=PGD(eps=0.1, steps=2))
        >>> output = objective(student, objective.prepare(student, torch.rand(2, 4), torch.tensor([0, 2])))
        >>> objective.loss_balance.weights.tolist(), len(objective.temperature_balance.temperatures)
        ([0.5, 0.5], 2)
    """

    def __init__(
        self,
        clean_teacher: Source,
        robust_teacher: Source,
        *,
        temperature_balance: bool = True,
        attack: Attack | None = None,
        weight_lr: float | Schedule = 0.025,
        temperature_lr: float | Schedule = 0.001,
        temperature_range: tuple[float, float] = (1.0, 10.0),
        initial_temperatures: tuple[float, float] = (1.0, 1.0),
        initial_weights: tuple[float, float] = (0.5, 0.5),
        exponent: float = 1.0,
        init_steps: int = 1,
        eps_log: float = 1e-5,
        reduction: KLReduction = "elementmean",
        loss_factor: float = 1.0,
        entropy: Literal["exact", "published"] = "exact",
        weights_from: Literal["this-step", "previous-step"] = "this-step",
        forwards: Literal["separate", "joint"] = "separate",
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, random_start="normal") if attack is None else attack,
            {_CLEAN: clean_teacher, _ROBUST: robust_teacher},
            cacheable=(_CLEAN,),
        )
        check_choice("reduction", reduction, ("elementmean", "batchmean"))
        check_choice("entropy", entropy, ("exact", "published"))
        check_choice("weights_from", weights_from, ("this-step", "previous-step"))
        check_choice("forwards", forwards, ("separate", "joint"))
        check_non_negative("eps_log", eps_log)
        check_positive("loss_factor", loss_factor)
        self.eps_log, self.reduction, self.loss_factor = eps_log, reduction, loss_factor
        self.entropy, self.weights_from, self.forwards = entropy, weights_from, forwards
        self.adapts_temperatures = temperature_balance
        self.weight_lr = as_schedule("weight_lr", weight_lr)
        self.temperature_lr = as_schedule("temperature_lr", temperature_lr)
        self.loss_balance = LossBalance(2, exponent=exponent, init_steps=init_steps, initial_weights=initial_weights)
        self.temperature_balance = TemperatureBalance(
            2,
            limits=temperature_range,
            initial_temperatures=initial_temperatures,
            comparison="ratio" if entropy == "published" else "difference",
        )
        self._rates: tuple[float, float] | None = None
        if isinstance(self.weight_lr, Constant) and isinstance(self.temperature_lr, Constant):
            self._read_rates(0, -1)
        self._weights: Tensor | None = None  # what the losses of the running optimizer step are weighted by
        self._sums: Tensor | None = None  # losses, entropies and samples of its batches so far

    def _read_rates(self, epoch: int, max_epochs: int) -> None:
        rates = self.weight_lr.at(epoch, max_epochs), self.temperature_lr.at(epoch, max_epochs)
        check_in_range("weight_lr", rates[0], 0, 1)
        check_non_negative("temperature_lr", rates[1])
        self._rates = rates

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        self._read_rates(epoch, max_epochs)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        if self.running.first:
            self._weights = self.loss_balance.weights.clone()
        prepared = super().prepare(model, x, y, generator=generator)
        # asked once, at the temperatures of this step, for all evaluations of the loss
        return replace(prepared, extra=self._taught(prepared))

    def _taught(self, prepared: Prepared) -> dict[str, Tensor]:
        """Logits of the teachers divided by their temperatures."""
        assert prepared.x_adv is not None, "made by prepare"
        seen = {_CLEAN: prepared.x, _ROBUST: prepared.x_adv}
        answers = {name: self.ask(name, images) for name, images in seen.items()}
        temperatures = self.temperature_balance.temperatures
        return {
            name: logits / temperature.to(logits)
            for (name, logits), temperature in zip(answers.items(), temperatures, strict=True)
        }

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        taught = prepared.extra if _CLEAN in prepared.extra else self._taught(prepared)
        clean, attacked = self._logits(model, prepared)
        for name, logits in ((_CLEAN, clean), (_ROBUST, attacked)):
            self.check_classes(name, taught[name], logits)
        scale = self.loss_factor * kl_scale(self.reduction, clean)
        pairs = ((clean, taught[_CLEAN]), (attacked, taught[_ROBUST]))
        losses = scale * torch.stack([teacher_divergences(*pair, eps_log=self.eps_log) for pair in pairs])
        eps = _ENTROPY_EPS if self.entropy == "published" else 0.0
        entropy = torch.stack([entropies(teacher, eps) for _, teacher in pairs])
        weights = self._balance(losses.detach(), entropy)
        samples = (weights.to(losses).unsqueeze(1) * losses).sum(0)
        told = {"weight": weights, "loss": losses.detach().mean(1)}
        if self.adapts_temperatures:
            told |= {"temperature": self.temperature_balance.temperatures, "entropy": entropy.mean(1)}
        logs = {
            f"mtard_{kind}_{name}": full_precision(pair[place]).clone()
            for name, pair in told.items()
            for place, kind in enumerate(("clean", "robust"))
        }
        return ObjectiveOutput(samples.mean(), clean, logs, samples)

    def _logits(self, model: Model, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Logits of the student for the clean and the attacked images."""
        if self.forwards == "joint":
            return self.clean_and_attacked(model, prepared, joint=True)
        assert prepared.x_adv is not None, "made by prepare"
        attacked = model(prepared.x_adv)
        return model(prepared.x), attacked

    def _balance(self, losses: Tensor, entropy: Tensor) -> Tensor:
        """What losses ``[2, B]`` are weighted by; where it counts, weights and temperatures move."""
        before = self.loss_balance.weights.clone()
        if not self.recording:
            return self._weights if self.training and self._weights is not None else before
        if self._rates is None:
            raise RuntimeError(
                "The rates of MTARD follow a schedule that was not told the epoch; call "
                "`epoch_starts(epoch, max_epochs)` at the start of every epoch, as ObjectiveTraining does."
            )
        means = self._means(torch.cat([losses, entropy]).to(before.dtype))
        move = self.loss_balance.update if self.running.last else self.loss_balance.proposed
        weights = move(means[:2], self._rates[0])
        if self.adapts_temperatures and self.running.last:
            self.temperature_balance.update(means[2:], self._rates[1])
        if self.weights_from == "this-step":
            self._weights = weights
        elif self.running.first or self._weights is None:
            self._weights = before
        return self._weights

    def _means(self, values: Tensor) -> Tensor:
        """Means ``[N]`` of values ``[N, B]`` over all processes and the batches of the optimizer step so far."""
        count = torch.full_like(values[:1], values.shape[1])
        sums = self.running.total(torch.cat([values.sum(1), count[:, 0]]))
        self._sums = sums if self.running.first or self._sums is None else self._sums + sums
        return self._sums[:-1] / self._sums[-1]

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 2

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, weight_lr={self.weight_lr!r}, temperature_lr={self.temperature_lr!r}, "
            f"eps_log={self.eps_log}, reduction={self.reduction!r}, loss_factor={self.loss_factor}, "
            f"entropy={self.entropy!r}, weights_from={self.weights_from!r}, forwards={self.forwards!r}"
        )
