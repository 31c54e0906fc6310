# SPDX-License-Identifier: Apache-2.0
"""Sparsemax: the probabilities nearest to the logits, most of them exactly zero."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Target

__all__ = ["Sparsemax", "sparsemax", "sparsemax_loss"]


def sparsemax(logits: Tensor) -> Tensor:
    r"""Euclidean projection of the logits onto the probabilities, :math:`\max(z - \tau, 0)`.

    Take the probabilities of a model that was trained with :class:`Sparsemax` from here. Many are exactly zero: clamp
    them before taking a logarithm, as for the negative log-likelihood.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Example:
        >>> sparsemax(torch.tensor([[1.0, 0.5, -1.0]]))
        tensor([[0.7500, 0.2500, 0.0000]])
    """
    with autocast_off(logits):
        return _project(_shifted(full_precision(logits)))


def sparsemax_loss(logits: Tensor, target: Tensor | MixedTarget | Target) -> Tensor:
    r"""Sparsemax loss of each sample; its gradient is :math:`p - t`.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Martins & Astudillo, arXiv:1602.02068.

    Example:
        >>> sparsemax_loss(torch.tensor([[1.0, 0.5, -1.0], [2.0, 0.0, 0.0]]), torch.tensor([0, 0]))
        tensor([0.0625, 0.0000])
    """
    with autocast_off(logits):
        shifted = _shifted(full_precision(logits))
        seen = Target.of(shifted, target)
        p = _project(shifted)
        # On the support, p and the shifted logits differ by a constant, which the sum of p makes one of the loss.
        own = (p * shifted).sum(1) - p.square().sum(1) / 2
        if seen.soft:
            t = seen.probabilities(shifted)
            given = (t * shifted).sum(1) - t.square().sum(1) / 2
        else:
            given = seen.pick(shifted) - 0.5
        return seen.weighted(own - given)


def _shifted(logits: Tensor) -> Tensor:
    """Logits below zero: nothing depends on a constant, and small numbers keep their digits."""
    return logits - logits.detach().amax(1, keepdim=True)


def _project(shifted: Tensor) -> Tensor:
    with torch.no_grad():
        support = _by_narrowing(shifted) if shifted.device.type == "cpu" else _by_sorting(shifted)
    return torch.where(support, shifted - _threshold(shifted, support), 0.0)


def _threshold(shifted: Tensor, support: Tensor) -> Tensor:
    return (torch.where(support, shifted, 0.0).sum(1, keepdim=True) - 1) / support.sum(1, keepdim=True)


def _by_narrowing(shifted: Tensor) -> Tensor:
    """Drop what is below the threshold until nothing is: a few passes, but each has to be waited for."""
    support = shifted > -1
    while True:
        narrower = shifted > _threshold(shifted, support)
        if torch.equal(narrower, support):
            return support
        support = narrower


def _by_sorting(shifted: Tensor) -> Tensor:
    ordered = shifted.sort(1, descending=True).values
    rank = torch.arange(1, shifted.shape[1] + 1, device=shifted.device, dtype=shifted.dtype)
    rank = rank.view(1, -1, *[1] * (shifted.ndim - 2))
    size = (rank * ordered > ordered.cumsum(1) - 1).sum(1, keepdim=True)
    return shifted >= ordered.gather(1, size - 1)


class Sparsemax(SampleCriterion):
    r"""The loss of probabilities that may be exactly zero, and that are when a class is far behind.

    .. math:: \langle p - t, z \rangle + \tfrac{1}{2} \big( \|t\|^2 - \|p\|^2 \big), \qquad
              p = \arg\min_{q \in \Delta} \|q - z\|

    It is zero, with zero gradient, once the label leads by a margin of one, so it does not ask for ever larger logits.
    Take probabilities from :func:`sparsemax`, not from a softmax; their negative log-likelihood is infinite where a
    zero is wrong.

    Cost: a sort of the logits on a GPU, five to ten passes over them on a CPU; then about six passes more.

    Args:
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Martins & Astudillo, From Softmax to Sparsemax, arXiv:1602.02068.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import Sparsemax
        >>> Sparsemax()(torch.tensor([[1.0, 0.5, -1.0], [2.0, 0.0, 0.0]]), torch.tensor([0, 0]))
        tensor(0.0312)
    """

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return sparsemax_loss(logits, target)
