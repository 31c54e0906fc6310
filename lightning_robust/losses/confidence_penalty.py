# SPDX-License-Identifier: Apache-2.0
"""Confidence penalty: predictions are rewarded for their entropy."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.precision import full_precision
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["ConfidencePenalty", "negative_entropy"]


def negative_entropy(logits: Tensor) -> Tensor:
    r"""Negative entropy of the prediction, :math:`-H(p) = \sum_k p_k \log p_k`, of each sample.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.

    Shape:
        ``[B]`` or ``[B, ...]``, from :math:`-\log C` (uniform) to 0 (certain).

    Example:
        >>> import torch
        >>> from lightning_robust.losses import negative_entropy
        >>> negative_entropy(torch.tensor([[0.0, 0.0], [0.0, 5.0]]))
        tensor([-0.6931, -0.0402])
    """
    log_p = full_precision(logits).log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


class ConfidencePenalty(LogitRegularizer):
    r"""Confidence penalty: subtracts :math:`\beta\,\mathrm{mean}(H(p))` from any criterion.

    .. math:: L - \beta\,\frac{1}{N}\sum_n H(p_n), \quad H(p) = -\sum_k p_k \log p_k

    The penalty is negative, since the entropy is not shifted by its maximum :math:`\log C`; gradients are the same.

    Cost: one softmax of the logits.

    Args:
        beta: Weight of the entropy, 0.1 in most of the paper's experiments.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If ``beta`` is not finite.

    References:
        Pereyra et al., arXiv:1701.06548. Implementations differ: the code of MbLS and CALS takes the mean of
        :math:`-p_k\log p_k` over samples *and classes*, so their weight is ours times :math:`C`; torch-uncertainty adds
        the constant :math:`\beta\log C`.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import ConfidencePenalty
        >>> ConfidencePenalty(beta=0.1)(torch.zeros(3, 2))
        tensor(-0.0693)
    """

    name: ClassVar[str] = "confidence_penalty"
    coefficient_name: ClassVar[str] = "beta"

    def __init__(self, *, beta: float | Schedule = 0.1) -> None:
        super().__init__(coefficient=beta)

    @override
    def penalty(self, logits: Tensor) -> Tensor:
        return negative_entropy(logits)
