# SPDX-License-Identifier: Apache-2.0
"""IAD: trust the teacher where it withstands the student's attacks, and the student itself elsewhere."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_in_range, check_integer, check_non_negative, check_positive
from lightning_robust.distillation import Source
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.iad_loss import iad_i_loss, iad_ii_loss, iad_trust
from lightning_robust.objectives.taught import TaughtObjective

__all__ = ["IADI", "IADII", "Introspective"]


class Introspective(TaughtObjective):
    """What the introspective objectives share: the trust in the teacher ``"teacher"``, from one epoch on.

    Args:
        attack: finds the attacked images.
        teachers: the teachers by name.
        alpha: weight of the teacher.
        beta: exponent of the trust.
        begin: first epoch, counted from 0, in which samples are trusted by degrees; fully before.
        temperature: of teachers and student.
    """

    def __init__(
        self,
        attack: Attack | None,
        teachers: Mapping[str, Source],
        *,
        alpha: float,
        beta: float,
        begin: int,
        temperature: float,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, mode="train") if attack is None else attack, teachers
        )
        check_in_range("alpha", alpha, 0, 1)
        check_non_negative("beta", beta)
        check_integer("begin", begin, 0)
        check_positive("temperature", temperature)
        self.alpha, self.beta, self.begin, self.temperature = alpha, beta, begin, temperature
        self._epoch = 0

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        self._epoch = epoch

    @abstractmethod
    def loss(
        self, clean: Tensor, adv: Tensor, prepared: Prepared, trust: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what each part adds to that of each sample."""

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        self.teachers.build()  # so that a missing file is refused before the attack
        x_adv = self.current_attack(model, x, y, generator=generator)
        return Prepared(x, y, x_adv, {"guide": self.ask("teacher", x_adv)})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv = self.student(model, prepared)
        guide = prepared.extra["guide"]
        self.check_classes("teacher", guide, adv)
        trust = iad_trust(guide, prepared.y, self.beta) if self._epoch >= self.begin else None
        loss, parts = self.loss(clean, adv, prepared, trust)
        logs = {name: values.detach().mean() for name, values in parts.items()}
        return ObjectiveOutput(loss, clean, logs, torch.stack(list(parts.values())).sum(0))

    def student(self, model: Model, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Logits of the clean and of the attacked images, whose pass comes first."""
        assert prepared.x_adv is not None, "made by prepare"
        adv = model(prepared.x_adv)
        return model(prepared.x), adv

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 2

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.teachers!r}, alpha={self.alpha}, beta={self.beta}, begin={self.begin}, "
            f"temperature={self.temperature}, attack={self.attack!r}"
        )


class IADI(Introspective):
    r"""Introspective adversarial distillation on top of ARD (IAD-I).

    .. math:: \alpha\, T^2\, \mathrm{KL}\big(t(x)/T \,\|\, z(x')/T\big)
              + \alpha\, (1 - a)\, \mathrm{KL}\big(z(x) \,\|\, z(x')\big) + (1 - \alpha)\, \mathrm{CE}(z(x), y),
              \qquad a = \mathrm{softmax}(t(x'))_y^\beta

    The student's adversarial images also fool its teacher more often the better the student gets. So besides imitating
    the teacher on the clean image, the student shall say under attack what it says itself without, the more the less
    the teacher withstands the attack (the trust ``a``, without gradient). In the first ``begin`` epochs the teacher is
    trusted fully, which is ARD.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 2 forwards and backwards, and 2
    forwards of the teacher.

    Args:
        teacher: a robust one: a network, a file, a timm name or a
            :class:`~lightning_robust.distillation.TeacherSource`.
        alpha: weight of the teacher and the student's own prediction against the labels.
        beta: exponent of the trust; small ones trust more.
        begin: first epoch, counted from 0, in which the trust is used.
        temperature: :math:`T` of teacher and student, where they are compared.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, mode="train")``, whose passes move the BatchNorm statistics.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a number out of range; in training, a teacher of other classes.

    References:
        Zhu et al., Reliable Adversarial Distillation with Unreliable Teachers, arXiv:2106.04928. As their code has it,
        gradients also flow through the clean prediction of the second term, and the first term is not multiplied by the
        trust, which the paper's formula has there. Their passes of the attacked and the clean images that are repeated
        for other terms run once here, so BatchNorm statistics move less often.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import IADI
        >>> model, objective = torch.nn.Linear(4, 3), IADI(torch.nn.Linear(4, 3), attack=PGD(eps=0.1, steps=2))
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
        temperature: float = 1.0,
        attack: Attack | None = None,
    ) -> None:
        super().__init__(attack, {"teacher": teacher}, alpha=alpha, beta=beta, begin=begin, temperature=temperature)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        teacher = self.ask("teacher", x)
        prepared = super().prepare(model, x, y, generator=generator)
        prepared.extra["teacher"] = teacher
        return prepared

    @override
    def loss(
        self, clean: Tensor, adv: Tensor, prepared: Prepared, trust: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        teacher = prepared.extra["teacher"]
        options = {"alpha": self.alpha, "temperature": self.temperature}
        return iad_i_loss(clean, adv, teacher, prepared.y, trust, **options)


class IADII(Introspective):
    r"""Introspective adversarial distillation on top of AKD2, with a naturally trained teacher beside the robust one.

    .. math:: \alpha\, T^2 \Big[ a\, \mathrm{KL}\big(t(x')/T \,\|\, z(x')/T\big)
              + (1 - a)\, \mathrm{KL}\big(z(x) \,\|\, z(x')\big) \Big]
              + \alpha_c\, T^2\, \mathrm{KL}\big(t_c(x')/T \,\|\, z(x')/T\big)
              + (1 - \alpha - \alpha_c)\, \mathrm{CE}(z(x'), y), \qquad a = \mathrm{softmax}(t(x'))_y^\beta

    Both teachers answer about the attacked images. In the first ``begin`` epochs the robust teacher is trusted fully.
    See :class:`IADI`.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 2 forwards and backwards, and one
    forward of each teacher.

    Args:
        teacher: the robust one: a network, a file, a timm name or a
            :class:`~lightning_robust.distillation.TeacherSource`.
        clean_teacher: the naturally trained one.
        alpha: weight of the robust teacher and the student's own prediction.
        clean_alpha: weight :math:`\alpha_c` of the naturally trained teacher.
        beta: exponent of the trust; small ones trust more.
        begin: first epoch, counted from 0, in which the trust is used.
        temperature: :math:`T` of teachers and student, where they are compared; its square also multiplies the
            student's divergence from itself.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, mode="train")``, whose passes move the BatchNorm statistics.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a number out of range, or weights of the teachers that add up to more than 1; in training, a teacher
            of other classes.

    References:
        Zhu et al., Reliable Adversarial Distillation with Unreliable Teachers, arXiv:2106.04928. As their code has it,
        gradients also flow through the clean prediction. The clean images also run before epoch ``begin``, where their
        code leaves them out: metrics of the training refer to them.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import IADII
        >>> model, robust, clean = (torch.nn.Linear(4, 3) for _ in range(3))
        >>> objective = IADII(robust, clean_teacher=clean, attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['distilled', 'distilled_clean', 'introspective', 'robust']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        clean_teacher: Source,
        alpha: float = 0.5,
        clean_alpha: float = 0.25,
        beta: float = 0.1,
        begin: int = 40,
        temperature: float = 1.0,
        attack: Attack | None = None,
    ) -> None:
        teachers = {"teacher": teacher, "clean teacher": clean_teacher}
        super().__init__(attack, teachers, alpha=alpha, beta=beta, begin=begin, temperature=temperature)
        check_in_range("clean_alpha", clean_alpha, 0, 1)
        if alpha + clean_alpha > 1 + 1e-9:
            raise ValueError(
                f"Expected `alpha` and `clean_alpha` to add up to at most 1 but got {alpha} and {clean_alpha}; what is "
                "left is the weight of the labels."
            )
        self.clean_alpha = clean_alpha

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        prepared = super().prepare(model, x, y, generator=generator)
        assert prepared.x_adv is not None, "made by prepare"
        prepared.extra["clean_teacher"] = self.ask("clean teacher", prepared.x_adv)
        return prepared

    @override
    def loss(
        self, clean: Tensor, adv: Tensor, prepared: Prepared, trust: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, clean_teacher = prepared.extra["guide"], prepared.extra["clean_teacher"]
        self.check_classes("clean teacher", clean_teacher, adv)
        options = {"alpha": self.alpha, "clean_alpha": self.clean_alpha, "temperature": self.temperature}
        return iad_ii_loss(clean, adv, teacher, clean_teacher, prepared.y, trust, **options)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, clean_alpha={self.clean_alpha}"
