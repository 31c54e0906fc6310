# SPDX-License-Identifier: Apache-2.0
"""Losses that pull features of the student towards those of the teacher."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.distillation.feature_base import Layers, Widths
from lightning_robust.distillation.feature_pairs import PairedFeatures
from lightning_robust.distillation.features import angular_distance, cosine_distance

__all__ = ["FeatureAngle", "FeatureCosine", "FeatureMSE"]


class FeatureMSE(PairedFeatures):
    r"""The mean squared difference of features, behind a learnt linear map of the student's: a hint.

    .. math:: \sum_{l} \mathrm{mean}\big((W_l g_l + b_l - h_l)^2\big)

    The maps ``W`` (1 x 1 convolutions for feature maps) are trained with the student and belong to no checkpoint of it;
    ``projector=False`` leaves them out.

    Cost: the teacher's features come from the forward pass that makes its logits; the maps are small.

    Args:
        student_layer: Dotted name of a layer of the student, ``"backbone.layer3"`` say, or a list of names; the input
            of the classifier when ``None``.
        teacher_layer: That of the teacher; the same name as the student's when ``None``.
        projector: Learn a map from the student's width to the teacher's.
        student_width: Number of channels of the student's layer; read off the layer when ``None``.
        teacher_width: That of the teacher's layer.

    Shape:
        Logits ``[B, C]``, which are not looked at, and a list of features ``[B, D]``, ``[B, N, D]`` or ``[B, D, H, W]``
        of either network give a scalar.

    Raises:
        ValueError: If the numbers of layers differ; if a width is needed that cannot be read off; in a call, for
            features that do not fit.

    References:
        Romero et al., arXiv:1412.6550 (FitNets), whose hints are a training stage of their own, before the logits.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FeatureMSE
        >>> loss = FeatureMSE("layer2", projector=False)
        >>> logits = torch.zeros(2, 10)
        >>> loss(logits, logits, student_features=[torch.ones(2, 4)], teacher_features=[torch.zeros(2, 4)])
        tensor(1.)
    """

    name: ClassVar[str] = "feature_mse"

    def __init__(
        self,
        student_layer: Layers = None,
        teacher_layer: Layers = None,
        *,
        projector: bool = True,
        student_width: Widths = None,
        teacher_width: Widths = None,
    ) -> None:
        super().__init__(
            student_layer,
            teacher_layer,
            projector=projector,
            student_width=student_width,
            teacher_width=teacher_width,
        )

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        mine, others = self.fitting(student, teacher)
        return (mine - others).square().mean()


class FeatureCosine(PairedFeatures):
    r"""One minus the cosine between the features of student and teacher, mean over samples.

    .. math:: \sum_l \frac1B\sum_i \Big(1 - \frac{g_{li}^\top h_{li}}{\|g_{li}\|\,\|h_{li}\|}\Big)

    Cost: the teacher's features come from the forward pass that makes its logits.

    Args:
        student_layer: Dotted name of a layer of the student or a list of names; the input of the classifier when
            ``None``.
        teacher_layer: That of the teacher; the same name as the student's when ``None``.
        projector: Learn a linear map from the student's width to the teacher's.
        student_width: Number of channels of the student's layer; read off the layer when ``None``.
        teacher_width: That of the teacher's layer.

    Shape:
        Logits ``[B, C]``, which are not looked at, and a list of features ``[B, D]``, ``[B, N, D]`` or ``[B, D, H, W]``
        of either network give a scalar.

    Raises:
        ValueError: If the numbers of layers differ; if a width is needed that cannot be read off; in a call, for
            features that do not fit.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FeatureCosine
        >>> logits = torch.zeros(1, 10)
        >>> g, h = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> FeatureCosine()(logits, logits, student_features=[g], teacher_features=[h])
        tensor(1.)
    """

    name: ClassVar[str] = "feature_cosine"

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine_distance(*self.fitting(student, teacher)).mean()


class FeatureAngle(PairedFeatures):
    r"""The angle between the features of student and teacher, mean over samples.

    .. math:: \sum_l \frac1B\sum_i \frac1\pi\arccos\frac{g_{li}^\top h_{li}}{\|g_{li}\|\,\|h_{li}\|}

    Its gradient does not vanish as the features approach each other, unlike that of the cosine.

    Cost: the teacher's features come from the forward pass that makes its logits.

    Args:
        student_layer: Dotted name of a layer of the student or a list of names; the input of the classifier when
            ``None``.
        teacher_layer: That of the teacher; the same name as the student's when ``None``.
        projector: Learn a linear map from the student's width to the teacher's.
        student_width: Number of channels of the student's layer; read off the layer when ``None``.
        teacher_width: That of the teacher's layer.

    Shape:
        Logits ``[B, C]``, which are not looked at, and a list of features ``[B, D]``, ``[B, N, D]`` or ``[B, D, H, W]``
        of either network give a scalar.

    Raises:
        ValueError: If the numbers of layers differ; if a width is needed that cannot be read off; in a call, for
            features that do not fit.

    References:
        Suzuki et al., arXiv:2308.16454 (ARREST), between the clean features of a frozen start and the student's.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import FeatureAngle
        >>> logits = torch.zeros(1, 10)
        >>> g, h = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> FeatureAngle()(logits, logits, student_features=[g], teacher_features=[h])
        tensor(0.5000)
    """

    name: ClassVar[str] = "feature_angle"

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return angular_distance(*self.fitting(student, teacher)).mean()
