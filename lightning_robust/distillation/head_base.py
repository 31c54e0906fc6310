# SPDX-License-Identifier: Apache-2.0
"""Distillation losses with a second head on one of the student's layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.distillation.feature_base import FeatureDistillationLoss, known
from lightning_robust.losses import autocast_off

__all__ = ["HeadDistillationLoss"]


class HeadDistillationLoss(FeatureDistillationLoss, ABC):
    """Trains a head of its own on the features of one layer; it is made when width and number of classes are known.

    Args:
        layer: Dotted name of the layer; the input of the classifier when ``None``.
        width: Number of channels of the layer; read off it when ``None``.
        num_classes: Number of classes; that of the module or its data when ``None``.
    """

    part: ClassVar[str]  # what messages call the head

    def __init__(self, layer: str | None, width: int | None, num_classes: int | None) -> None:
        super().__init__([layer])
        for argument, size in (("width", width), ("num_classes", num_classes)):
            if size is not None:
                check_integer(argument, size, 1)
        self._width, self._num_classes = width, num_classes
        self.head: nn.Module | None = None

    @abstractmethod
    def make_head(self, width: int, num_classes: int) -> nn.Module:
        """Return a new head.

        Args:
            width: Number of channels of the features.
            num_classes: Number of classes.
        """

    def build_if_told(self) -> None:
        """Make the head now if the arguments say all that it needs; the last line of a constructor."""
        if self._width is not None and self._num_classes is not None:
            self.build([self._width], [], self._num_classes)

    @override
    def build(
        self, student_widths: Sequence[int | None], teacher_widths: Sequence[int | None], num_classes: int | None
    ) -> None:
        if self.head is not None:
            return
        who = type(self).__name__
        width = known(self._width or student_widths[0], "width", who, self.student_layers[0])
        classes = self._num_classes or num_classes
        if classes is None:
            raise ValueError(f"{who} cannot read off how many classes the student has; set `num_classes`.")
        self.head = self.make_head(width, classes)

    def head_logits(self, student_features: Sequence[Tensor]) -> Tensor:
        """Return what the head makes of the features, in its own precision.

        Args:
            student_features: What the layer put out: ``[B, D]``, a map ``[B, D, H, W]``, of which the mean counts, or
                tokens ``[B, N, D]``, of which the first does.
        """
        if self.head is None:
            who = f"The {self.part} of {type(self).__name__}"
            raise ValueError(f"{who} is not built; set `width` and `num_classes`.")
        feature = _pooled(self.one_feature(student_features))
        with autocast_off(feature):
            logits: Tensor = self.head(feature.to(next(self.head.parameters()).dtype))
        return logits


def _pooled(feature: Tensor) -> Tensor:
    if feature.ndim == 2:
        return feature
    return feature[:, 0] if feature.ndim == 3 else feature.flatten(2).mean(2)
