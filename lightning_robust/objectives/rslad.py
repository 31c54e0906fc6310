# SPDX-License-Identifier: Apache-2.0
"""RSLAD: the soft labels of a robust teacher in place of the labels, in the loss and in the attack."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_non_negative, check_positive
from lightning_robust.distillation import Source
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import KLReduction, check_compares, kl_scale, teacher_divergences

__all__ = ["RSLAD", "rslad_loss"]


def rslad_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    *,
    adv_weight: float = 5 / 6,
    clean_weight: float = 1 / 6,
    reduction: KLReduction = "elementmean",
    loss_factor: float = 1.0,
    eps_log: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Divergences of the attacked and of the clean student from what the teacher says about the clean images.

    .. math:: w'\, \mathrm{KL}(q \,\|\, p') + w\, \mathrm{KL}(q \,\|\, p), \qquad
              \mathrm{KL}(q \,\|\, p) = \sum_c q_c \big( \log(q_c + \epsilon) - \log p_c \big)

    Args:
        clean_logits: ``[B, C]`` of the student on the clean images.
        adv_logits: ``[B, C]`` of the student on the attacked images.
        teacher_logits: ``[B, C]`` of the teacher on the clean images; no gradient flows to them.
        adv_weight: :math:`w'`.
        clean_weight: :math:`w`.
        reduction: ``"elementmean"``: divided by the number of classes too, as published; or ``"batchmean"``.
        loss_factor: multiplies both.
        eps_log: added inside the logarithm of the teacher, which shifts the value, never the gradient.

    Returns:
        The loss, and the divergences of the attacked and of the clean student, before their weights.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> rslad_loss(zeros, zeros, torch.tensor([[2.0, 0.0]]), reduction="batchmean", eps_log=0.0)
        (tensor(0.3278), tensor(0.3278), tensor(0.3278))
    """
    scale = loss_factor * kl_scale(reduction, adv_logits)
    robust = scale * teacher_divergences(adv_logits, teacher_logits, eps_log=eps_log).mean()
    natural = scale * teacher_divergences(clean_logits, teacher_logits, eps_log=eps_log).mean()
    return adv_weight * robust + clean_weight * natural, robust, natural


class RSLAD(TaughtObjective):
    r"""Robust soft label adversarial distillation.

    .. math:: \tfrac56\, \mathrm{KL}\big(t(x) \,\|\, z(x')\big) + \tfrac16\, \mathrm{KL}\big(t(x) \,\|\, z(x)\big),
              \qquad x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{KL}\big(t(x) \,\|\, z(x')\big)

    What a robust teacher says about the clean image is the target everywhere, in the attack too; the labels are not
    used. The student answers for the attacked images first, then for the clean ones.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 2 forwards and backwards, and one
    forward of the teacher, none with a :class:`~lightning_robust.distillation.TeacherCache`: the teacher never sees an
    attacked image.

    Args:
        teacher: a robust one: a network, a file, a timm name, a :class:`~lightning_robust.distillation.TeacherSource`
            or a cache.
        adv_weight: weight of the attacked images.
        clean_weight: weight of the clean images.
        reduction: ``"elementmean"``: divergences are divided by the number of classes too, as published;
            ``"batchmean"``: they are not.
        loss_factor: multiplies the loss; published are 1 for CIFAR-10 and 10 for CIFAR-100, which is 0.1 with
            "batchmean" for both.
        eps_log: added inside the logarithm of the teacher, which shifts the value, never the gradient; 1e-5 in the
            authors' code.
        attack: finds the attacked images, away from the teacher's answer; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="normal")``. Others need such a loss
            too.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``, which nothing but the attack's bookkeeping looks at.

    Raises:
        ValueError: a negative number, an unknown ``reduction``, or an attack whose loss compares with no prediction; in
            training, a teacher of other classes.

    References:
        Zi et al., Revisiting Adversarial Robustness Distillation, arXiv:2108.07969. The same numbers as their code,
        which averages over classes; for CIFAR-100 it runs the teacher in half precision
        (``TeacherSource(..., dtype="float16")``).

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import RSLAD
        >>> model, objective = torch.nn.Linear(4, 3), RSLAD(torch.nn.Linear(4, 3))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['natural', 'robust']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        adv_weight: float = 5 / 6,
        clean_weight: float = 1 / 6,
        reduction: KLReduction = "elementmean",
        loss_factor: float = 1.0,
        eps_log: float = 1e-5,
        attack: Attack | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="normal")
            if attack is None
            else attack,
            {"teacher": teacher},
            cacheable=["teacher"],
        )
        check_compares(type(self).__name__, self.attack)
        for name, value in {"adv_weight": adv_weight, "clean_weight": clean_weight, "eps_log": eps_log}.items():
            check_non_negative(name, value)
        check_positive("loss_factor", loss_factor)
        check_choice("reduction", reduction, ("batchmean", "elementmean"))
        self.adv_weight, self.clean_weight = adv_weight, clean_weight
        self.reduction, self.loss_factor, self.eps_log = reduction, loss_factor, eps_log

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        teacher = self.ask("teacher", x)
        x_adv = self.current_attack(model, x, y, generator=generator, against=teacher)
        return Prepared(x, y, x_adv, {"teacher": teacher})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        adv, clean = model(prepared.x_adv), model(prepared.x)
        teacher = prepared.extra["teacher"]
        self.check_classes("teacher", teacher, adv)
        scale = self.loss_factor * kl_scale(self.reduction, adv)
        robust, natural = (
            scale * teacher_divergences(logits, teacher, eps_log=self.eps_log) for logits in (adv, clean)
        )
        samples = self.adv_weight * robust + self.clean_weight * natural
        logs = {"robust": robust.detach().mean(), "natural": natural.detach().mean()}
        return ObjectiveOutput(samples.mean(), clean, logs, samples)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes - 0.5 + inner * 2  # the attack needs no clean prediction of the student

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.teachers!r}, adv_weight={self.adv_weight}, clean_weight={self.clean_weight}, "
            f"reduction={self.reduction!r}, loss_factor={self.loss_factor}, eps_log={self.eps_log}, "
            f"attack={self.attack!r}"
        )
