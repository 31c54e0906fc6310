# SPDX-License-Identifier: Apache-2.0
"""Distances between the features of two networks, as plain functions."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.losses import autocast_off, full_precision

__all__ = [
    "angular_distance",
    "attention_map",
    "attention_transfer_loss",
    "cosine_distance",
    "rkd_angle_loss",
    "rkd_distance_loss",
]


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine between the features of each sample.

    .. math:: d_i = 1 - \frac{g_i^\top h_i}{\|g_i\|\,\|h_i\|}

    A feature of zeros has distance 1 from every other.

    Args:
        student: Features ``g`` of the student, ``[B, D]`` or ``[B, ...]``, which is flattened.
        teacher: Features ``h`` of the teacher, of the same shape.

    Shape:
        ``[B]``; float32, or float64 for float64 features.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import cosine_distance
        >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.])
    """
    _check_pair(student, teacher)
    with autocast_off(student):
        return 1 - (_unit(student) * _unit(teacher)).sum(1)


def angular_distance(student: Tensor, teacher: Tensor, *, normalise: bool = True) -> Tensor:
    r"""The angle between the features of each sample, as a share of a half turn.

    .. math:: d_i = \frac1\pi \arccos\frac{g_i^\top h_i}{\|g_i\|\,\|h_i\|}
        = \frac2\pi\,\mathrm{atan2}\big(\|\hat g_i - \hat h_i\|, \|\hat g_i + \hat h_i\|\big)

    The second form, on features of unit length, has finite gradients where the features agree, which the arc cosine has
    not: there they are zero. A feature of zeros is at a right angle to every other.

    Args:
        student: Features ``g`` of the student, ``[B, D]`` or ``[B, ...]``, which is flattened.
        teacher: Features ``h`` of the teacher, of the same shape.
        normalise: Divide by :math:`\pi`, so that values are in [0, 1]; else they are radians.

    Shape:
        ``[B]``; float32, or float64 for float64 features.

    Raises:
        ValueError: If the shapes differ.

    References:
        Suzuki et al., arXiv:2308.16454 (ARREST), which moves features by it.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import angular_distance
        >>> angular_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.5000])
    """
    _check_pair(student, teacher)
    with autocast_off(student):
        g, h = _unit(student), _unit(teacher)
        angle = 2 * torch.atan2((g - h).norm(dim=1), (g + h).norm(dim=1))
        return angle / math.pi if normalise else angle


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    r"""Where a layer looks: mean power of the channels at each position, scaled to unit length.

    .. math:: a_i = \frac{q_i}{\|q_i\|}, \qquad q_{ip} = \frac1D \sum_c |f_{icp}|^{power}

    Args:
        features: Maps ``[B, D, H, W]`` or tokens ``[B, N, D]``.
        power: Exponent.

    Shape:
        ``[B, H * W]`` or ``[B, N]``; float32, or float64 for float64 features.

    Raises:
        ValueError: If the features have no positions.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import attention_map
        >>> attention_map(torch.ones(1, 8, 2, 2))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if features.ndim not in (3, 4):
        raise ValueError(
            f"Attention needs maps [B, D, H, W] or tokens [B, N, D] but the features have shape "
            f"{tuple(features.shape)}; name an earlier layer."
        )
    with autocast_off(features):
        return _unit(full_precision(features).abs().pow(power).mean(1 if features.ndim == 4 else 2))


def attention_transfer_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    r"""Mean squared difference between the attention maps of student and teacher.

    .. math:: \frac{1}{B P}\sum_{i,p} \big(a^s_{ip} - a^t_{ip}\big)^2

    Maps of different size are averaged to the smaller one first; the number of channels may differ.

    Args:
        student: Maps ``[B, D, H, W]`` or tokens ``[B, N, D]`` of the student.
        teacher: Those of the teacher.
        power: Exponent of the attention; see :func:`attention_map`.

    Shape:
        A scalar; float32, or float64 for float64 features.

    Raises:
        ValueError: If the features have no positions, or tokens differ in number.

    References:
        Zagoruyko and Komodakis, arXiv:1612.03928. As in their code this is a mean over positions; the paper's equation
        has the norm.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import attention_transfer_loss
        >>> attention_transfer_loss(torch.ones(1, 8, 4, 4), torch.ones(1, 3, 2, 2))
        tensor(0.)
    """
    if student.ndim == teacher.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    mine, others = attention_map(student, power), attention_map(teacher, power)
    if mine.shape != others.shape:
        raise ValueError(
            f"The student's features of shape {tuple(student.shape)} and the teacher's of shape {tuple(teacher.shape)} "
            "do not have the same positions; name layers of the same resolution."
        )
    return (mine - others).square().mean()


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Relational distillation of distances: how far samples lie from each other, relative to the batch's mean.

    .. math:: \frac{1}{B^2}\sum_{i,j} \ell_{Huber}\Big(\frac{\|g_i - g_j\|}{\mu_g}, \frac{\|h_i - h_j\|}{\mu_h}\Big)

    with the mean :math:`\mu` over the pairs that differ. The widths of the two networks may differ.

    Args:
        student: Features ``g`` of the student, ``[B, D]`` or ``[B, ...]``, which is flattened.
        teacher: Features ``h`` of the teacher.

    Shape:
        A scalar; float32, or float64 for float64 features.

    Raises:
        ValueError: If the numbers of samples differ.

    References:
        Park et al., arXiv:1904.05068.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import rkd_distance_loss
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> rkd_distance_loss(x, 5 * x)
        tensor(0.)
    """
    _check_batch(student, teacher)
    with autocast_off(student):
        return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Relational distillation of angles: which angle each pair of samples is seen under from every third one.

    .. math:: \frac{1}{B^3}\sum_{i,j,k} \ell_{Huber}\big(\cos\angle g_j g_i g_k, \cos\angle h_j h_i h_k\big)

    The widths of the two networks may differ.

    Cost: memory of :math:`B^3` numbers.

    Args:
        student: Features ``g`` of the student, ``[B, D]`` or ``[B, ...]``, which is flattened.
        teacher: Features ``h`` of the teacher.

    Shape:
        A scalar; float32, or float64 for float64 features.

    Raises:
        ValueError: If the numbers of samples differ.

    References:
        Park et al., arXiv:1904.05068.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import rkd_angle_loss
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 2.0]])
        >>> rkd_angle_loss(x, 4 * x)
        tensor(0.)
    """
    _check_batch(student, teacher)
    with autocast_off(student):
        return F.smooth_l1_loss(_cosines_of_triples(student), _cosines_of_triples(teacher))


def _unit(features: Tensor) -> Tensor:
    return F.normalize(full_precision(features).flatten(1), dim=1)


def _relative_distances(features: Tensor) -> Tensor:
    flat = full_precision(features).flatten(1)
    # Not cdist: its gradient at distance zero is not defined on every device; norm's is zero.
    distances = (flat.unsqueeze(1) - flat.unsqueeze(0)).norm(dim=2)
    apart = (distances > 0).sum().clamp(min=1)
    mean = distances.sum() / apart
    relative: Tensor = distances / torch.where(mean > 0, mean, 1)
    return relative


def _cosines_of_triples(features: Tensor) -> Tensor:
    flat = full_precision(features).flatten(1)
    directions = F.normalize(flat.unsqueeze(0) - flat.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected features of one shape but the student's have {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}."
        )


def _check_batch(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"Expected features of the same samples but the student's are {len(student)} and the teacher's "
            f"{len(teacher)}."
        )
