# SPDX-License-Identifier: Apache-2.0
"""Training on a teacher's stored soft labels: fast knowledge distillation, and its variant that doubts some of them."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range, check_integer
from lightning_robust.distillation.losses import SampleDistillationLoss, check_shapes
from lightning_robust.distillation.soft_labels import FORMS, Form, compress_soft_labels, recover_soft_labels
from lightning_robust.losses import MixedTarget, Target, autocast_off, cross_entropy, full_precision

__all__ = ["FKD", "FerKD", "ferkd_labels"]


class FKD(SampleDistillationLoss):
    r"""Cross-entropy with a teacher's soft label, as it is after only ``k`` of its probabilities were stored.

    .. math:: -\sum_c \tilde q_c \log p_c

    with :math:`\tilde q` from :func:`recover_soft_labels`. A live teacher's answer is cut down to ``k`` classes first,
    so that a run with it and one with stored labels are the same. Without a label of the data set:
    ``Distillation(teacher, FKD(), weight=1.0, base_weight=0.0)``, as published. Stored labels are right for the views
    of the images that they were made of; see :class:`TeacherCache`.

    Cost: two softmaxes and the choice of the top classes.

    Args:
        form: What the classes that are not among the top ``k`` get; see :func:`recover_soft_labels`.
        k: How many classes are kept, 5 or 10 in the published training; ``"hard"`` and ``"smoothing"`` keep one.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If an argument is out of range or the shapes differ.

    References:
        Shen and Xing, arXiv:2112.01528; the replay of stored crops is not here.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FKD
        >>> FKD(k=1)(torch.zeros(1, 3), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(1.0986)
    """

    name: ClassVar[str] = "fkd"

    def __init__(self, *, form: Form = "marginal_smoothing", k: int = 5) -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        check_integer("k", k, 1)
        self.form: Form = form
        self.k = k

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        check_shapes(student_logits, teacher_logits)
        with autocast_off(teacher_logits):
            probabilities = full_precision(teacher_logits).softmax(1)
            index, value = compress_soft_labels(probabilities, self.k)
            soft = recover_soft_labels(index, value, num_classes=teacher_logits.shape[1], form=self.form)
        return cross_entropy(student_logits, soft, reduction="none")

    @override
    def extra_repr(self) -> str:
        return f"form={self.form!r}, k={self.k}"


def ferkd_labels(
    soft_labels: Tensor,
    target: Tensor | MixedTarget,
    *,
    soften_below: float,
    discard_below: float,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    r"""Soft labels in which doubtful answers of the teacher are replaced by smoothed labels, and which to leave out.

    Args:
        soft_labels: Class probabilities of the teacher, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices ``[B, ...]``, class probabilities or a mixture.
        soften_below: Largest probability of the teacher below which the label of the data set, smoothed, is used.
        discard_below: Largest probability below which the sample is left out.
        label_smoothing: Mass that the label of the data set loses, spread over all classes.

    Shape:
        Class probabilities of the shape of ``soft_labels``, and which samples count, ``[B, ...]``.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Shen, FerKD, ICCV 2023; see :class:`FerKD` for what is ours.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import ferkd_labels
        >>> soft = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> ferkd_labels(soft, torch.tensor([0, 1]), soften_below=0.7, discard_below=0.1)
        (tensor([[0.9000, 0.1000],
                [0.0500, 0.9500]]), tensor([True, True]))
    """
    _check(soften_below, discard_below, label_smoothing)
    seen = Target.of(soft_labels, target)
    confidence = soft_labels.amax(1, keepdim=True)
    smoothed = (1 - label_smoothing) * seen.probabilities(soft_labels) + label_smoothing / soft_labels.shape[1]
    kept = (confidence >= discard_below).squeeze(1)
    if seen.kept is not None:
        kept = kept & seen.kept
    return torch.where(confidence < soften_below, smoothed, soft_labels), kept


class FerKD(SampleDistillationLoss):
    r"""Soft labels of the teacher where it is sure, smoothed labels of the data set where it is not, or nothing.

    .. math:: -\sum_c s_c \log p_c, \qquad s = \begin{cases} q & \max q \ge u \\
              (1 - \epsilon)\,e_y + \epsilon / C & v \le \max q < u \end{cases}

    and samples with :math:`\max q < v` are left out, also of the mean. A crop that shows little of its object makes the
    teacher unsure, and its answer unreliable. The label is in the target already, so the loss stands alone:
    ``Distillation(teacher, FerKD(...), weight=1.0, base_weight=0.0)``.

    Cost: that of KD.

    Args:
        soften_below: The threshold :math:`u` of the teacher's largest probability. It has no default: neither the text
            that we know nor the published code, which holds the trainer of FKD only, gives the thresholds; that they
            are compared with the largest probability is ours, too. Look at the distribution of your teacher's.
        discard_below: The threshold :math:`v`, at most :math:`u`; 0 leaves out nothing.
        label_smoothing: Mass :math:`\epsilon` that the label of the data set loses; 0.1 is ours.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[B, C]`` or ``[B, C, ...]``, ``target`` ``[B, ...]`` or soft; a
        scalar.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.

    References:
        Shen, FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023. Its mixing of regions within an
        image (SelfMix) is not here.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FerKD
        >>> loss = FerKD(soften_below=0.5, discard_below=0.4)
        >>> teacher = torch.tensor([[4.0, 0.0, 0.0], [0.1, 0.0, 0.0]])  # sure, and lost
        >>> loss(torch.zeros(2, 3), teacher, torch.tensor([0, 1]))
        tensor(1.0986)
    """

    name: ClassVar[str] = "ferkd"
    needs_target: ClassVar[bool] = True

    def __init__(self, *, soften_below: float, discard_below: float = 0.0, label_smoothing: float = 0.1) -> None:
        super().__init__()
        _check(soften_below, discard_below, label_smoothing)
        self.soften_below = soften_below
        self.discard_below = discard_below
        self.label_smoothing = label_smoothing

    @override
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        losses, kept = self._kept(student_logits, teacher_logits.detach(), target)
        return losses.sum() / kept.sum().clamp(min=1)

    @override
    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return self._kept(student_logits, teacher_logits, target)[0]

    def _kept(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses, 0 for those left out, and which were not."""
        check_shapes(student_logits, teacher_logits)
        with autocast_off(teacher_logits):
            soft, kept = ferkd_labels(
                full_precision(teacher_logits).softmax(1),
                self.labels(target),
                soften_below=self.soften_below,
                discard_below=self.discard_below,
                label_smoothing=self.label_smoothing,
            )
        return torch.where(kept, cross_entropy(student_logits, soft, reduction="none"), 0.0), kept

    @override
    def extra_repr(self) -> str:
        return (
            f"soften_below={self.soften_below}, discard_below={self.discard_below}, "
            f"label_smoothing={self.label_smoothing}"
        )


def _check(soften_below: float, discard_below: float, label_smoothing: float) -> None:
    check_in_range("soften_below", soften_below, 0, 1)
    check_in_range("discard_below", discard_below, 0, soften_below)
    check_in_range("label_smoothing", label_smoothing, 0, 1)
