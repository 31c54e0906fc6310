# SPDX-License-Identifier: Apache-2.0
"""ARD: the student imitates under attack what the teacher says about the clean image."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range, check_non_negative, check_positive
from lightning_robust.distillation import Source
from lightning_robust.losses import cross_entropy
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import KLReduction, kl_scale, teacher_divergences

__all__ = ["ARD", "ard_loss"]


def ard_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float = 30.0,
    reduction: KLReduction = "elementmean",
    loss_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Divergence of the attacked student from the teacher, and cross entropy of the clean one.

    .. math:: \alpha\,T^2\, \mathrm{KL}\big(\mathrm{softmax}(t(x)/T) \,\|\, \mathrm{softmax}(z(x')/T)\big)
              + (1 - \alpha)\, \mathrm{CE}(z(x), y)

    Args:
        clean_logits: ``[B, C]`` of the student on the clean images.
        adv_logits: ``[B, C]`` of the student on the attacked images.
        teacher_logits: ``[B, C]`` of the teacher on the clean images; no gradient flows to them.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        alpha: weight of the teacher.
        temperature: :math:`T` of both.
        reduction: ``"elementmean"``: divided by the number of classes too, as published; or ``"batchmean"``.
        loss_factor: multiplies the divergence.

    Returns:
        The loss, and its divergence (with :math:`T^2` and ``loss_factor``) and cross entropy, before ``alpha``.

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1, 2)
        >>> ard_loss(zeros, zeros, torch.tensor([[2.0, 0.0]]), torch.tensor([0]), temperature=1.0)
        (tensor(0.1639), tensor(0.1639), tensor(0.6931))
    """
    distilled, natural = _parts(clean_logits, adv_logits, teacher_logits, target, temperature, reduction, loss_factor)
    return alpha * distilled.mean() + (1 - alpha) * natural.mean(), distilled.mean(), natural.mean()


def _parts(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    reduction: KLReduction,
    loss_factor: float,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy of each sample."""
    scale = loss_factor * temperature**2 * kl_scale(reduction, adv)
    distilled = scale * teacher_divergences(adv, teacher, temperature=temperature)
    return distilled, cross_entropy(clean, target, reduction="none")


class ARD(TaughtObjective):
    r"""Adversarially robust distillation.

    .. math:: \alpha\,T^2\, \mathrm{KL}\big(t(x)/T \,\|\, z(x')/T\big) + (1 - \alpha)\, \mathrm{CE}(z(x), y), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{CE}(z(x'), y)

    The teacher, which should be robust itself, only sees the clean images. The student answers for the attacked images,
    then for the clean ones, whose pass moves the BatchNorm statistics (and gives the metrics) also with the default
    ``alpha=1``, where the labels steer nothing but the attack.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 2 forwards and backwards (one
    backward less with ``alpha=1``), and one forward of the teacher, none with a
    :class:`~lightning_robust.distillation.TeacherCache`.

    Args:
        teacher: a network, a file, a timm name, a :class:`~lightning_robust.distillation.TeacherSource` or a cache.
        alpha: weight of the teacher against the labels.
        temperature: :math:`T` of teacher and student.
        reduction: ``"elementmean"``: the divergence is divided by the number of classes too, as published;
            ``"batchmean"``: it is not.
        loss_factor: multiplies the divergence.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, mode="train")``, whose passes move the BatchNorm statistics.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: ``alpha`` outside [0, 1], a temperature that is not positive, a negative ``loss_factor`` or an
            unknown ``reduction``; in training, a teacher of other classes.

    References:
        Goldblum et al., Adversarially Robust Distillation, arXiv:1905.09747. Their code relies on the default reduction
        of ``KLDivLoss``, which averages over classes; their random start is not clipped to the pixels before the first
        step, this one is. Their schedule multiplies the first learning rate at both milestones, so its second decay
        changes nothing.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import ARD
        >>> model, objective = torch.nn.Linear(4, 3), ARD(torch.nn.Linear(4, 3), attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['distilled', 'natural']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        alpha: float = 1.0,
        temperature: float = 30.0,
        reduction: KLReduction = "elementmean",
        loss_factor: float = 1.0,
        attack: Attack | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, mode="train") if attack is None else attack,
            {"teacher": teacher},
            cacheable=["teacher"],
        )
        check_in_range("alpha", alpha, 0, 1)
        check_positive("temperature", temperature)
        check_choice("reduction", reduction, ("batchmean", "elementmean"))
        check_non_negative("loss_factor", loss_factor)
        self.alpha, self.temperature, self.reduction, self.loss_factor = alpha, temperature, reduction, loss_factor

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        teacher = self.ask("teacher", x)  # before the attack, so that a missing file is refused at once
        return Prepared(x, y, self.current_attack(model, x, y, generator=generator), {"teacher": teacher})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        adv, clean = model(prepared.x_adv), model(prepared.x)
        teacher = prepared.extra["teacher"]
        self.check_classes("teacher", teacher, adv)
        distilled, natural = _parts(clean, adv, teacher, prepared.y, self.temperature, self.reduction, self.loss_factor)
        # a term of weight 0 would cost its backward pass all the same
        samples = distilled if self.alpha == 1 else self.alpha * distilled + (1 - self.alpha) * natural
        logs = {"distilled": distilled.detach().mean(), "natural": natural.detach().mean()}
        return ObjectiveOutput(samples.mean(), clean, logs, samples)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * (1.5 if self.alpha == 1 else 2)

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.teachers!r}, alpha={self.alpha}, temperature={self.temperature}, reduction={self.reduction!r}, "
            f"loss_factor={self.loss_factor}, attack={self.attack!r}"
        )
