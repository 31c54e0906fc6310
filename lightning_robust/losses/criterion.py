# SPDX-License-Identifier: Apache-2.0
"""Base class of the losses that compare logits with a target."""

from torch import Tensor, nn

__all__ = ["Criterion"]


class Criterion(nn.Module):
    """A loss ``criterion(logits, target) -> scalar``; subclasses implement :meth:`forward`.

    Implementations accept hard targets (class indices) and soft targets (rows that sum to one), compute in float32
    (float64 for float64 logits) with autocast disabled, and build everything from ``log_softmax``, so that they stay
    finite at logits of +-120.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import Criterion
        >>> class Brier(Criterion):
        ...     def forward(self, logits, target):
        ...         one_hot = torch.nn.functional.one_hot(target, logits.shape[1])
        ...         return (logits.float().softmax(1) - one_hot).square().sum(1).mean()
        >>> Brier()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.7500)
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            logits: Scores before the softmax, ``[B, C]``.
            target: Class indices ``[B]`` or class probabilities ``[B, C]``.
        """
        raise NotImplementedError
