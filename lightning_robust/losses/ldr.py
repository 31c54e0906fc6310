# SPDX-License-Identifier: Apache-2.0
"""Label-distributional robustness: the worst weighting of the classes, held near the uniform one (LDR-KL, ALDR-KL)."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.checks import check_choice, check_non_negative, check_positive
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.elr import _check_flat
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.table import SampleTable
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["ALDRKL", "LDRKL", "adapted_lambda", "ldr_loss", "ldr_scores"]

Normalize = Literal["softplus", "l1", "none"]
_NORMALIZE = ("softplus", "l1", "none")


def ldr_scores(logits: Tensor, normalize: Normalize = "softplus") -> Tensor:
    r"""Scores of order one, as the losses of this file expect them.

    Args:
        logits: ``[B, C]`` or ``[B, C, ...]``.
        normalize: ``"softplus"``: :math:`f = \log(1 + e^z)`, divided by the mean over the classes; ``"l1"``:
            :math:`z` divided by the mean of :math:`|z|`, at least 1e-7; ``"none"``: the logits.

    Shape:
        That of ``logits``; float32, or float64 for float64 logits.

    Example:
        >>> ldr_scores(torch.tensor([[3.0, -1.0]]), "l1")
        tensor([[ 1.5000, -0.5000]])
    """
    with autocast_off(logits):
        wide = full_precision(logits)
        if normalize == "none":
            return wide
        if normalize == "l1":
            return wide * wide.abs().mean(1, keepdim=True).clamp(min=1e-7).reciprocal()
        # Below -40 the softplus is the exponential, and the quotient does not change with a constant: moving such rows
        # up keeps them within float32.
        scores = F.softplus(wide - (wide.detach().amax(1, keepdim=True) + 40).clamp(max=0))
        return scores * scores.mean(1, keepdim=True).reciprocal()


def ldr_loss(
    scores: Tensor, target: Tensor | MixedTarget | Target, *, lam: float | Tensor = 1.0, margin: float = 0.1
) -> Tensor:
    r"""LDR-KL loss of each sample, :math:`\lambda \log \frac{1}{K} \sum_k e^{(f_k - f_y + c\,[k \ne y]) / \lambda}`.

    Args:
        scores: ``[B, C]`` or ``[B, C, ...]``, from :func:`ldr_scores` as a rule.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        lam: One temperature for all, or one per sample, ``[B, ...]``.
        margin: By how much the score of the label has to exceed the others.

    Shape:
        ``[B, ...]``, not reduced; may be negative.

    References:
        Zhu et al., arXiv:2112.14869.

    Example:
        >>> ldr_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), lam=1.0, margin=0.0)
        tensor([-0.3799])
    """
    with autocast_off(scores):
        wide = full_precision(scores)
        return _ldr(wide, Target.of(wide, target), lam, margin)


def adapted_lambda(scores: Tensor, lam: Tensor, *, lam0: float = 10.0, alpha: float = 2.0) -> Tensor:
    r"""The temperature of each sample, by one closed-form step from the one it had.

    .. math:: \lambda_i = \lambda_0 \Big( 1 - \frac{\mathrm{KL}(p_i \,\|\, u)}{\alpha \log K} \Big), \qquad
              p_i = \mathrm{softmax}(f_i / \lambda_i^{old})

    Args:
        scores: ``[B, C]``, from :func:`ldr_scores`.
        lam: The temperatures so far, ``[B]``.
        lam0: Temperature of a sample that the model knows nothing about.
        alpha: Above 1; the larger, the less the temperature moves.

    Shape:
        ``[B]``, detached.

    References:
        Zhu et al., arXiv:2112.14869; 1e-5 is added to the probabilities before they are normalised again, as in the
        authors' code.

    Example:
        >>> adapted_lambda(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([10.0, 10.0]))
        tensor([10.0000,  5.2902])
    """
    with autocast_off(scores), torch.no_grad():
        classes = scores.shape[1]
        wide = full_precision(scores)
        p = (wide / lam.to(wide).unsqueeze(1)).softmax(1) + 1e-5
        p = p / p.sum(1, keepdim=True)
        divergence = torch.special.xlogy(p, classes * p).sum(1)
        adapted: Tensor = lam0 * (1 - divergence / (alpha * math.log(classes)))
        return adapted


def _ldr(scores: Tensor, target: Target, lam: float | Tensor, margin: float) -> Tensor:
    each = lam.to(scores) if isinstance(lam, Tensor) else scores.new_tensor(lam)
    of_rows = each if each.ndim == 0 else each.unsqueeze(1)
    offset = math.log(scores.shape[1])
    scaled = scores * of_rows.reciprocal()
    if not target.soft:
        own = target.pick(scores) / each  # refuses bad labels
        label = target.labels("LDR-KL").unsqueeze(1)
        # In place: `scaled` is needed by nobody else, and its gradient does not need the result.
        lowered = scaled.scatter_add_(1, label, (-margin / of_rows).expand(label.shape)) if margin else scaled
        return target.weighted(each * (lowered.logsumexp(1) - own - offset) + margin)
    log_q = scaled.log_softmax(1)
    others = (-log_q.expm1()).clamp(min=1e-12)
    lifted = (others + (log_q - margin / of_rows).exp()).log() - log_q - offset
    return target.expected(margin + of_rows * lifted)


class LDRKL(SampleCriterion):
    r"""LDR-KL: the loss under the worst weighting of the classes that is not far from the uniform one.

    .. math:: \max_{q}\; \sum_k q_k d_k - \lambda\, \mathrm{KL}(q \,\|\, u)
              = \lambda \log \frac{1}{K} \sum_k e^{d_k / \lambda}, \qquad d_k = f_k - f_y + c\,[k \ne y]

    With :math:`\lambda \to 0` it is the multi-class hinge loss, which fits every label; with :math:`\lambda \to \infty`
    the mean of :math:`d`, which resists wrong ones; :math:`\lambda = 1` without margin and normalisation is the
    cross-entropy less :math:`\log K`. The scores :math:`f` are normalised to order one, with gradient. The loss may be
    negative.

    Cost: the softplus, its mean and the margin are about five further passes over the logits.

    Args:
        lam: The temperature; the paper tries 0.1, 1 and 10, large ones against noise.
        margin: By how much the score of the label has to exceed the others.
        normalize: How scores are made from logits: ``"softplus"``, ``"l1"`` or ``"none"``; see :func:`ldr_scores`.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Zhu et al., Label Distributionally Robust Losses for Multi-class Classification, arXiv:2112.14869. Defaults
        other than ``lam`` are those of their demo.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import LDRKL
        >>> LDRKL()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(-0.3568)
    """

    def __init__(
        self,
        *,
        lam: float = 1.0,
        margin: float = 0.1,
        normalize: Normalize = "softplus",
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_positive("lam", lam)
        check_non_negative("margin", margin)
        check_choice("normalize", normalize, _NORMALIZE)
        self.lam = lam
        self.margin = margin
        self.normalize: Normalize = normalize

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return _ldr(ldr_scores(logits, self.normalize), target, self.lam, self.margin)

    @override
    def extra_repr(self) -> str:
        return f"lam={self.lam}, margin={self.margin}, normalize={self.normalize!r}, reduction={self.reduction!r}"


class ALDRKL(SampleCriterion):
    r"""LDR-KL with a temperature of its own for every training sample, found by itself.

    .. math:: \lambda_i \log \frac{1}{K} \sum_k e^{d_k / \lambda_i}
              - \frac{\alpha \log K}{2 \lambda_0} (\lambda_i - \lambda_0)^2

    A sample about which the model is unsure keeps the large :math:`\lambda_0`, which resists a wrong label; a confident
    one gets a smaller temperature and a loss near the hinge. Each visit updates :math:`\lambda_i` before the loss, see
    :func:`adapted_lambda`; it has no gradient. ``criterion.lambdas.rows`` holds them. The loss may be negative.

    Cost: one number per training sample, and about five further passes over the logits, for the normalisation and for a
    second softmax at the temperature so far.

    Args:
        lam0: Temperature that samples begin with, and that an unsure one keeps.
        alpha: Above 1; the larger, the less temperatures move.
        margin: By how much the score of the label has to exceed the others.
        normalize: How scores are made from logits: ``"l1"``, ``"softplus"`` (the authors' choice for CIFAR-100) or
            ``"none"``; see :func:`ldr_scores`. A head of zeros has no direction that ``"l1"`` could keep, and gradients
            of 1e7 at first.
        num_samples: Number of training samples; the callback ``Criterion`` tells it.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]``; ``target`` ``[B]``, the shape of ``logits``, or a mixture; ``index``, positions in the
        training set, ``[B]``.

    Raises:
        ValueError: If an argument is out of range, or for another number of samples than before.
        RuntimeError: If the number of samples is not known.

    References:
        Zhu et al., Label Distributionally Robust Losses for Multi-class Classification, arXiv:2112.14869. Their code
        divides by the mean of the absolute logits as it is; ours by 1e-7 at least.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import ALDRKL
        >>> criterion = ALDRKL(num_samples=100)
        >>> criterion(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), index=torch.tensor([42]))
        tensor(-0.9049)
        >>> criterion.lambdas.rows[41:43]
        tensor([10.0000,  9.9641])
    """

    needs = ("index",)

    def __init__(
        self,
        *,
        lam0: float = 10.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: Normalize = "l1",
        num_samples: int | None = None,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_positive("lam0", lam0)
        check_non_negative("margin", margin)
        check_choice("normalize", normalize, _NORMALIZE)
        if not alpha > 1:
            raise ValueError(f"Expected `alpha` to be > 1 but got {alpha!r}; temperatures could become negative.")
        self.lam0 = lam0
        self.alpha = alpha
        self.margin = margin
        self.normalize: Normalize = normalize
        self.lambdas = SampleTable(fill=lam0, num_samples=num_samples)

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        _check_flat(logits, type(self).__name__)
        scores, index = ldr_scores(logits, self.normalize), context["index"]
        lam = adapted_lambda(scores, self.lambdas.look_up(index, like=scores[:, 0]), lam0=self.lam0, alpha=self.alpha)
        if self.recording:
            self.lambdas.record(index, lam)
        distance = self.alpha * math.log(logits.shape[1]) / (2 * self.lam0) * (lam - self.lam0) ** 2
        return _ldr(scores, target, lam, self.margin) - target.weighted(distance)

    @override
    def samples_known(self, num_samples: int) -> None:
        self.lambdas.resize(num_samples)

    @override
    def extra_repr(self) -> str:
        return f"lam0={self.lam0}, alpha={self.alpha}, margin={self.margin}, normalize={self.normalize!r}"
