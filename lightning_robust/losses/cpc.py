# SPDX-License-Identifier: Apache-2.0
"""CPC: cross-entropy with constraints on pairs of logits."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import full_precision
from lightning_robust.losses.target import Reduction, Target

__all__ = ["CPC", "binary_discrimination", "binary_exclusion"]

_CHUNK = 2**22  # pairs of logits worked on at once


def binary_discrimination(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Mean over the wrong classes of :math:`\log(1 + e^{z_k - z_y})`, of each sample.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        labels: Class indices, ``[B, ...]``.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import binary_discrimination
        >>> binary_discrimination(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.6931])
    """
    own, others = _split(logits, labels)
    return -F.logsigmoid(own - others).mean(-1)


def binary_exclusion(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Sum over ordered pairs of wrong classes of :math:`\frac12\log(1 + e^{z_j - z_i})/((C-1)(C-2))`, of each sample.

    Least where all wrong logits are equal. The pairs of a class with itself, a constant, are counted.

    Cost: time :math:`O(B C^2)`, memory :math:`O(B C)`: the pairs are formed in chunks, and again in the backward pass.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]`` with ``C >= 3``.
        labels: Class indices, ``[B, ...]``.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Raises:
        ValueError: If there are fewer than three classes.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import binary_exclusion
        >>> binary_exclusion(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.5199])
    """
    classes = logits.shape[1]
    if classes < 3:
        raise ValueError(
            f"CPC compares pairs of wrong classes, so it needs at least 3 classes but got {classes}; for two classes "
            "use another criterion, such as CrossEntropy with MbLS."
        )
    _, others = _split(logits, labels)
    columns = max(1, _CHUNK // max(others.numel(), 1))
    chunks = torch.split(others, columns, dim=-1)
    if len(chunks) == 1:
        total = _softplus_pairs(others, others)
    else:
        total = torch.stack([_recomputed(others, chunk) for chunk in chunks]).sum(0)
    return total / (2 * (classes - 1) * (classes - 2))


class CPC(SampleCriterion):
    r"""Calibration by pairwise constraints: cross-entropy plus binary discrimination and binary exclusion.

    .. math:: -\log p_y + \frac{\lambda_1}{C-1}\sum_{k\ne y}\log(1 + e^{z_k - z_y})
              + \frac{\lambda_2}{2(C-1)(C-2)}\sum_{i,j\ne y}\log(1 + e^{z_j - z_i})

    The first term separates the labelled class from each of the others, the second one keeps the others equal.

    Cost: every pair of classes of every sample, :math:`O(B C^2)` time (no form in less is known that is exact), in
    chunks of constant memory; meant for up to a few thousand classes.

    Args:
        discrimination: Weight :math:`\lambda_1`.
        exclusion: Weight :math:`\lambda_2`.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        As :class:`~lightning_robust.losses.SampleCriterion`, with class indices as target and ``C >= 3``.

    Raises:
        ValueError: If a weight is negative, there are fewer than three classes, or the target is soft.

    References:
        Cheng and Vasconcelos, CVPR 2022, "Calibrating Deep Neural Networks by Pairwise Constraints", as in the code of
        CALS, which adds 1e-10 to each difference in the second sum.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CPC
        >>> CPC(discrimination=1.0, exclusion=0.0)(torch.zeros(1, 4), torch.tensor([2]))
        tensor(2.0794)
    """

    soft_targets = False

    def __init__(
        self,
        *,
        discrimination: float = 1.0,
        exclusion: float = 1.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_non_negative("discrimination", discrimination)
        check_non_negative("exclusion", exclusion)
        self.discrimination = discrimination
        self.exclusion = exclusion

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        labels = target.labels("CPC")
        losses = -target.pick(logits.log_softmax(1))
        losses = losses + self.discrimination * binary_discrimination(logits, labels)
        return target.weighted(losses + self.exclusion * binary_exclusion(logits, labels))

    @override
    def extra_repr(self) -> str:
        return f"discrimination={self.discrimination}, exclusion={self.exclusion}, {super().extra_repr()}"


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled logit ``[B, ..., 1]`` and the others ``[B, ..., C - 1]``, in full precision."""
    last = full_precision(logits).movedim(1, -1)
    labels = labels.unsqueeze(-1)
    places = torch.arange(last.shape[-1] - 1, device=last.device)
    # Not a mask: its result would have a shape that only the data knows.
    return last.gather(-1, labels), last.gather(-1, places + (places >= labels).long())


def _softplus_pairs(values: Tensor, chunk: Tensor) -> Tensor:
    # Not softplus: beyond 20 it returns its argument.
    return -F.logsigmoid(values.unsqueeze(-1) - chunk.unsqueeze(-2)).sum((-2, -1))


def _recomputed(values: Tensor, chunk: Tensor) -> Tensor:
    found = checkpoint(_softplus_pairs, values, chunk, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found
