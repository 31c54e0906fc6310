# SPDX-License-Identifier: Apache-2.0
"""Learning from sets of images in which one class appears twice (odd-k-out)."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.cross_entropy import cross_entropy
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Target

__all__ = ["OKO", "oko_loss"]

OKOTargets = Literal["hard", "soft"]
_TARGETS = ("hard", "soft")


def oko_loss(logits: Tensor, labels: Tensor, *, k: int = 1, targets: OKOTargets = "hard") -> Tensor:
    r"""Loss of each set of ``k + 2`` samples, from the sum of their logits.

    Args:
        logits: ``[S (k + 2), C]``, the members of a set in consecutive rows.
        labels: Class indices, ``[S (k + 2)]``; two members of a set share one.
        k: Number of odd classes in a set.
        targets: ``"hard"``: cross-entropy with the class of the pair. ``"soft"``: Kullback-Leibler divergence from the
            shares of the classes in the set.

    Shape:
        ``[S]``, not reduced.

    References:
        Muttenthaler et al., arXiv:2307.02245.

    Example:
        >>> oko_loss(torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 0.0]]), torch.tensor([0, 1, 0]))
        tensor([0.2014])
    """
    with autocast_off(logits):
        wide = full_precision(logits)
        # Shapes and labels are looked at as those of single samples.
        Target.of(wide, labels).labels("OKO")
        size = k + 2
        if wide.ndim != 2 or len(wide) % size:
            raise ValueError(
                f"Expected logits [B, C] with B a multiple of {size}, the size of a set (k + 2), but got "
                f"{tuple(wide.shape)}; draw the batches with OKOSampler and take a multiple of {size} as batch size."
            )
        sets = wide.view(-1, size, wide.shape[1]).sum(1)
        members = labels.long().view(-1, size)
        if targets == "soft":
            shares = torch.zeros_like(sets).scatter_add_(1, members, torch.full_like(members, 1.0, dtype=sets.dtype))
            shares = shares / size
            negative_entropy: Tensor = torch.special.xlogy(shares, shares).sum(1)
            return negative_entropy - (shares * sets.log_softmax(1)).sum(1)
        return cross_entropy(sets, _pair(members), reduction="none")


def _pair(members: Tensor) -> Tensor:
    """The class that appears most often in each set, ``[S]``."""
    often = (members.unsqueeze(1) == members.unsqueeze(2)).sum(1)
    return members.gather(1, often.argmax(1, keepdim=True)).squeeze(1)


class OKO(Criterion):
    r"""Odd-k-out: a set of ``k + 2`` images is classified as a whole, and its answer is the class it holds twice.

    .. math:: \mathrm{CE}\Big( \sum_{m=1}^{k+2} z_m,\; y_{pair} \Big)

    Classes appear equally often whatever their size, and no single image has to be answered with full confidence, which
    calibrates models on few or unbalanced data. Needs batches of whole sets in consecutive rows: give the training
    loader an :class:`~lightning_robust.data.OKOSampler` and a batch size that is a multiple of ``k + 2``. In evaluation
    mode it is the cross-entropy of single images, as one predicts.

    Cost: negligible; an update needs ``k + 2`` images per answer.

    Args:
        k: Number of odd classes in a set.
        targets: What a set's answer is compared with, the class of the pair for ``"hard"``, or the shares of all its
            classes for ``"soft"``, by the Kullback-Leibler divergence.

    Shape:
        ``logits`` ``[N, C]``; ``target`` ``[N]``, class indices; ``N`` a multiple of ``k + 2``. A scalar.

    Raises:
        ValueError: If an argument is out of range, for soft targets, for rows that do not make whole sets, and, on a
            CPU, where looking costs nothing, for a set that has not ``k + 1`` classes.

    References:
        Muttenthaler et al., Set Learning for Accurate and Calibrated Models, arXiv:2307.02245. The bias of the last
        layer counts ``k + 2`` times, as there.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import OKO
        >>> OKO(k=1)(torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 0.0]]), torch.tensor([0, 1, 0]))
        tensor(0.2014)
    """

    batch_level = True
    soft_targets = False

    def __init__(self, *, k: int = 1, targets: OKOTargets = "hard") -> None:
        super().__init__()
        check_integer("k", k, 0 if targets == "hard" else 1)
        check_choice("targets", targets, _TARGETS)
        self.k = k
        self.targets: OKOTargets = targets

    @override
    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        if not self.training:
            return cross_entropy(logits, target)
        labels = Target.of(logits, target).labels(type(self).__name__)
        losses = oko_loss(logits, labels, k=self.k, targets=self.targets)
        if labels.device.type == "cpu":
            self._check_sets(labels)
        return losses.mean()

    def _check_sets(self, labels: Tensor) -> None:
        ordered = labels.view(-1, self.k + 2).sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]).sum(1) != 1).any()):
            raise ValueError(
                f"Expected sets of {self.k + 2} samples in which one class appears twice and {self.k} others once; "
                "draw the batches of the training loader with OKOSampler."
            )

    @override
    def extra_repr(self) -> str:
        return f"k={self.k}, targets={self.targets!r}"
