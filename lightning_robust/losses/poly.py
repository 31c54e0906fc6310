# SPDX-License-Identifier: Apache-2.0
"""PolyLoss: the first coefficient of the loss, seen as a polynomial in 1 - p, is free."""

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.focal import one_minus_p
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["PolyLoss", "poly_loss"]


def poly_loss(
    logits: Tensor, target: Tensor | MixedTarget | Target, *, eps1: float = 1.0, gamma: float = 0.0
) -> Tensor:
    r"""Poly-1 loss of each sample, :math:`-(1 - p_y)^\gamma \log p_y + \epsilon_1 (1 - p_y)^{\gamma + 1}`.

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        target: Class indices, class probabilities or a mixture; the loss is linear in the target.
        eps1: Coefficient of the extra term.
        gamma: 0 for the cross-entropy, above 0 for the focal loss.

    Shape:
        ``[B, ...]``, not reduced.

    References:
        Leng et al., arXiv:2204.12511.

    Example:
        >>> import torch
        >>> poly_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.2461])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        return Target.of(log_p, target).expected(log_p, lambda picked: _poly(picked, eps1, gamma))


def _poly(log_p: Tensor, eps1: float, gamma: float) -> Tensor:
    if gamma == 0:
        return -log_p - eps1 * log_p.expm1()
    rest = one_minus_p(log_p)
    return rest**gamma * (eps1 * rest - log_p)


class PolyLoss(SampleCriterion):
    r"""Cross-entropy or focal loss with one more term, which strengthens or weakens its pull far from the label.

    .. math:: -(1 - p_y)^\gamma \log p_y + \epsilon_1 (1 - p_y)^{\gamma + 1}

    A large :math:`\epsilon_1` bends the loss towards the mean absolute error. With soft, smoothed and mixed targets
    :math:`p_y` becomes :math:`\langle t, p \rangle` for ``gamma=0``, and the mean over the classes in general.

    Cost: that of the cross-entropy.

    Args:
        eps1: Coefficient of the extra term, at least -1: below, the loss rewards a wrong answer. The paper takes 2
            for EfficientNetV2 on ImageNet.
        gamma: Exponent of the focal loss; 0 is the cross-entropy.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If ``eps1`` is below -1 or ``gamma`` negative, or for an argument that every criterion refuses.

    References:
        Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions, arXiv:2204.12511.
        There is no official code in PyTorch; this is the formula of the paper.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import PolyLoss
        >>> PolyLoss(eps1=1.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.2461)
    """

    def __init__(
        self,
        *,
        eps1: float = 1.0,
        gamma: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_in_range("eps1", eps1, -1, float("inf"))
        check_non_negative("gamma", gamma)
        self.eps1 = eps1
        self.gamma = gamma

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        return poly_loss(logits, target, eps1=self.eps1, gamma=self.gamma)

    @override
    def extra_repr(self) -> str:
        return f"eps1={self.eps1}, gamma={self.gamma}, reduction={self.reduction!r}"
