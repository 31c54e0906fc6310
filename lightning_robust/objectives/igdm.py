# SPDX-License-Identifier: Apache-2.0
"""IGDM: match the teacher's input gradient along the attack, on top of any attacked objective."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.checks import check_choice, check_integer, check_non_negative
from lightning_robust.distillation import Source, TeacherBank
from lightning_robust.losses import full_precision
from lightning_robust.objectives.around import AroundObjective
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared
from lightning_robust.objectives.terms import teacher_divergences

__all__ = ["IGDM", "igdm_loss"]


def igdm_loss(plus_logits: Tensor, minus_logits: Tensor, teacher_plus: Tensor, teacher_minus: Tensor) -> Tensor:
    r"""Divergence between the changes of the logits of teacher and student from one side of an image to the other.

    .. math:: \mathrm{KL}\big(\mathrm{softmax}(t^+ - t^-) \,\|\, \mathrm{softmax}(z^+ - z^-)\big)

    Args:
        plus_logits: ``[B, C]`` of the student on the attacked images :math:`x + \delta`.
        minus_logits: ``[B, C]`` of the student on their mirror images :math:`x - \delta`.
        teacher_plus: ``[B, C]`` of the teacher on the attacked images; no gradient flows to them.
        teacher_minus: ``[B, C]`` of the teacher on their mirror images.

    Shape:
        Returns ``[B]``.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> igdm_loss(zeros, zeros, torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
        tensor([0.3278])
    """
    change = full_precision(plus_logits) - full_precision(minus_logits)
    return teacher_divergences(change, full_precision(teacher_plus) - full_precision(teacher_minus))


def mirrored(x: Tensor, x_adv: Tensor) -> Tensor:
    """The images on the other side, ``x - (x_adv - x)``, which may leave the pixels.

    Args:
        x: clean images.
        x_adv: attacked images.
    """
    return (2 * full_precision(x.detach()) - full_precision(x_adv)).to(x_adv.dtype)


class Ramp:
    """A weight that grows in proportion to the epochs.

    Args:
        owner: whose weight it is, for the message.
        alpha: weight in the last epoch.
        kind: ``"linear"``, or ``"none"``: ``alpha`` all the time.
        epochs: number of epochs, after which the weight stays; that of the run when ``None``.

    Raises:
        ValueError: a number out of range or an unknown ``kind``.
    """

    def __init__(self, owner: str, alpha: float, *, kind: str, epochs: int | None) -> None:
        check_non_negative("alpha", alpha)
        check_choice("ramp", kind, ("linear", "none"))
        if epochs is not None:
            check_integer("epochs", epochs, 1)
        self.owner, self.alpha, self.kind, self.epochs = owner, alpha, kind, epochs
        #: The weight in the running epoch.
        self.weight = alpha if kind == "none" else 0.0

    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        """Find the weight of an epoch, counted from 0.

        Raises:
            ValueError: the number of epochs is unknown.
        """
        if self.kind == "none":
            return
        epochs = max_epochs if self.epochs is None else self.epochs
        if epochs < 1:
            raise ValueError(f"A weight of {self.owner} grows over the epochs, of unknown number; set `epochs`.")
        self.weight = self.alpha * min((epoch + 1) / epochs, 1.0)

    def __repr__(self) -> str:
        return f"alpha={self.alpha}, ramp={self.kind!r}, epochs={self.epochs}"


class IGDM(AroundObjective):
    r"""Indirect gradient distillation: an objective that also learns how the teacher's logits change with the attack.

    .. math:: L + \alpha\, \frac{e}{E}\,
              \mathrm{KL}\big(t(x + \delta) - t(x - \delta) \,\|\, z(x + \delta) - z(x - \delta)\big),
              \qquad \delta = x' - x

    The difference of the logits on both sides of the image is about :math:`2 \delta^\top \nabla_x`, so the student
    takes over the teacher's input gradient without a second derivative. The weight grows over the epochs
    :math:`e = 1, \ldots, E`. The mirror image is not clipped to the pixels.

    Cost: that of the objective, one forward and backward on the mirror images, and 2 forwards of the teacher. The pass
    of the attacked images is the objective's own, unless it runs them in one batch with others.

    Args:
        objective: the loss to add to, which has to attack: :class:`AdaAD` as published, another one of this room, or
            :class:`TRADES`.
        alpha: weight of the term in the last epoch; 1 for CIFAR-10, 10 for CIFAR-100.
        teacher: a network, a file, a timm name or a :class:`~lightning_robust.distillation.TeacherSource`; when
            ``None`` the objective's own, if it has one.
        ramp: ``"linear"``: the weight grows in proportion to the epochs; ``"none"``: it does not.
        epochs: epochs :math:`E` of the ramp, after which the weight stays; those of the run when ``None``.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        TypeError: ``objective`` is none.
        ValueError: a number out of range, an unknown ``ramp``, an objective that does not attack, none or several
            teachers to choose from, or a cache of one; when an epoch starts, if nobody knows how many there are; in
            training, a teacher of other classes.

    References:
        Lee et al., Indirect Gradient Matching for Adversarial Robust Distillation, arXiv:2312.03286. Their script
        divides the epoch by 200 whatever the length of the run, and calls its attack with radius and step exchanged
        (2/255 and 8/255).

    Example:
        >>> from lightning_robust.objectives import IGDM, AdaAD
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = IGDM(objective=AdaAD(torch.nn.Linear(4, 3)), alpha=1.0)
        >>> objective.epoch_starts(epoch=0, max_epochs=200)
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['igdm', 'natural', 'robust']
    """

    def __init__(
        self,
        *,
        objective: Objective,
        alpha: float = 1.0,
        teacher: Source | None = None,
        ramp: Literal["linear", "none"] = "linear",
        epochs: int | None = None,
    ) -> None:
        super().__init__(objective)
        self.ramp = Ramp("IGDM", alpha, kind=ramp, epochs=epochs)
        if not objective.attacks:
            raise ValueError(
                f"IGDM compares both sides of an attack but {type(objective).__name__} does not attack; give AdaAD."
            )
        self._own = TeacherBank({"teacher": teacher}) if teacher is not None else None
        if teacher is None:
            _only_teacher(objective)

    @property
    def teachers(self) -> TeacherBank:
        """Where the teacher is."""
        return self.objective.teachers if self._own is None else self._own  # type: ignore[return-value]

    @override
    def ready(self, num_classes: int | None = None, in_chans: int | None = None) -> None:
        super().ready(num_classes, in_chans)
        self.teachers.build(num_classes=num_classes, in_chans=in_chans)

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        self.ramp.epoch_starts(epoch, max_epochs)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        teacher = self.teachers.teacher(next(iter(self.teachers)))
        prepared = super().prepare(model, x, y, generator=generator)
        assert prepared.x_adv is not None, "it attacks"
        mirror = mirrored(prepared.x, prepared.x_adv)
        more = {_MIRROR: mirror, _PLUS: teacher(prepared.x_adv), _MINUS: teacher(mirror)}
        return replace(prepared, extra={**prepared.extra, **more})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        seen = _Seen(model, prepared.x_adv)
        output: ObjectiveOutput = self.objective(seen, prepared)
        plus = model(prepared.x_adv) if seen.answer is None else seen.answer
        minus = model(prepared.extra[_MIRROR])
        teacher = prepared.extra[_PLUS]
        if teacher.shape != plus.shape:
            raise ValueError(
                f"The teacher of IGDM has {teacher.shape[1]} classes but the model has {plus.shape[1]}; take a teacher "
                "for the model's classes, or map them with TeacherSource(classes=...)."
            )
        samples = igdm_loss(plus, minus, teacher, prepared.extra[_MINUS])
        return replace(
            output,
            loss=output.loss + self.ramp.weight * samples.mean(),
            logs={**output.logs, "igdm": samples.detach().mean()},
            sample_losses=None if output.sample_losses is None else output.sample_losses + self.ramp.weight * samples,
        )

    @override
    def passes(self, inner: float) -> float:
        return super().passes(inner) + inner

    @override
    def get_extra_state(self) -> dict[str, dict[str, str]]:
        """The fingerprint of a teacher of its own; a checkpoint holds no more of it."""
        return {} if self._own is None else self._own.state_dict()

    @override
    def set_extra_state(self, state: dict[str, dict[str, str]]) -> None:
        """Remember the fingerprint, which is compared when training goes on."""
        if self._own is not None:
            self._own.load_state_dict(state)

    @override
    def extra_repr(self) -> str:
        return repr(self.ramp)


_MIRROR, _PLUS, _MINUS = "igdm_mirror", "igdm_teacher_plus", "igdm_teacher_minus"


class _Seen:
    """A model that keeps what it answered about certain images."""

    def __init__(self, model: Model, images: Tensor) -> None:
        self._network, self.module = model, unwrap(model)[1]
        self._images = images
        self.answer: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._network(x)
        if x is self._images:
            self.answer = logits
        return logits


def _only_teacher(objective: Objective) -> None:
    teachers = getattr(objective, "teachers", None)
    names = list(teachers) if isinstance(teachers, TeacherBank) else []
    if not isinstance(teachers, TeacherBank) or len(names) != 1:
        raise ValueError(
            f"IGDM takes the teacher of {type(objective).__name__} but it has {' and '.join(names) or 'none'}; give "
            "the one to match as `teacher`."
        )
    if teachers.needs_index:
        raise ValueError(
            f"IGDM asks the teacher of {type(objective).__name__} about attacked images, which a TeacherCache cannot "
            "answer; give the network itself as `teacher`."
        )
