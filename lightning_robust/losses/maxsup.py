# SPDX-License-Identifier: Apache-2.0
"""MaxSup: label smoothing that suppresses the largest logit instead of the labelled one."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.precision import full_precision
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["MaxSup", "maxsup_penalty"]


def maxsup_penalty(logits: Tensor) -> Tensor:
    r"""Largest logit minus the mean logit, :math:`z_{max} - \bar z`, of each sample.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import maxsup_penalty
        >>> maxsup_penalty(torch.tensor([[3.0, 0.0, 0.0]]))
        tensor([2.])
    """
    penalty: Tensor = _TopMinusMean.apply(full_precision(logits))[0]
    return penalty


class _TopMinusMean(torch.autograd.Function):
    """Autograd would write out three tensors of the size of the logits on the way back; this writes one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        # Not `amax`: at a tie it splits the sub-gradient, while the published code sends all of it to one index.
        top, index = logits.max(1, keepdim=True)
        return top.squeeze(1) - logits.mean(1), index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Tensor:
        index: Tensor = ctx.saved_tensors[0]
        each = upstream.unsqueeze(1)
        gradient: Tensor = (each / -ctx.shape[1]).expand(ctx.shape).clone()
        return gradient.scatter_add_(1, index, each)


class MaxSup(LogitRegularizer):
    r"""Max suppression: adds :math:`\alpha\,\mathrm{mean}(z_{max} - \bar z)` to any criterion.

    Label smoothing adds :math:`\alpha\,(z_y - \bar z)`, which on a wrong prediction raises the wrong logits. MaxSup
    takes the largest logit instead of the labelled one: the same penalty where the prediction is right, and a penalty
    on the mistake where it is wrong. It needs no labels, so it works unchanged with mixup and with soft targets. Do
    not combine it with label smoothing: both act on the largest logit of a correct sample.

    Runs in the training step, on the logits that the step computed; costs one pass over the logits.

    Args:
        alpha: Factor of the penalty, 0.1 in the paper's ablation; its main results use a line from 0.1 to 0.2,
            ``Linear(start=0.1, end=0.2, denominator="T")``.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If ``alpha`` is not finite.

    References:
        Zhou et al., arXiv:2502.15798. The paper and its code hold three slightly different schedules: see
        :class:`Linear`. Its repository evaluates with the penalty included; here the penalty is a training term only.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import MaxSup
        >>> MaxSup(alpha=0.1)(torch.tensor([[3.0, 0.0, 0.0]]))
        tensor(0.2000)
    """

    name: ClassVar[str] = "maxsup"
    coefficient_name: ClassVar[str] = "alpha"

    def __init__(self, *, alpha: float | Schedule = 0.1) -> None:
        super().__init__(coefficient=alpha)

    @override
    def penalty(self, logits: Tensor) -> Tensor:
        return maxsup_penalty(logits)
