# SPDX-License-Identifier: Apache-2.0
"""Losses on what features of student and teacher show alike although their widths differ."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.distillation.feature_base import Layers
from lightning_robust.distillation.feature_pairs import PairedFeatures
from lightning_robust.distillation.features import attention_transfer_loss, rkd_angle_loss, rkd_distance_loss

__all__ = ["RKD", "AttentionTransfer"]


class AttentionTransfer(PairedFeatures):
    r"""The mean squared difference between the attention maps of student and teacher.

    .. math:: \sum_l \frac{1}{B P}\sum_{i,p} \big(a^s_{lip} - a^t_{lip}\big)^2

    with the attention :math:`a` of :func:`attention_map`. The usual weight is 1000 (``Distillation(weight=1000.0)``).

    Cost: the teacher's features come from the forward pass that makes its logits.

    Args:
        student_layer: Dotted name of a layer of the student that puts out maps or tokens, or a list of names.
        teacher_layer: That of the teacher; the same name as the student's when ``None``.
        power: Exponent of the attention.

    Shape:
        Logits ``[B, C]``, which are not looked at, and a list of features ``[B, N, D]`` or ``[B, D, H, W]`` of either
        network give a scalar.

    Raises:
        ValueError: If the numbers of layers differ or ``power`` is not positive; in a call, for features without
            positions.

    References:
        Zagoruyko and Komodakis, arXiv:1612.03928. See :func:`attention_transfer_loss` for what their code does.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import AttentionTransfer
        >>> logits = torch.zeros(1, 10)
        >>> g, h = torch.ones(1, 8, 4, 4), torch.ones(1, 3, 4, 4)
        >>> AttentionTransfer("layer2")(logits, logits, student_features=[g], teacher_features=[h])
        tensor(0.)
    """

    name: ClassVar[str] = "attention_transfer"

    def __init__(
        self, student_layer: str | list[str], teacher_layer: str | list[str] | None = None, *, power: float = 2.0
    ) -> None:
        check_positive("power", power)
        super().__init__(student_layer, teacher_layer)
        self.power = power

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer_loss(student, teacher, self.power)


class RKD(PairedFeatures):
    r"""Relational distillation: the distances and angles between the samples of a batch.

    .. math:: \sum_l w_d\,D_l + w_a\,A_l

    with :func:`rkd_distance_loss` and :func:`rkd_angle_loss`. Relations are those of the batch, which are the samples
    of one process under DDP.

    Cost: memory of :math:`B^3` numbers for the angles, besides the teacher's forward pass.

    Args:
        student_layer: Dotted name of a layer of the student or a list of names; the input of the classifier when
            ``None``.
        teacher_layer: That of the teacher; the same name as the student's when ``None``.
        distance_weight: Factor of the distances.
        angle_weight: Factor of the angles; 0 leaves them out.

    Shape:
        Logits ``[B, C]``, which are not looked at, and a list of features ``[B, D]`` or ``[B, ...]`` of either network
        give a scalar.

    Raises:
        ValueError: If a weight is negative or the numbers of layers differ.

    References:
        Park et al., arXiv:1904.05068; 25 and 50 are the weights of the usual CIFAR-100 comparison.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import RKD
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> logits = torch.zeros(3, 10)
        >>> RKD(angle_weight=0.0)(logits, logits, student_features=[x], teacher_features=[5 * x])
        tensor(0.)
    """

    name: ClassVar[str] = "rkd"

    def __init__(
        self,
        student_layer: Layers = None,
        teacher_layer: Layers = None,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        check_non_negative("distance_weight", distance_weight)
        check_non_negative("angle_weight", angle_weight)
        super().__init__(student_layer, teacher_layer)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss = self.distance_weight * rkd_distance_loss(student, teacher)
        return loss + self.angle_weight * rkd_angle_loss(student, teacher) if self.angle_weight else loss
