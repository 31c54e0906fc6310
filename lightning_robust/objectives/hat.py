# SPDX-License-Identifier: Apache-2.0
"""HAT: TRADES with helper examples beyond the attacked images, labelled by a standard model."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.distillation import Source
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import divergences

__all__ = ["HAT", "hat_loss"]

_TEACHER = "standard model"


def hat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    helper_logits: Tensor,
    target: Tensor,
    helper_target: Tensor,
    beta: float = 2.5,
    gamma: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""TRADES plus ``gamma`` times the cross entropy of helper examples.

    .. math:: \frac1B \sum_i \mathrm{CE}(z_i, y_i) + \beta\, \mathrm{KL}(p_i \,\|\, q_i)
              + \gamma\, \mathrm{CE}(h_i, \tilde y_i)

    with :math:`p` and :math:`q` the softmax of clean and attacked logits; gradients flow through all three logits.

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        helper_logits: ``[B, C]`` of the helper examples.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        helper_target: classes ``[B]`` of the helper examples.
        beta: weight of the divergence.
        gamma: weight of the helper examples.

    Returns:
        The loss, and its cross-entropy, divergence and helper parts (before their weights).

    Example:
        >>> zeros, zero = torch.zeros(1, 2), torch.tensor([0])
        >>> hat_loss(zeros, zeros, zeros, zero, zero)
        (tensor(1.0397), tensor(0.6931), tensor(0.), tensor(0.6931))
    """
    natural, robust, helper = _parts(clean_logits, adv_logits, helper_logits, target, helper_target)
    loss = natural.mean() + beta * robust.mean() + gamma * helper.mean()
    return loss, natural.mean(), robust.mean(), helper.mean()


def _parts(
    clean: Tensor, adv: Tensor, helper: Tensor, target: Tensor, helper_target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses of each sample."""
    natural = cross_entropy(clean, target, reduction="none")
    robust = divergences(full_precision(clean), full_precision(adv))
    return natural, robust, cross_entropy(helper, helper_target, reduction="none")


class HAT(TaughtObjective):
    r"""Helper-based adversarial training: TRADES that also looks past the attacked images.

    .. math:: \mathrm{CE}(f(x), y) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big)
              + \gamma\, \mathrm{CE}\big(f(x + h\,(x' - x)),\, \arg\max f_{std}(x')\big)

    Adversarial training makes margins larger than it has to. A helper example lies ``h`` times as far as the attacked
    image, outside the budget (and the pixels: it is not clipped), and gets the label that a network without adversarial
    training gives the attacked image. That costs less clean accuracy than TRADES.

    The standard model is frozen and lies outside the module tree: no optimizer, weight average or checkpoint holds it
    (a checkpoint has its fingerprint, and training refuses to resume with another one). It sees the same images as the
    model. A file is read when a fit is set up; evaluating needs none.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 3 forwards and backwards, and one
    forward of the standard model.

    Args:
        teacher: the standard model: a network, which is copied; the path of a file with weights, such as a checkpoint
            of ``ImageClassifier``; the name of a timm model; or one of these with options, as a
            :class:`~lightning_robust.distillation.TeacherSource`.
        beta: weight of the divergence; 2.5 in the paper.
        gamma: weight of the helper examples; 0.5 in the paper.
        distance: how far ``h`` the helper examples lie; 2 in the paper.
        attack: finds the attacked images; when ``None``
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="normal")``.
        forwards: ``"separate"``: clean, attacked, helper; ``"joint"``: all in one batch, which matters for BatchNorm.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative number or an unknown value of ``forwards``; in the first step, for a standard model that
            cannot be built, that has another number of classes, or that is another one than in the checkpoint.
        FileNotFoundError: in the first step, if there is no such file.

    References:
        Rade and Moosavi-Dezfooli, Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off,
        ICLR 2022. The same numbers as their ``hat_loss``, whose own defaults are h 3.5, beta 1 and gamma 1.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = HAT(torch.nn.Linear(4, 3))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['helper', 'natural', 'robust']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        beta: float = 2.5,
        gamma: float = 0.5,
        distance: float = 2.0,
        attack: Attack | None = None,
        forwards: Literal["separate", "joint"] = "separate",
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="normal")
            if attack is None
            else attack,
            {_TEACHER: teacher},
        )
        check_non_negative("beta", beta)
        check_non_negative("gamma", gamma)
        check_non_negative("distance", distance)
        check_choice("forwards", forwards, ("separate", "joint"))
        self.beta = beta
        self.gamma = gamma
        self.distance = distance
        self.forwards = forwards

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        self.teachers.build()  # before the attack, so that a missing file is refused at once
        x_adv = self.current_attack(model, x, y, generator=generator)
        helper = torch.lerp(full_precision(x.detach()), full_precision(x_adv), self.distance).to(x.dtype)
        return Prepared(x, y, x_adv, {"helper": helper, "helper_logits": self.ask(_TEACHER, x_adv)})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        images = [prepared.x, prepared.x_adv, prepared.extra["helper"]]
        if self.forwards == "joint":
            clean, adv, helped = model(torch.cat(images)).chunk(3)
        else:
            clean, adv, helped = (model(each) for each in images)
        standard = prepared.extra["helper_logits"]
        self.check_classes(_TEACHER, standard, helped)
        natural, robust, helper = _parts(clean, adv, helped, prepared.y, standard.argmax(1))
        samples = natural + self.beta * robust + self.gamma * helper
        parts = {"natural": natural, "robust": robust, "helper": helper}
        logs = {name: values.detach().mean() for name, values in parts.items()}
        return ObjectiveOutput(samples.mean(), clean, logs, samples)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 3

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.teachers!r}, beta={self.beta}, gamma={self.gamma}, distance={self.distance}, "
            f"attack={self.attack!r}, forwards={self.forwards!r}"
        )
