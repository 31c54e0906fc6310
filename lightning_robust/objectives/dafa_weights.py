# SPDX-License-Identifier: Apache-2.0
"""Weights of classes by how easily an attack confuses them, for DAFA."""

from typing import Literal

import torch
from torch import Tensor

from lightning_robust.checks import check_choice
from lightning_robust.losses import full_precision
from lightning_robust.objectives.terms import label_probabilities

__all__ = ["dafa_sums", "dafa_weights"]


def dafa_sums(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch from which :func:`dafa_weights` learns how the classes resemble each other.

    Args:
        logits: ``[B, C]`` of attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.

    Returns:
        Predicted probabilities summed per true class, ``[C, C]``, and the samples of each class, ``[C]``.

    Example:
        >>> dafa_sums(torch.zeros(2, 2), torch.tensor([0, 0]))
        (tensor([[1., 1.],
                [0., 0.]]), tensor([2., 0.]))
    """
    predicted = full_precision(logits.detach()).softmax(1)
    labels = label_probabilities(target, predicted)
    return labels.T @ predicted, labels.sum(0)


def dafa_weights(
    sums: Tensor,
    counts: Tensor,
    strength: float = 1.0,
    *,
    min_weight: float = 0.01,
    ties: Literal["neither", "both-lose"] = "neither",
) -> Tensor:
    r"""Weights of classes: from each pair the harder one gets what the easier one loses.

    With :math:`S_{ij}` the mean probability of class :math:`j` on attacked images of class :math:`i`, every pair with
    :math:`S_{ii} < S_{jj}` moves :math:`\lambda\, S_{ij}\, S_{jj}` from the weight of :math:`j` to that of :math:`i`.
    All weights begin at 1, so their sum stays :math:`C`. Classes that were not seen take no part.

    Args:
        sums: predicted probabilities summed per true class, ``[C, C]``.
        counts: samples of each class, ``[C]``.
        strength: :math:`\lambda`; 1 for CIFAR-10, 1.5 for CIFAR-100 and STL-10 in the paper.
        min_weight: weights below it are raised to it.
        ties: of two equally hard classes, ``"neither"`` moves, as in the paper, or ``"both-lose"``, as in the code.

    Shape:
        Returns ``[C]``.

    Example:
        >>> dafa_weights(torch.tensor([[6.0, 4.0], [2.0, 8.0]]), torch.tensor([10.0, 10.0]))
        tensor([1.3200, 0.6800])
    """
    check_choice("ties", ties, ("neither", "both-lose"))
    similarity = sums / counts.clamp_min(1).unsqueeze(1)
    correct = similarity.diagonal()
    seen = counts > 0
    harder = correct.unsqueeze(1) < correct.unsqueeze(0)  # [i, j]: i is harder than j
    pairs = seen.unsqueeze(1) & seen.unsqueeze(0) & ~torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    # what i, as the harder class of the pair, gets from j
    moved = similarity * correct.unsqueeze(0) * pairs
    loses = harder if ties == "neither" else harder | (correct.unsqueeze(1) == correct.unsqueeze(0))
    weights = 1 + strength * ((moved * harder).sum(1) - (moved * loses).sum(0))
    return weights.clamp_min(min_weight)
