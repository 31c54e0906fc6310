# SPDX-License-Identifier: Apache-2.0
"""AdaAD: attacks that drive student and teacher apart, with the teacher asked about each point."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range, check_positive
from lightning_robust.distillation import Source
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.iad import IADI
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import KLReduction, check_compares, kl_scale, teacher_divergences

__all__ = ["AdaAD", "AdaIAD", "adaad_loss"]


def adaad_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_clean_logits: Tensor,
    teacher_adv_logits: Tensor,
    *,
    alpha: float = 1.0,
    reduction: KLReduction = "elementmean",
    loss_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Divergences of the student from the teacher, each time on the same images.

    .. math:: \alpha\, \mathrm{KL}(q' \,\|\, p') + (1 - \alpha)\, \mathrm{KL}(q \,\|\, p)

    Args:
        clean_logits: ``[B, C]`` of the student on the clean images.
        adv_logits: ``[B, C]`` of the student on the attacked images.
        teacher_clean_logits: ``[B, C]`` of the teacher on the clean images; no gradient flows to them.
        teacher_adv_logits: ``[B, C]`` of the teacher on the attacked images; no gradient flows to them.
        alpha: weight of the attacked images.
        reduction: ``"elementmean"``: divided by the number of classes too; or ``"batchmean"``.
        loss_factor: multiplies both.

    Returns:
        The loss, and the divergences on the attacked and on the clean images, before their weights.

    Example:
        >>> zeros, teacher = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
        >>> adaad_loss(zeros, zeros, zeros, teacher, reduction="batchmean")
        (tensor(0.3278), tensor(0.3278), tensor(0.))
    """
    scale = loss_factor * kl_scale(reduction, adv_logits)
    robust = scale * teacher_divergences(adv_logits, teacher_adv_logits).mean()
    natural = scale * teacher_divergences(clean_logits, teacher_clean_logits).mean()
    return alpha * robust + (1 - alpha) * natural, robust, natural


def _attack() -> PGD:
    return PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="normal")


class AdaAD(TaughtObjective):
    r"""Adaptive adversarial distillation: the teacher takes part in the attack.

    .. math:: \alpha\, \mathrm{KL}\big(t(x') \,\|\, z(x')\big) + (1 - \alpha)\, \mathrm{KL}\big(t(x) \,\|\, z(x)\big),
              \qquad x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{KL}\big(t(x') \,\|\, z(x')\big)

    The attack looks for the point where student and teacher differ most, with the teacher asked in each of its steps
    and its gradient with respect to the image taken too; the student then learns what the teacher says there. The
    labels are not used.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards of the student and as many of the teacher, then 2
    forwards and backwards (one backward less with ``alpha=1``) and 2 forwards of the teacher. With a large teacher most
    of the time is the teacher's, and nothing of it can be stored.

    Args:
        teacher: a robust one: a network, a file, a timm name or a
            :class:`~lightning_robust.distillation.TeacherSource`.
        alpha: weight of the attacked images; with 1 the clean ones only run, for the BatchNorm statistics and metrics.
        reduction: ``"elementmean"``: divergences are divided by the number of classes too, as the authors do for
            CIFAR-10; ``"batchmean"``: they are not, as for CIFAR-100.
        loss_factor: multiplies the loss.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="normal")``; the authors' script
            defaults to twice the radius and step. Others need such a loss too, and must ask about whole images.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``, which nothing but the attack's bookkeeping looks at.

    Raises:
        ValueError: a number out of range, an unknown ``reduction``, or an attack whose loss compares with no
            prediction; in training, a teacher of other classes.

    References:
        Huang et al., Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR
        2023. The same numbers as their code, whose CIFAR-100 loss is, by another reduction, ten times the CIFAR-10 one
        in relation to its formula.

    Example:
        >>> from lightning_robust.objectives import AdaAD
        >>> model, objective = torch.nn.Linear(4, 3), AdaAD(torch.nn.Linear(4, 3))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['natural', 'robust']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        alpha: float = 1.0,
        reduction: KLReduction = "elementmean",
        loss_factor: float = 1.0,
        attack: Attack | None = None,
    ) -> None:
        super().__init__(_attack() if attack is None else attack, {"teacher": teacher})
        check_compares(type(self).__name__, self.attack)
        check_in_range("alpha", alpha, 0, 1)
        check_choice("reduction", reduction, ("batchmean", "elementmean"))
        check_positive("loss_factor", loss_factor)
        self.alpha, self.reduction, self.loss_factor = alpha, reduction, loss_factor

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        clean = self.ask("teacher", x)
        x_adv = self.current_attack(model, x, y, generator=generator, against=_moving(self))
        return Prepared(x, y, x_adv, {"teacher": clean, "teacher_adv": self.ask("teacher", x_adv)})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv = self.clean_and_attacked(model, prepared, joint=False)
        teacher = prepared.extra["teacher"]
        self.check_classes("teacher", teacher, adv)
        scale = self.loss_factor * kl_scale(self.reduction, adv)
        robust = scale * teacher_divergences(adv, prepared.extra["teacher_adv"])
        natural = scale * teacher_divergences(clean, teacher)
        # a term of weight 0 would cost its backward pass all the same
        samples = robust if self.alpha == 1 else self.alpha * robust + (1 - self.alpha) * natural
        logs = {"robust": robust.detach().mean(), "natural": natural.detach().mean()}
        return ObjectiveOutput(samples.mean(), clean, logs, samples)

    @override
    def passes(self, inner: float) -> float:
        # the attack needs no clean prediction of the student
        return self.attack.passes - 0.5 + inner * (1.5 if self.alpha == 1 else 2)

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.teachers!r}, alpha={self.alpha}, reduction={self.reduction!r}, loss_factor={self.loss_factor}, "
            f"attack={self.attack!r}"
        )


class AdaIAD(IADI):
    r"""The attack of :class:`AdaAD` with the introspective loss of :class:`IADI`.

    .. math:: \alpha\, T^2\, \mathrm{KL}\big(t(x')/T \,\|\, z(x')/T\big)
              + \alpha\, (1 - a)\, \mathrm{KL}\big(z(x) \,\|\, z(x')\big) + (1 - \alpha)\, \mathrm{CE}(z(x), y),
              \qquad a = \mathrm{softmax}(t(x'))_y^\beta

    Other than in IAD-I the teacher answers about the attacked images, and the clean ones run first.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards of the student and as many of the teacher, then 2
    forwards and backwards and one forward of the teacher.

    Args:
        teacher: a robust one: a network, a file, a timm name or a
            :class:`~lightning_robust.distillation.TeacherSource`.
        alpha: weight of the teacher and the student's own prediction against the labels.
        beta: exponent of the trust; small ones trust more.
        begin: first epoch, counted from 0, in which the trust is used.
        temperature: :math:`T` of teacher and student, where they are compared.
        attack: finds the attacked images; when ``None`` that of :class:`AdaAD`.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a number out of range, or an attack whose loss compares with no prediction; in training, a teacher
            of other classes.

    References:
        Huang et al., Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR
        2023. Their passes of the clean images that are repeated for other terms run once here.

    Example:
        >>> from lightning_robust.objectives import AdaIAD
        >>> model, objective = torch.nn.Linear(4, 3), AdaIAD(torch.nn.Linear(4, 3))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['distilled', 'introspective', 'natural']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        begin: int = 60,
        temperature: float = 30.0,
        attack: Attack | None = None,
    ) -> None:
        super().__init__(
            teacher,
            alpha=alpha,
            beta=beta,
            begin=begin,
            temperature=temperature,
            attack=_attack() if attack is None else attack,
        )
        check_compares(type(self).__name__, self.attack)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        self.teachers.build()  # so that a missing file is refused before the attack
        x_adv = self.current_attack(model, x, y, generator=generator, against=_moving(self))
        teacher = self.ask("teacher", x_adv)
        return Prepared(x, y, x_adv, {"teacher": teacher, "guide": teacher})

    @override
    def student(self, model: Model, prepared: Prepared) -> tuple[Tensor, Tensor]:
        return self.clean_and_attacked(model, prepared, joint=False)

    @override
    def passes(self, inner: float) -> float:
        return super().passes(inner) - 0.5


def _moving(objective: TaughtObjective) -> Callable[[Tensor], Tensor]:
    """The teacher as an attack asks it, gradient included."""
    return partial(objective.ask, "teacher", input_grad=True)
