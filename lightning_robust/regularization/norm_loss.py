# SPDX-License-Identifier: Apache-2.0
"""Norm loss: every filter is drawn to unit length."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.regularization.base import WeightRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["NormLoss", "filter_norms", "norm_loss"]


def filter_norms(weight: Tensor) -> Tensor:
    """Length of each filter of a weight: of its rows, one per output unit or channel.

    The gradient at a filter that is zero is zero.

    Args:
        weight: A weight ``[out, ...]``.

    Shape:
        ``[out]``.

    Example:
        >>> import torch
        >>> from lightning_robust.regularization import filter_norms
        >>> filter_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms


def norm_loss(weight: Tensor) -> Tensor:
    r"""Sum of the squared distances of the filters of a weight from unit length, :math:`\sum_o (1-\lVert w_o\rVert)^2`.

    Args:
        weight: A weight ``[out, ...]``.

    Shape:
        A scalar.

    Example:
        >>> import torch
        >>> from lightning_robust.regularization import norm_loss
        >>> norm_loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor(16.)
    """
    return (1 - filter_norms(weight)).square().sum()


class NormLoss(WeightRegularizer):
    r"""Norm loss: draws the filters of convolutions and linear layers to unit length, in place of weight decay.

    .. math:: \lambda \sum_{\text{layers}} \sum_o (1 - \lVert w_o \rVert_2)^2

    where :math:`w_o` are the weights of one output channel or unit. Long filters shrink as under weight decay, short
    ones grow. Set the optimizer's weight decay to 0 for these weights; the callback ``WeightRegularization`` warns if
    it is not.

    Cost: one pass over the weights per step, independent of the batch size.

    Args:
        lam: Factor of the sum.
        linear: Whether linear layers count.
        include: Regular expressions, one of which must occur in the name of a layer; any name when ``None``.
        exclude: Regular expressions, none of which may occur in the name of a layer.

    Raises:
        ValueError: If ``lam`` is not finite, or, when called, if no layer is chosen.

    References:
        Georgiou et al., Norm Loss: An efficient yet effective regularization method for deep neural networks,
        arXiv 2103.06583. There is no code by the authors; the gradient is the norm-loss step of the optimizer Ranger21,
        which applies it to biases and normalisation layers, too.

    Example:
        >>> from torch import nn
        >>> from lightning_robust.regularization import NormLoss
        >>> layer = nn.Linear(2, 3)
        >>> _ = nn.init.constant_(layer.weight, 0.0)
        >>> round(NormLoss(lam=0.1)(layer).item(), 4)
        0.3
    """

    name: ClassVar[str] = "norm_loss"
    coefficient_name: ClassVar[str] = "lam"
    replaces_weight_decay: ClassVar[bool] = True

    def __init__(
        self,
        *,
        lam: float | Schedule = 1e-4,
        linear: bool = True,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
    ) -> None:
        super().__init__(coefficient=lam, linear=linear, include=include, exclude=exclude)

    @override
    def penalty(self, weight: Tensor) -> Tensor:
        return norm_loss(weight)
