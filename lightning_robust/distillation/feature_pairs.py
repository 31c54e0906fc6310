# SPDX-License-Identifier: Apache-2.0
"""Pairs of layers of student and teacher, and learnt maps between their widths."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.distillation.feature_base import (
    FeatureDistillationLoss,
    Layers,
    Widths,
    as_layers,
    as_widths,
    known,
)
from lightning_robust.losses import autocast_off, full_precision

__all__ = ["PairedFeatures"]


class PairedFeatures(FeatureDistillationLoss):
    """Sums a distance over pairs of layers, behind projectors of the student's features where they are wanted."""

    def __init__(
        self,
        student_layer: Layers = None,
        teacher_layer: Layers = None,
        *,
        projector: bool = False,
        student_width: Widths = None,
        teacher_width: Widths = None,
    ) -> None:
        mine = as_layers(student_layer)
        others = mine if teacher_layer is None else as_layers(teacher_layer)
        if len(mine) != len(others):
            raise ValueError(
                f"Expected as many layers of the teacher as of the student, but `student_layer` names {len(mine)} and "
                f"`teacher_layer` {len(others)}."
            )
        super().__init__(mine, others)
        self.projector = projector
        self._widths = (
            as_widths("student_width", student_width, len(mine)),
            as_widths("teacher_width", teacher_width, len(mine)),
        )
        self.projectors = nn.ModuleList()
        if projector and None not in [*self._widths[0], *self._widths[1]]:
            self.build(*self._widths, None)

    @override
    def build(
        self, student_widths: Sequence[int | None], teacher_widths: Sequence[int | None], num_classes: int | None
    ) -> None:
        if not self.projector or len(self.projectors):
            return
        who = type(self).__name__
        for place, layer in enumerate(self.student_layers):
            mine = self._widths[0][place] or student_widths[place]
            others = self._widths[1][place] or teacher_widths[place]
            into = known(others, "teacher_width", who, self.teacher_layers[place])
            self.projectors.append(_Projector(known(mine, "student_width", who, layer), into))

    @override
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None = None,
        *,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
    ) -> Tensor:
        count = len(self.student_layers)
        if not len(student_features) == len(teacher_features) == count:
            raise ValueError(
                f"{type(self).__name__} compares {count} pairs of features but got {len(student_features)} of the "
                f"student and {len(teacher_features)} of the teacher; pass student_features=[...] and "
                "teacher_features=[...], or train with the callback Distillation."
            )
        if self.projector and not len(self.projectors):
            raise ValueError(
                f"The projector of {type(self).__name__} is not built; set `student_width` and `teacher_width`, or "
                "train with the callback Distillation."
            )
        distances = []
        for place, (mine, others) in enumerate(zip(student_features, teacher_features, strict=True)):
            with autocast_off(mine):
                seen = self.projectors[place](mine) if self.projector else full_precision(mine)
                distances.append(self.compare(seen, full_precision(others.detach())))
        return sum(distances[1:], start=distances[0])

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance between the features of one pair of layers, a scalar.

        Args:
            student: Features of the student, ``[B, D]``, ``[B, N, D]`` or ``[B, D, H, W]``.
            teacher: Features of the teacher.
        """
        raise NotImplementedError

    def fitting(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return two features if they have one shape, and refuse others.

        Args:
            student: Features of the student.
            teacher: Features of the teacher.
        """
        if student.shape == teacher.shape:
            return student, teacher
        channels = student.shape[_channel_axis(student)], teacher.shape[_channel_axis(teacher)]
        if channels[0] != channels[1]:
            raise ValueError(
                f"The student's features have {channels[0]} channels but the teacher's {channels[1]}; "
                + ("correct `teacher_width`." if self.projector else "set `projector` to learn a map between them.")
            )
        raise ValueError(
            f"The student's features have shape {tuple(student.shape)} but the teacher's {tuple(teacher.shape)}; name "
            "layers of the same resolution."
        )


class _Projector(nn.Linear):
    """A linear map of channels: of vectors ``[B, D]``, tokens ``[B, N, D]`` or maps ``[B, D, H, W]``."""

    @override
    def forward(self, features: Tensor) -> Tensor:
        seen = features.to(self.weight.dtype)
        if seen.ndim != 4:
            return full_precision(F.linear(seen, self.weight, self.bias))
        return full_precision(F.conv2d(seen, self.weight[..., None, None], self.bias))


def _channel_axis(features: Tensor) -> int:
    return 1 if features.ndim == 4 else -1
