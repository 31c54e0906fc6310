# SPDX-License-Identifier: Apache-2.0
"""Base class of the distillation losses that look inside the networks, and of those with trainable parts."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.distillation.losses import DistillationLoss

__all__ = ["FeatureDistillationLoss", "Layers", "Widths", "as_layers"]

#: A layer by its dotted name, or several; ``None`` is the input of the classifier.
Layers = str | list[str] | None
#: Numbers of channels of one layer, or of several.
Widths = int | list[int] | None


class FeatureDistillationLoss(DistillationLoss):
    """A distillation loss that gets features of the networks, and may have trainable parameters.

    The callback :class:`~lightning_robust.callbacks.Distillation` reads :attr:`student_layers` and
    :attr:`teacher_layers`, calls :meth:`build` before the optimizers are made, and passes the features of each layer in
    a step. In a training step of your own call ``build`` once, and pass the features yourself.

    Args:
        student_layers: Dotted names of layers of the student, whose outputs are the features; ``None`` in it stands for
            the input of the classifier.
        teacher_layers: Those of the teacher.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FeatureDistillationLoss
        >>> class Norms(FeatureDistillationLoss):
        ...     name = "norms"
        ...     def forward(self, student_logits, teacher_logits, target=None, *, student_features, teacher_features):
        ...         return (student_features[0].norm(dim=1) - teacher_features[0].norm(dim=1)).square().mean()
        >>> loss = Norms(["net.layer3"], ["layer3"])
        >>> logits = torch.zeros(2, 10)
        >>> loss(logits, logits, student_features=[torch.ones(2, 4)], teacher_features=[torch.ones(2, 9)])
        tensor(1.)
    """

    #: Whether a teacher is asked; a loss without one gets ``None`` for its logits.
    needs_teacher: ClassVar[bool] = True

    def __init__(self, student_layers: Sequence[str | None] = (), teacher_layers: Sequence[str | None] = ()) -> None:
        super().__init__()
        self.student_layers = list(student_layers)
        self.teacher_layers = list(teacher_layers)

    def build(
        self, student_widths: Sequence[int | None], teacher_widths: Sequence[int | None], num_classes: int | None
    ) -> None:
        """Make the trainable parts, if there are any and they are not made yet.

        Args:
            student_widths: Number of channels of each of the student's layers; ``None`` where it is unknown.
            teacher_widths: Those of the teacher's.
            num_classes: Number of classes of the student, if known.

        Raises:
            ValueError: If something is unknown that a part needs.
        """

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
        """Return the loss.

        Args:
            student_logits: Scores of the student before the softmax, ``[B, C]``.
            teacher_logits: Scores of the teacher, of the same shape.
            target: Labels of the batch, for losses that declare ``needs_target``.
            student_features: What each of :attr:`student_layers` put out.
            teacher_features: What each of :attr:`teacher_layers` put out.
        """
        raise NotImplementedError

    def one_feature(self, features: Sequence[Tensor]) -> Tensor:
        """Return the only feature, for losses that look at one layer.

        Args:
            features: What the layers put out.
        """
        if len(features) != 1:
            raise ValueError(
                f"{type(self).__name__} compares the features of one layer but got {len(features)}; pass "
                "student_features=[...], or train with the callback Distillation."
            )
        return features[0]


def as_layers(layers: Layers) -> list[str | None]:
    """Return one layer or several as a list."""
    return list(layers) if isinstance(layers, list) else [layers]


def as_widths(argument: str, widths: Widths, count: int) -> list[int | None]:
    """Return a width for each of ``count`` layers, ``None`` where nothing is said."""
    told: list[int | None] = [*widths] if isinstance(widths, list) else [widths] * count
    for width in told:
        if width is not None:
            check_integer(argument, width, 1)
    if len(told) != count:
        raise ValueError(f"Expected `{argument}` to hold a width for each of {count} layers but got {len(told)}.")
    return told


def known(width: int | None, argument: str, who: str, layer: str | None) -> int:
    """Return a width that a trainable part needs, or refuse to guess it."""
    if width is None:
        place = "before the classifier" if layer is None else f"of the layer {layer!r}"
        raise ValueError(f"{who} cannot read off how many channels the features {place} have; set `{argument}`.")
    return width
