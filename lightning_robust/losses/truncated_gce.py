# SPDX-License-Identifier: Apache-2.0
"""Generalised cross-entropy with samples left out whose label the model does not believe."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.gce import check_q, gce_loss, gce_of
from lightning_robust.losses.table import SampleTable
from lightning_robust.losses.target import Reduction, Target

__all__ = ["TruncatedGCE"]


class TruncatedGCE(SampleCriterion):
    r"""Generalised cross-entropy that leaves out samples whose label the model finds less probable than ``k``.

    .. math:: w_i \left( \frac{1 - p_y^q}{q} - \frac{1 - k^q}{q} \right), \qquad
              w_i = \mathbb{1}\!\left[ \frac{1 - p_y^q}{q} < \frac{1 - k^q}{q} \right]

    The weights :math:`w_i` start at one. Before every ``every``-th epoch from ``start_epoch`` on they are decided anew,
    from the losses that the training passes of the previous epoch gave; a left-out sample is still looked at and may
    come back. The loss may be negative. To decide on other passes, those of the best model so far for one, call
    :meth:`prune` on all training batches and leave :meth:`epoch_ends` alone.

    Cost: that of the cross-entropy, and two numbers per training sample.

    Args:
        q: In (0, 1]; see :class:`GCE`.
        k: Probability of the label below which a sample is left out.
        start_epoch: First epoch, counted from 1, before which samples are left out.
        every: Number of epochs between two decisions, at multiples of this.
        num_samples: Number of training samples; the callback ``Criterion`` tells it.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"`` (left-out samples count in the denominator), ``"sum"`` or ``"none"``.

    Shape:
        ``logits`` ``[B, C]``; ``target`` ``[B]``; ``index``, positions in the training set, ``[B]``.

    Raises:
        ValueError: If an argument is out of range, for soft targets, or for another number of samples than before.
        RuntimeError: If the number of samples is not known.

    References:
        Zhang & Sabuncu, arXiv:1805.07836, whose code evaluates the training set with the best model so far (best on
        the test set) at the start of the epoch; we take what training saw, which needs no further pass. Their script
        also goes on with a copy of the network that its optimiser does not know, so that such an epoch trains nothing.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import TruncatedGCE
        >>> criterion = TruncatedGCE(num_samples=100)
        >>> logits, labels, index = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 0]), torch.tensor([5, 60])
        >>> criterion(logits, labels, index=index)
        tensor(0.0647)
        >>> criterion.prune(logits, labels, index=index)
        >>> criterion(logits, labels, index=index)
        tensor(-0.2139)
    """

    needs = ("index",)
    needs_epoch = True
    soft_targets = False

    def __init__(
        self,
        *,
        q: float = 0.7,
        k: float = 0.5,
        start_epoch: int = 40,
        every: int = 10,
        num_samples: int | None = None,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_q(q)
        check_in_range("k", k, 0, 1)
        check_integer("start_epoch", start_epoch, 1)
        check_integer("every", every, 1)
        self.q = q
        self.k = k
        self.start_epoch = start_epoch
        self.every = every
        self.threshold = (1 - k**q) / q
        self.weights = SampleTable(fill=1.0, num_samples=num_samples)
        self.losses = SampleTable(num_samples=num_samples)
        self._epoch = -1

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        index = context["index"]
        if self.recording and self._decides_after(self._epoch):
            self.losses.record(index, gce_of(target.pick(log_p), self.q))
        losses = target.expected(log_p, lambda picked: gce_of(picked, self.q) - self.threshold)
        return losses * self.weights.look_up(index, like=losses)

    @torch.no_grad()
    def prune(self, logits: Tensor, target: Tensor, *, index: Tensor) -> None:
        """Decide on the weights of some samples now, by the logits that are given.

        Args:
            logits: ``[B, C]``, of the best model so far in the published code.
            target: Class indices, ``[B]``.
            index: Positions in the training set, ``[B]``.
        """
        losses = gce_loss(logits, target, q=self.q)
        self.weights.record(index, (losses < self.threshold).to(losses))

    @override
    def samples_known(self, num_samples: int) -> None:
        self.weights.resize(num_samples)
        self.losses.resize(num_samples)

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        self._epoch = epoch

    @override
    def epoch_ends(self, epoch: int, total: Callable[[Tensor], Tensor]) -> None:
        if not self._decides_after(epoch):
            return
        self.losses.merge(total)
        losses = self.losses.rows
        if losses is not None:
            everyone = torch.arange(len(losses), device=losses.device)
            self.weights.record(everyone, (losses < self.threshold).to(losses))

    def _decides_after(self, epoch: int) -> bool:
        """Whether weights change between this epoch, counted from 0, and the next one, whose number from 1 is + 2."""
        following = epoch + 2
        return following >= self.start_epoch and following % self.every == 0

    @override
    def extra_repr(self) -> str:
        return f"q={self.q}, k={self.k}, start_epoch={self.start_epoch}, every={self.every}"
