# SPDX-License-Identifier: Apache-2.0
"""Objectives that learn from frozen teachers."""

from collections.abc import Collection, Mapping

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import Attack
from lightning_robust.distillation import Source, TeacherBank
from lightning_robust.objectives.base import AttackedObjective, Objective

__all__ = ["Taught", "TaughtObjective"]


class Taught(Objective):
    """An objective with frozen teachers, which no checkpoint, optimizer or weight average holds; stands before its kin.

    A checkpoint has the teachers' fingerprints, and training refuses to resume with others.
    """

    #: The teachers; no module, so that their weights are nobody else's.
    teachers: TeacherBank

    @property
    @override
    def needs_index(self) -> bool:
        return self.teachers.needs_index or super().needs_index

    @override
    def ready(self, num_classes: int | None = None, in_chans: int | None = None) -> None:
        super().ready(num_classes, in_chans)
        self.teachers.build(num_classes=num_classes, in_chans=in_chans)

    def ask(self, name: str, x: Tensor, *, input_grad: bool = False) -> Tensor:
        """Logits ``[B, C]`` of a teacher.

        Args:
            name: which teacher.
            x: images; a cache is asked by the positions of the running batch instead.
            input_grad: let gradients flow to ``x``.
        """
        return self.teachers.ask(name, x, index=self.running.index, input_grad=input_grad)

    def check_classes(self, name: str, teacher_logits: Tensor, student_logits: Tensor) -> None:
        """Refuse a teacher of other classes.

        Args:
            name: which teacher.
            teacher_logits: what it answered.
            student_logits: logits of the model.

        Raises:
            ValueError: the numbers of classes differ.
        """
        if teacher_logits.shape[1:] != student_logits.shape[1:]:
            raise ValueError(
                f"The {name} of {type(self).__name__} has {teacher_logits.shape[1]} classes but the model has "
                f"{student_logits.shape[1]}; take a teacher for the model's classes, or map them with "
                "TeacherSource(classes=...)."
            )

    @override
    def get_extra_state(self) -> dict[str, dict[str, str]]:
        """The fingerprints of the teachers; a checkpoint holds no more of them."""
        return self.teachers.state_dict()

    @override
    def set_extra_state(self, state: dict[str, dict[str, str]]) -> None:
        """Remember the fingerprints, which are compared when training goes on."""
        self.teachers.load_state_dict(state)


class TaughtObjective(Taught, AttackedObjective):
    """An objective with an attack and frozen teachers.

    Args:
        attack: finds the attacked images.
        teachers: what each teacher is built from, by the name that messages use.
        cacheable: names of the teachers that only see the clean images of the batch.
    """

    def __init__(self, attack: Attack, teachers: Mapping[str, Source], *, cacheable: Collection[str] = ()) -> None:
        super().__init__(attack)
        self.teachers = TeacherBank(teachers, cacheable=cacheable)
