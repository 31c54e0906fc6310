# SPDX-License-Identifier: Apache-2.0
"""Label smoothing whose soft labels are what the model itself says about the class, anew in every epoch."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.target import Reduction, Target

__all__ = ["OnlineLabelSmoothing"]


class OnlineLabelSmoothing(SampleCriterion):
    r"""Cross-entropy with the label, and with the mean prediction of the label's class in the epoch before.

    .. math:: a\, \mathrm{CE}(z, y) + (1 - a) \Big( - \sum_k S_{y k} \log p_k \Big)

    In the first epoch :math:`S` is label smoothing. During an epoch the probabilities of correctly classified training
    samples are summed by class; at its end their means become the new :math:`S`. Needs to know when an epoch ends, as
    the callback ``Criterion`` tells it.

    Cost: three further passes over the logits, and two numbers per pair of classes (8 MB for 1000 classes).

    Args:
        num_classes: Number of classes.
        alpha: Share of the label itself.
        smoothing: Mass that the label loses in the first epoch, spread over the wrong classes.
        keep_empty: A class without any correct sample in an epoch keeps its soft label. ``False`` leaves it without
            one, all zeros, as the published code does.
        weight: Weight of each class; of both terms.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, class indices.

    Raises:
        ValueError: If an argument is out of range, for soft targets, or for logits of another number of classes.

    References:
        Zhang et al., Delving Deep into Label Smoothing, arXiv:2011.12562.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import OnlineLabelSmoothing
        >>> criterion = OnlineLabelSmoothing(num_classes=2)
        >>> criterion(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.2269)
        >>> criterion.epoch_ends(0, total=lambda tensor: tensor)
        >>> criterion.soft_labels
        tensor([[0.8808, 0.1192],
                [0.1000, 0.9000]])
    """

    needs_epoch = True
    soft_targets = False
    soft_labels: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: float = 0.5,
        smoothing: float = 0.1,
        keep_empty: bool = True,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_integer("num_classes", num_classes, 2)
        check_in_range("alpha", alpha, 0, 1)
        check_in_range("smoothing", smoothing, 0, 1)
        self.alpha = alpha
        self.keep_empty = keep_empty
        first = torch.full((num_classes, num_classes), smoothing / (num_classes - 1))
        # One row per label.
        self.register_buffer("soft_labels", first.fill_diagonal_(1 - smoothing))
        self.register_buffer("sums", torch.zeros(num_classes, num_classes))
        self.register_buffer("counts", torch.zeros(num_classes))

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        classes = len(self.counts)
        if logits.shape[1] != classes:
            raise ValueError(f"Expected logits of {classes} classes (`num_classes`) but got {logits.shape[1]}.")
        log_p = logits.log_softmax(1)
        hard = -target.expected(log_p)  # looks labels up, and refuses bad ones, before they are used as rows
        labels, by_class = target.labels(type(self).__name__), log_p.movedim(1, -1)
        if self.recording:
            self._learn(by_class.detach(), labels, target.kept)
        soft = -(self.soft_labels[labels].to(log_p) * by_class).sum(-1)
        return self.alpha * hard + (1 - self.alpha) * target.weighted(soft)

    def _learn(self, log_p: Tensor, labels: Tensor, kept: Tensor | None) -> None:
        correct = log_p.argmax(-1) == labels
        correct = (correct if kept is None else correct & kept).flatten()
        p = log_p.exp().reshape(-1, log_p.shape[-1])
        rows = labels.flatten()
        self.sums.index_add_(0, rows, torch.where(correct.unsqueeze(1), p, 0.0).to(self.sums))
        self.counts.index_add_(0, rows, correct.to(self.counts))

    @override
    def synchronise(self, total: Callable[[Tensor], Tensor]) -> None:
        super().synchronise(total)
        # Each process takes an equal share of what all have seen: the sum over them stays what it was, and a checkpoint
        # of any process is good for all.
        processes = total(torch.ones_like(self.counts[:1]))
        for seen in (self.sums, self.counts):
            seen.copy_(total(seen) / processes)

    @override
    def epoch_ends(self, epoch: int, total: Callable[[Tensor], Tensor]) -> None:
        self.synchronise(total)
        seen = (self.counts > 0).unsqueeze(1)
        means = self.sums / torch.where(seen, self.counts.unsqueeze(1), 1.0)
        self.soft_labels.copy_(torch.where(seen, means, self.soft_labels) if self.keep_empty else means)
        self.sums.zero_()
        self.counts.zero_()

    @override
    def extra_repr(self) -> str:
        return f"num_classes={len(self.counts)}, alpha={self.alpha}, keep_empty={self.keep_empty}"
