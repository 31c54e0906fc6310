# SPDX-License-Identifier: Apache-2.0
"""Active-passive losses: a normalised loss that raises the label, and one that lowers everything else."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.losses.absolute_error import LOG_ZERO, check_log_zero, reverse
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.focal import focal_of
from lightning_robust.losses.gce import check_min_probability, check_q, power_minus_one
from lightning_robust.losses.normalised import normalised
from lightning_robust.losses.target import Reduction, Target

__all__ = ["ActivePassive"]

Active = Literal["nce", "nfl", "ngce"]
Passive = Literal["mae", "rce"]


class ActivePassive(SampleCriterion):
    r"""Sum of an active and a passive robust loss, which together fit well and stand label noise (APL).

    .. math:: \alpha\, \ell_{active} + \beta\, \ell_{passive}

    The active loss (:class:`NCE`, :class:`NFL` or :class:`NGCE`) raises the probability of the label, the passive one
    (:class:`MAE` or :class:`RCE`) lowers the others. Published weights ``(alpha, beta)`` of NCE + RCE: MNIST (1, 10),
    CIFAR-10 (1, 1), CIFAR-100 (10, 0.1), WebVision (50, 0.1); with MAE, CIFAR-100 (10, 1) and WebVision (50, 1).
    The more classes, the larger ``alpha`` has to be.

    Cost: that of its active part: one more pass over the logits than the cross-entropy for ``"nce"``, some more for
    the others; with ``min_probability`` again some more.

    Args:
        alpha: Share of the active loss.
        beta: Share of the passive loss.
        active: ``"nce"``, ``"nfl"`` or ``"ngce"``.
        passive: ``"mae"`` or ``"rce"``.
        gamma: Exponent of ``"nfl"``.
        q: Exponent of ``"ngce"``.
        log_zero: What ``"rce"`` takes for the logarithm of zero.
        min_probability: Floor of probabilities in ``"ngce"`` and ``"rce"``, without gradient below it; 1e-7 reproduces
            the authors' code. The formulas need none.
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture.

    Raises:
        ValueError: If an argument is out of range, for logits of one class, or for what every criterion refuses.

    References:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, arXiv:2006.13554.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import ActivePassive
        >>> ActivePassive()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(1.1542)
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        active: Active = "nce",
        passive: Passive = "rce",
        gamma: float = 0.5,
        q: float = 0.7,
        log_zero: float = LOG_ZERO,
        min_probability: float = 0.0,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_choice("active", active, ("nce", "nfl", "ngce"))
        check_choice("passive", passive, ("mae", "rce"))
        for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
            check_non_negative(name, value)
        check_q(q)
        check_log_zero(log_zero)
        check_min_probability(min_probability)
        self.alpha = alpha
        self.beta = beta
        self.active: Active = active
        self.passive: Passive = passive
        self.gamma = gamma
        self.q = q
        self.log_zero = log_zero
        self.min_probability = min_probability

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        active = normalised(log_p, target, self._active_term())
        if self.passive == "mae":
            passive = reverse(log_p, target, -1.0)
        else:
            passive = reverse(log_p, target, self.log_zero, self.min_probability)
        return self.alpha * active + self.beta * passive

    def _active_term(self) -> Callable[[Tensor], Tensor] | None:
        if self.active == "nfl":
            return partial(focal_of, gamma=self.gamma, detach=True)
        if self.active == "ngce":
            return partial(power_minus_one, q=self.q, min_probability=self.min_probability)
        return None

    @override
    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, active={self.active!r}, passive={self.passive!r}, "
            f"reduction={self.reduction!r}"
        )
