# SPDX-License-Identifier: Apache-2.0
"""Squared norm of the logits as a penalty."""

from typing import ClassVar

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
    return full_precision(logits).square().sum(1) / 2


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
