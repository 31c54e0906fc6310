# SPDX-License-Identifier: Apache-2.0
"""Progressive self-knowledge distillation: labels refined by what the network itself said an epoch ago."""

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off
from lightning_robust.losses.table import SampleTable
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["PSKD", "pskd_targets"]


def pskd_targets(remembered: Tensor, target: Tensor | MixedTarget | Target, alpha: float) -> Tensor:
    r"""Refined labels, :math:`(1 - \alpha)\,y + \alpha\,p`; of a sample of which nothing is remembered, the label.

    Args:
        remembered: earlier probabilities of each sample, ``[B, C]``; rows of zeros where there are none.
        target: class indices, class probabilities or a mixture.
        alpha: share of what is remembered.

    Shape:
        ``[B, C]``, of the type of ``remembered``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import pskd_targets
        >>> pskd_targets(torch.tensor([[0.5, 0.5], [0.0, 0.0]]), torch.tensor([0, 1]), alpha=0.4)
        tensor([[0.8000, 0.2000],
                [0.0000, 1.0000]])
    """
    with autocast_off(remembered):
        labels = Target.of(remembered, target).probabilities(remembered)
        known = (remembered.sum(1, keepdim=True) > 0).to(remembered)
        return labels + alpha * known * (remembered - labels)


class PSKD(SampleCriterion):
    r"""Cross-entropy with labels that are refined by the network's own predictions of the epoch before.

    .. math:: \mathrm{CE}\big(z_i, (1 - \alpha_e)\,y_i + \alpha_e\,p_i^{(e-1)}\big), \qquad
              \alpha_e = \alpha\,\frac{e + 1}{E}

    with :math:`e` counted from 0 and :math:`E` epochs. The first epoch is plain cross-entropy, and so is any until
    :meth:`epoch_starts` is called. The prediction of a sample is that of its training step, of the image as it was
    augmented then; a sample that has none yet keeps its label. It needs the index of each sample and the epoch, which
    the callback :class:`~lightning_robust.callbacks.Criterion` tells it; processes exchange what they have seen once
    per epoch.

    Cost: memory for one row of probabilities per training sample, on the device and in each checkpoint: 20 MB for
    CIFAR-100, 5.1 GB for ImageNet, half of it with ``half_precision=True``. The softmax is that of the loss; no forward
    pass.

    Args:
        alpha: share of the predictions at the end; the paper's for CIFAR-100, 0.3 for ImageNet.
        epochs: number of epochs :math:`E`; that of the run when ``None``.
        half_precision: keep the table in float16; probabilities below 3e-8 become 0, others are off by at most 0.05 %.
        num_samples: number of training samples; the callback tells it.
        weight: weight of each class.
        ignore_index: hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]``, ``target`` ``[B]`` class indices, ``index`` ``[B]``.

    Raises:
        ValueError: ``alpha`` outside of [0, 1]; class probabilities or mixed labels as targets, because the table
            would have to be mixed as well; an epoch of a run without end.
        RuntimeError: a forward before the number of samples is known.

    References:
        Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021, arXiv:2006.12000. In
        their code a sample that the first epoch left out (an incomplete last batch) has zeros for a prediction.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import PSKD
        >>> criterion = PSKD(alpha=0.8, num_samples=100)
        >>> logits, labels, index = torch.tensor([[2.0, 0.0]]), torch.tensor([1]), torch.tensor([42])
        >>> for epoch in range(2):
        ...     criterion.epoch_starts(epoch, max_epochs=2)
        ...     print(round(float(criterion(logits, labels, index=index)), 4))
        2.1269
        0.7177
    """

    needs = ("index",)
    needs_epoch = True
    soft_targets = False

    def __init__(
        self,
        *,
        alpha: float = 0.8,
        epochs: int | None = None,
        half_precision: bool = False,
        num_samples: int | None = None,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_in_range("alpha", alpha, 0, 1)
        if epochs is not None:
            check_integer("epochs", epochs, 1)
        self.alpha = alpha
        self.epochs = epochs
        self.half_precision = half_precision
        self.predictions = SampleTable(num_samples=num_samples)
        self._share = 0.0  # of the predictions in the running epoch; the first has none

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        epochs = max_epochs if self.epochs is None else self.epochs
        if epochs < 1:
            raise ValueError(
                f"PSKD raises its share of predictions over all epochs of the run, but max_epochs is {max_epochs}; set "
                "`max_epochs` of the Trainer, or `epochs` of PSKD."
            )
        self._share = self.alpha * min((epoch + 1) / epochs, 1.0) if epoch > 0 else 0.0

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        if logits.ndim != 2:
            raise ValueError(
                f"PSKD remembers one row per sample: expected `logits` [B, C] but got {tuple(logits.shape)}."
            )
        log_p = logits.log_softmax(1)
        p = log_p.detach().exp()
        row = p.half() if self.half_precision else p
        remembered = self.predictions.look_up(context["index"], like=row).to(p)
        refined = pskd_targets(remembered, target, self._share)
        if self.recording:
            self.predictions.record(context["index"], row)
        return -(target.weigh_classes(refined) * log_p).sum(1)

    @override
    def samples_known(self, num_samples: int) -> None:
        self.predictions.resize(num_samples)

    @override
    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, epochs={self.epochs}, half_precision={self.half_precision}, "
            f"reduction={self.reduction!r}"
        )
