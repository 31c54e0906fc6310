# SPDX-License-Identifier: Apache-2.0
"""What a student cannot learn from, whatever method asks the teacher."""

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_robust.distillation import DistillationLoss, Source, Teacher, TeacherBank, TeacherCache

__all__ = [
    "bank_for",
    "banks_of",
    "check_cached_data",
    "refuse_changed_inputs",
    "refuse_different_processes",
    "refuse_other_shape",
    "warn_of_smoothed_teachers",
]


def bank_for(loss: DistillationLoss, teacher: Source | None, name: str) -> TeacherBank:
    """Return a bank with the teacher, or none for a loss that needs none.

    Args:
        loss: The loss.
        teacher: What was given as teacher.
        name: What messages call it.

    Raises:
        ValueError: The loss asks what the teacher cannot answer.
    """
    who, asked = type(loss).__name__, getattr(loss, "needs_teacher", True)
    if asked and teacher is None:
        raise ValueError(f"{who} compares the student with a teacher but `teacher` is None; give one.")
    if not asked and teacher is not None:
        raise ValueError(f"{who} asks no teacher, so {_short(teacher)} would be ignored; give `teacher` = None.")
    if teacher is None:
        return TeacherBank({})
    if isinstance(teacher, TeacherCache) and getattr(loss, "teacher_layers", None):
        raise ValueError(f"{who} compares features, which a TeacherCache does not hold; give the network itself.")
    return TeacherBank({name: teacher}, cacheable=[name])


def banks_of(objective: nn.Module) -> list[TeacherBank]:
    """The teachers of an objective, and of those inside of it.

    Args:
        objective: The objective.
    """
    return [value for part in objective.modules() for value in vars(part).values() if isinstance(value, TeacherBank)]


def warn_of_smoothed_teachers(bank: TeacherBank) -> None:
    """Say that teachers trained with label smoothing teach little.

    Args:
        bank: The teachers.
    """
    for name in bank:
        teacher = bank.answers(name)
        if isinstance(teacher, Teacher) and teacher.label_smoothing > 0:
            rank_zero_warn(
                f"The {name} {teacher.source} was trained with label smoothing ({teacher.label_smoothing:g}), which "
                "erases what it knows about the likeness of classes: a student usually learns less from it than from a "
                "teacher trained without (arXiv:1906.02629)."
            )


def refuse_different_processes(trainer: L.Trainer, bank: TeacherBank) -> None:
    """Refuse teachers that are not the same in every process.

    Args:
        trainer: The Trainer.
        bank: The teachers.

    Raises:
        ValueError: A teacher differs.
    """
    for name in bank:
        manifest = bank.answers(name).manifest()
        first: str = trainer.strategy.broadcast(manifest["fingerprint"])
        if first != manifest["fingerprint"]:
            raise ValueError(
                f"The {name} {manifest['source']} differs between processes (fingerprint {first} in the first, "
                f"{manifest['fingerprint']} in process {trainer.global_rank}); load it from a file, or seed before it "
                "is built."
            )


def check_cached_data(trainer: L.Trainer, bank: TeacherBank) -> None:
    """Refuse a cache of answers about other data than the training set; once the loader exists.

    Args:
        trainer: The Trainer.
        bank: The teachers.

    Raises:
        ValueError: The data differ.
    """
    for name in bank:
        answers = bank.answers(name)
        if isinstance(answers, TeacherCache):
            for loader in tree_leaves(trainer.train_dataloader):
                answers.check_dataset(loader.dataset)


def refuse_changed_inputs(bank: TeacherBank, x: Tensor, loaded: Tensor) -> None:
    """Refuse to ask a cache about images that are not those that were loaded.

    Args:
        bank: The teachers.
        x: What they would see.
        loaded: What the loader gave.

    Raises:
        ValueError: They differ.
    """
    if x is loaded or (x.shape == loaded.shape and torch.equal(x, loaded)):
        return
    for name in bank:
        if isinstance(bank.answers(name), TeacherCache):
            raise ValueError(
                f"The {name} is a TeacherCache, which knows the images as they were loaded, but another callback "
                "changes them first (mixing, say); leave that out or let the teacher see the loaded ones "
                "(`teacher_sees` = 'loaded'), or give the network itself."
            )


def refuse_other_shape(bank: TeacherBank, name: str, student: Tensor, teacher: Tensor, *, same_classes: bool) -> None:
    """Refuse logits of a teacher that do not fit the student's.

    Args:
        bank: The teachers.
        name: Which of them answered.
        student: Logits of the student.
        teacher: Logits of the teacher.
        same_classes: Whether the numbers of classes have to be the same.

    Raises:
        ValueError: They do not fit.
    """
    samples = student.shape[:1] + student.shape[2:] == teacher.shape[:1] + teacher.shape[2:]
    if student.shape == teacher.shape or (samples and not same_classes):
        return
    if samples:
        raise ValueError(
            f"The {name} {bank.answers(name).manifest()['source']} has {teacher.shape[1]} classes but the student has "
            f"{student.shape[1]}; take a teacher for the student's classes, or map them with "
            "TeacherSource(classes=...)."
        )
    raise ValueError(
        f"The student's logits have shape {tuple(student.shape)} but those of the {name} {tuple(teacher.shape)}; show "
        "both the same samples (`teacher_sees`), or name the right logits (`logits_from`)."
    )


def _short(teacher: Source) -> str:
    return type(teacher).__name__ if isinstance(teacher, nn.Module) else repr(teacher)
