# SPDX-License-Identifier: Apache-2.0
"""DAFA: adversarial training that moves effort from easy classes to the hard ones that resemble them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_integer, check_non_negative, check_positive
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared, Total
from lightning_robust.objectives.dafa_weights import dafa_sums, dafa_weights
from lightning_robust.objectives.terms import divergences

__all__ = ["DAFA", "dafa_loss"]

Form = Literal["trades", "pgd"]


def dafa_loss(
    clean_logits: Tensor, adv_logits: Tensor, target: Tensor, weights: Tensor, beta: float = 6.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""TRADES whose cross entropy is weighted by class; the divergence is not.

    .. math:: \frac1B \sum_i W_{y_i}\, \mathrm{CE}(z_i, y_i) + \beta\, \frac1B \sum_i \mathrm{KL}(p_i \,\|\, q_i)

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        weights: of the classes, ``[C]``.
        beta: weight of the divergence.

    Returns:
        The loss, its cross-entropy part and its divergence part (before ``beta``).

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> dafa_loss(zeros, zeros, torch.tensor([0]), torch.tensor([2.0, 0.5]))
        (tensor(1.3863), tensor(1.3863), tensor(0.))
    """
    natural = _weighted(clean_logits, target, weights).mean()
    robust = divergences(full_precision(clean_logits), full_precision(adv_logits)).mean()
    return natural + beta * robust, natural, robust


def _weighted(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of each sample times the weight of its class."""
    precise = full_precision(logits)
    return _of_label(target, weights, precise) * cross_entropy(precise, target, reduction="none")


def _of_label(target: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """Weight of each sample's class; of probabilities, the mean."""
    weights = weights.to(like)
    return target.to(like) @ weights if target.is_floating_point() else weights[target.long()]


@dataclass(frozen=True)
class _Output(ObjectiveOutput):
    """With what the batch says about the classes."""

    sums: tuple[Tensor, Tensor] | None = None


class DAFA(AttackedObjective):
    r"""Distance-aware fair adversarial training: TRADES with budgets and weights per class.

    .. math:: W_y\, \mathrm{CE}(f(x), y) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big), \qquad
              x' = \arg\max_{\|x' - x\| \le W_y \epsilon} \mathrm{KL}\big(f(x) \,\|\, f(x')\big)

    During the first ``warmup`` epochs all :math:`W` are 1. In the last of them the predictions for attacked images are
    averaged per class, over all processes, and give the weights (:func:`dafa_weights`) of the epochs that follow: hard
    classes that are taken for easy ones get a larger budget, a larger step and a larger loss, easy ones smaller ones.
    The epochs come from the training loop (``epoch_starts`` and ``batch_ends``); sums and weights are in checkpoints.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 2 forwards and backwards; with
    ``form="pgd"`` 10 and 10, then 1.

    Args:
        num_classes: number of classes.
        beta: weight of the divergence.
        warmup: epochs with equal weights, at least 1.
        strength: how far the weights differ; 1 for CIFAR-10, 1.5 for CIFAR-100 and STL-10 in the paper.
        min_weight: smallest weight of a class.
        form: ``"trades"``, or ``"pgd"``: only the weighted cross entropy of attacked images.
        attack: finds the attacked images, with a budget per sample; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=0.031, step_size=0.007, steps=10, loss="kl", random_start="normal")``, for PGD with ``"ce"``.
        forwards: ``"separate"``: attacked, then clean; ``"joint"``: both in one batch, which matters for BatchNorm.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``, for which the weight is a mean.

    Raises:
        ValueError: a number out of range, an unknown value of ``form`` or ``forwards``, or an attack that has one
            budget for all samples.

    References:
        Lee et al., DAFA: Distance-Aware Fair Adversarial Training, arXiv 2401.12532. Sums take the place of the
        predictions of all samples, with the same result. Their PGD form moves twice per step, once with the class's
        budget and once with the plain one; here it moves once.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = DAFA(num_classes=3, warmup=1, attack=PGD(eps=0.1, steps=2, loss="kl"))
        >>> for epoch in range(2):
        ...     objective.epoch_starts(epoch, max_epochs=2)
        ...     prepared = objective.prepare(model, torch.rand(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]))
        ...     objective.batch_ends(objective(model, prepared), total=lambda tensor: tensor)
        >>> round(float(objective.weights.sum()), 4)
        3.0
    """

    sums: Tensor
    counts: Tensor
    weights: Tensor
    watched_epoch: Tensor
    last_epoch: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        beta: float = 6.0,
        warmup: int = 70,
        strength: float = 1.0,
        min_weight: float = 0.01,
        form: Form = "trades",
        attack: Attack | None = None,
        forwards: Literal["separate", "joint"] = "separate",
    ) -> None:
        check_choice("form", form, ("trades", "pgd"))
        loss: Literal["ce", "kl"] = "ce" if form == "pgd" else "kl"
        super().__init__(
            PGD(eps=0.031, step_size=0.007, steps=10, loss=loss, random_start="normal") if attack is None else attack
        )
        check_integer("num_classes", num_classes, 2)
        check_integer("warmup", warmup, 1)
        check_choice("forwards", forwards, ("separate", "joint"))
        check_non_negative("beta", beta)
        check_non_negative("strength", strength)
        check_positive("min_weight", min_weight)
        if not self.attack.scales:
            raise ValueError(
                f"DAFA gives each sample a budget of its own, which {type(self.attack).__name__} cannot; use PGD."
            )
        self.num_classes, self.warmup = num_classes, warmup
        self.beta, self.strength, self.min_weight = beta, strength, min_weight
        self.form, self.forwards = form, forwards
        self._watching = self._active = False
        self.register_buffer("sums", torch.zeros(num_classes, num_classes))
        self.register_buffer("counts", torch.zeros(num_classes))
        self.register_buffer("weights", torch.ones(num_classes))
        self.register_buffer("watched_epoch", torch.tensor(-1))
        self.register_buffer("last_epoch", torch.tensor(-1))

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        watched = int(self.watched_epoch)
        if int(self.last_epoch) > epoch:  # training begins anew
            self.sums.zero_()
            self.counts.zero_()
            self.weights.fill_(1)
            watched = -1
        self.last_epoch.fill_(epoch)
        if watched < 0 and epoch >= self.warmup - 1:
            watched = epoch
        self.watched_epoch.fill_(watched)
        self._watching = epoch == watched
        self._active = 0 <= watched < epoch
        if self._active:
            self.weights.copy_(dafa_weights(self.sums, self.counts, self.strength, min_weight=self.min_weight))

    @override
    def batch_ends(self, output: ObjectiveOutput, total: Total) -> None:
        if self._watching:
            assert isinstance(output, _Output), "made by forward"
            assert output.sums is not None, "made by forward"
            # summed over processes at once: a checkpoint in the middle of the epoch then holds all of it
            sums, counts = output.sums
            both = total(torch.cat([sums, counts.unsqueeze(1)], 1)).to(self.sums)
            self.sums += both[:, :-1]
            self.counts += both[:, -1]

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        scale = _of_label(y, self.weights, self.weights) if self._active else None
        return Prepared(x, y, self.current_attack(model, x, y, generator=generator, scale=scale))

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        logits, adv = self._logits(model, prepared)
        if adv.shape[1] != self.num_classes:
            raise ValueError(f"Expected logits of {self.num_classes} classes (`num_classes`) but got {adv.shape[1]}.")
        losses = _weighted(logits, prepared.y, self.weights)
        logs = {"smallest_weight": self.weights.min(), "largest_weight": self.weights.max()}
        if self.form == "trades":
            robust = divergences(full_precision(logits), full_precision(adv))
            logs |= {"natural": losses.detach().mean(), "robust": robust.detach().mean()}
            losses = losses + self.beta * robust
        return _Output(losses.mean(), logits, logs, losses, dafa_sums(adv, prepared.y) if self._watching else None)

    def _logits(self, model: Model, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Logits that the label is compared with, and those of the attacked images."""
        if self.forwards == "joint" and self.form == "trades":
            return self.clean_and_attacked(model, prepared, joint=True)
        assert prepared.x_adv is not None, "made by prepare"
        adv = model(prepared.x_adv)
        return adv if self.form == "pgd" else model(prepared.x), adv

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * (1 if self.form == "pgd" else 2)

    @override
    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, beta={self.beta}, warmup={self.warmup}, strength={self.strength}, "
            f"form={self.form!r}, attack={self.attack!r}, forwards={self.forwards!r}"
        )
