# SPDX-License-Identifier: Apache-2.0
"""Logits of a fixed norm in training, so that a model cannot lower its loss by growing them."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.wrapped import LogitTransform

__all__ = ["LogitNorm", "normalized_logits"]


def normalized_logits(logits: Tensor, *, temperature: float = 0.04) -> Tensor:
    r"""Logits of the norm :math:`1 / t`: :math:`z / (t\,(\|z\|_2 + 10^{-7}))`.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        temperature: The :math:`t`.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Example:
        >>> normalized_logits(torch.tensor([[3.0, 4.0]]), temperature=0.1)
        tensor([[6., 8.]])
    """
    with autocast_off(logits):
        wide = full_precision(logits)
        norm: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        return wide * (temperature * (norm + 1e-7)).reciprocal()


class LogitNorm(LogitTransform):
    r"""Divides the logits by their norm before a loss, which keeps confidence low on what the model does not know.

    .. math:: \mathrm{CE}\!\left( \frac{z}{t\,(\|z\|_2 + 10^{-7})},\; y \right)

    The gradient goes through the norm. Only the loss sees normalised logits; predict with the logits of the model. They
    are small then, so calibrate them before their softmax is taken for a probability.

    Cost: the norm and the quotient are two further passes over the logits.

    Args:
        temperature: The :math:`t`; the logits get the norm :math:`1 / t`. The paper's value for CIFAR-10 is 0.04. The
            smallest possible cross-entropy is :math:`\log(1 + (K-1) e^{-\sqrt{K/(K-1)}/t})`.
        base: The criterion that sees the normalised logits; the cross-entropy when ``None``.

    Shape:
        What ``base`` takes and gives.

    Raises:
        ValueError: If ``temperature`` is out of range, or for what ``base`` refuses.

    References:
        Wei et al., Mitigating Neural Network Overconfidence with Logit Normalization, arXiv:2205.09310.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import LogitNorm
        >>> LogitNorm(temperature=1.0)(torch.tensor([[3.0, -4.0]]), torch.tensor([0]))
        tensor(0.2204)
    """

    def __init__(self, *, temperature: float = 0.04, base: Criterion | None = None) -> None:
        super().__init__(base)
        check_positive("temperature", temperature)
        self.temperature = temperature

    @override
    def transform(self, logits: Tensor) -> Tensor:
        return normalized_logits(logits, temperature=self.temperature)

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
