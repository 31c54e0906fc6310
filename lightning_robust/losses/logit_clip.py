# SPDX-License-Identifier: Apache-2.0
"""Logits of bounded norm, which bounds any loss of them."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.wrapped import LogitTransform

__all__ = ["LogitClip", "clip_logits"]


def clip_logits(logits: Tensor, *, max_norm: float = 1.0, p: float = 2.0, reference_compat: bool = False) -> Tensor:
    r"""Shorten logits whose norm over the classes exceeds ``max_norm`` to that norm.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        max_norm: The largest norm.
        p: Order of the norm.
        reference_compat: As the published code, which looks whether the norm exceeds ``1 / max_norm``.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Example:
        >>> clip_logits(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    with autocast_off(logits):
        wide = full_precision(logits)
        norm: Tensor = torch.linalg.vector_norm(wide, ord=p, dim=1, keepdim=True)
        if reference_compat:
            norm = norm + 1e-7
            return wide * torch.where(norm > 1 / max_norm, max_norm / norm, 1.0)
        return wide * (max_norm / norm.clamp(min=max_norm))


class LogitClip(LogitTransform):
    r"""Clips the norm of the logits before a loss, so that no sample, least of all a mislabelled one, weighs too much.

    .. math:: z \leftarrow z \min\!\big(1,\; \delta / \|z\|_p \big)

    With the cross-entropy and :math:`p = 2`, the loss is then between :math:`\log(1 + (K-1) e^{-2\delta})` and
    :math:`\log(1 + (K-1) e^{2\delta})`. The gradient goes through the norm. Only the loss sees clipped logits:
    predictions, metrics and monitors have the logits of the model, whose order is the same but whose confidence is not.

    Cost: the norm and the product are two further passes over the logits.

    Args:
        max_norm: The bound :math:`\delta`, :math:`1 / \tau` in the paper.
        p: Order of the norm, at least 1; infinity is allowed.
        base: The criterion that sees the clipped logits; the cross-entropy when ``None``.
        reference_compat: Follow the published code, which clips when the norm exceeds :math:`1 / \delta`. It agrees
            with the formula for :math:`\delta = 1` only; for a larger bound it lengthens logits of a norm in between.

    Shape:
        What ``base`` takes and gives.

    Raises:
        ValueError: If an argument is out of range, or for what ``base`` refuses.

    References:
        Wei et al., Mitigating Memorization of Noisy Labels by Clipping the Model Prediction, arXiv:2212.04055.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import LogitClip
        >>> LogitClip()(torch.tensor([[30.0, 40.0]]), torch.tensor([0]))
        tensor(0.7981)
    """

    def __init__(
        self,
        *,
        max_norm: float = 1.0,
        p: float = 2.0,
        base: Criterion | None = None,
        reference_compat: bool = False,
    ) -> None:
        super().__init__(base)
        check_positive("max_norm", max_norm)
        if p != math.inf and not (math.isfinite(p) and p >= 1):
            raise ValueError(f"Expected `p` to be a number >= 1 or infinity but got {p!r}.")
        self.max_norm = max_norm
        self.p = p
        self.reference_compat = reference_compat

    @override
    def transform(self, logits: Tensor) -> Tensor:
        return clip_logits(logits, max_norm=self.max_norm, p=self.p, reference_compat=self.reference_compat)

    @override
    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}, p={self.p}"
