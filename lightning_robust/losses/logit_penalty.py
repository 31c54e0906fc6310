# SPDX-License-Identifier: Apache-2.0
"""Squared norm of the logits as a penalty."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.precision import full_precision
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["LogitPenalty", "logit_norm_penalty"]


def logit_norm_penalty(logits: Tensor) -> Tensor:
    r"""Half the squared norm of the logits, :math:`\lVert z\rVert^2 / 2`, of each sample.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import logit_norm_penalty
        >>> logit_norm_penalty(torch.tensor([[3.0, 1.0]]))
        tensor([5.])
    """
    penalty: Tensor = _HalfSquare.apply(full_precision(logits))
    return penalty


class _HalfSquare(torch.autograd.Function):
    """Half the squared norm along dimension 1, without the squares of the entries in memory; twice differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(values, dim=1)
        return norm.square() / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        values: Tensor = ctx.saved_tensors[0]
        return upstream.unsqueeze(1) * values


class LogitPenalty(LogitRegularizer):
    r"""Logit penalty: adds :math:`\beta\,\mathrm{mean}(\lVert z\rVert^2 / 2)` to any criterion.

    Runs in the training step, on the logits that the step computed; costs one pass over the logits.

    Args:
        beta: Factor of the penalty; 0.002 is the value in the MaxSup comparison.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If ``beta`` is not finite.

    References:
        Dauphin and Cubuk, ICLR 2021, "Deconstructing the regularization of BatchNorm".

    Example:
        >>> import torch
        >>> from lightning_robust.losses import LogitPenalty
        >>> LogitPenalty(beta=0.5)(torch.tensor([[3.0, 1.0]]))
        tensor(2.5000)
    """

    name: ClassVar[str] = "logit_penalty"
    coefficient_name: ClassVar[str] = "beta"

    def __init__(self, *, beta: float | Schedule = 0.002) -> None:
        super().__init__(coefficient=beta)

    @override
    def penalty(self, logits: Tensor) -> Tensor:
        return logit_norm_penalty(logits)
