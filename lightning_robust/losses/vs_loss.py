# SPDX-License-Identifier: Apache-2.0
"""The vector-scaling loss for classes of very different sizes."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_non_negative
from lightning_robust.losses.cross_entropy import CrossEntropy, cross_entropy
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["VSLoss", "vs_logits", "vs_loss"]


def vs_logits(logits: Tensor, class_counts: Tensor, *, gamma: float = 0.3, tau: float = 1.0) -> Tensor:
    r"""Logits as the training loss sees them: :math:`z_k / \Delta_k + \iota_k`.

    .. math:: \Delta_k = (n_{max} / n_k)^\gamma, \qquad \iota_k = \tau \log (n_k / \sum_j n_j)

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        class_counts: Number of training samples of each class, ``[C]``, positive.
        gamma: Strength of the scaling; 0 leaves it out (logit adjustment).
        tau: Strength of the shift; 0 leaves it out.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If ``class_counts`` does not fit the logits.

    Example:
        >>> vs_logits(torch.zeros(1, 2), torch.tensor([3, 1])).exp()
        tensor([[0.7500, 0.2500]])
    """
    if logits.ndim < 2 or class_counts.shape != logits.shape[1:2]:
        raise ValueError(
            f"Expected `class_counts` to have one entry per class of `logits` but got shape "
            f"{tuple(class_counts.shape)} for logits of shape {tuple(logits.shape)}."
        )
    with autocast_off(logits):
        wide = full_precision(logits)
        counts = class_counts.to(wide).view(1, -1, *[1] * (wide.ndim - 2))
        shift = tau * (counts / counts.sum()).log()
        return torch.addcmul(shift, wide, (counts / counts.max()) ** gamma)


def vs_loss(
    logits: Tensor,
    target: Tensor | MixedTarget,
    class_counts: Tensor,
    *,
    gamma: float = 0.3,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of :func:`vs_logits`.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices ``[B, ...]`` (integers) or class probabilities of the shape of ``logits``.
        class_counts: Number of training samples of each class, ``[C]``, positive.
        gamma: Strength of the scaling.
        tau: Strength of the shift.
        label_smoothing: See :func:`cross_entropy`.
        weight: Weight of each class, ``[C]``.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        A scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: What :func:`vs_logits` and :func:`cross_entropy` refuse.

    References:
        Kini et al., arXiv:2103.01550.

    Example:
        >>> vs_loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([3, 1]))
        tensor(1.3863)
    """
    return cross_entropy(
        vs_logits(logits, class_counts, gamma=gamma, tau=tau),
        target,
        label_smoothing=label_smoothing,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


class VSLoss(CrossEntropy):
    r"""Vector-scaling loss: rare classes need larger logits in training, so the model gives them to them.

    .. math:: \mathrm{CE}(z / \Delta + \iota,\, y), \qquad
              \Delta_k = (n_{max} / n_k)^\gamma, \quad \iota_k = \tau \log (n_k / \sum_j n_j)

    The largest class keeps :math:`\Delta = 1`. Only the training loss changes: predict with the logits as they are.
    Runs wherever the training step calls its criterion. Together with a large SAM radius (0.1 and more) it does best on
    long-tailed data.

    Cost: one pass over the logits more than the cross-entropy each way.

    Args:
        class_counts: Number of training samples of each class, at least 1.
        gamma: Strength of the scaling; with ``gamma=0`` this is logit adjustment, arXiv:2007.07314.
        tau: Strength of the shift by the logarithm of the class's share.
        label_smoothing: Mass that the label loses.
        weight: Weight of each class, for re-weighting late in training (DRW).
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]`` or the shape of ``logits``.

    Raises:
        ValueError: If an argument is out of range, or for what :func:`vs_loss` refuses.

    References:
        Kini et al., Label-Imbalanced and Group-Sensitive Classification under Overparameterization, arXiv:2103.01550.
        Defaults are those of Rangwani et al., arXiv:2212.13827, who combine it with SAM.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import VSLoss
        >>> VSLoss(class_counts=[3, 1])(torch.zeros(1, 2), torch.tensor([1]))
        tensor(1.3863)
    """

    class_counts: Tensor

    def __init__(
        self,
        *,
        class_counts: list[int],
        gamma: float = 0.3,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, reduction=reduction)
        for count in class_counts:
            check_integer("class_counts", count, 1)
        check_non_negative("gamma", gamma)
        check_non_negative("tau", tau)
        self.gamma = gamma
        self.tau = tau
        # integers, which no change of the module's precision rounds
        self.register_buffer("class_counts", torch.tensor(class_counts), persistent=False)

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        seen = vs_logits(logits, self.class_counts, gamma=self.gamma, tau=self.tau)
        return super().sample_losses(seen, target, **context)

    @override
    def extra_repr(self) -> str:
        return f"classes={len(self.class_counts)}, gamma={self.gamma}, tau={self.tau}, reduction={self.reduction!r}"
