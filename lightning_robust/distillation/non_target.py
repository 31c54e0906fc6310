# SPDX-License-Identifier: Apache-2.0
"""The classes other than the label, as a distribution of their own."""

import math
from typing import NamedTuple

from torch import Tensor

from lightning_robust.losses import Target

__all__ = ["NonTarget", "label_mask", "non_target"]


class NonTarget(NamedTuple):
    """Logarithms of a distribution, taken apart at the label.

    Args:
        label: Of the label's probability, ``[B, ...]``.
        rest: Of that of all other classes together, ``[B, ...]``.
        conditional: Of those of the other classes among each other, ``[B, C, ...]``. The label's entry is 0.
        probabilities: ``conditional`` as probabilities; the label's is 0.
    """

    label: Tensor
    rest: Tensor
    conditional: Tensor
    probabilities: Tensor


def non_target(logits: Tensor, is_label: Tensor, who: str) -> NonTarget:
    """Take the softmax of logits apart at the label.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]`` in full precision.
        is_label: Where the label is, boolean, of the shape of ``logits``.
        who: What needs it; named in a refusal.

    Raises:
        ValueError: If there is no class besides the label.

    Example:
        >>> import torch
        >>> non_target(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[True, False, False]]), "KD").probabilities
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    if logits.shape[1] < 2:
        raise ValueError(f"{who} needs at least 2 classes but the logits have {logits.shape[1]}.")
    log_p = logits.log_softmax(1)
    # From the logits again: differences of very small log-probabilities would lose digits.
    conditional = logits.masked_fill(is_label, -math.inf).log_softmax(1)
    return NonTarget(
        label=log_p.masked_fill(~is_label, 0.0).sum(1),
        rest=log_p.masked_fill(is_label, -math.inf).logsumexp(1),
        conditional=conditional.masked_fill(is_label, 0.0),
        probabilities=conditional.exp(),
    )


def label_mask(target: Target, logits: Tensor, who: str) -> Tensor:
    """Where the label of each sample is, boolean, of the shape of ``logits``.

    Args:
        target: Class indices; ignored samples have class 0.
        logits: ``[B, C]`` or ``[B, C, ...]``.
        who: What needs them; named in the refusal of soft targets.
    """
    target.labels(who)
    return target.probabilities(logits) > 0
