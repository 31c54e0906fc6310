# SPDX-License-Identifier: Apache-2.0
"""Margin-based label smoothing: only gaps to the largest logit beyond a margin cost something."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_non_negative
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["CALS", "MbLS", "margin_penalty"]

_LARGEST_WEIGHT = 1e6


def margin_penalty(logits: Tensor, *, margin: float = 10.0, class_weights: Tensor | None = None) -> Tensor:
    r"""Mean excess of the gaps to the largest logit over a margin, of each sample.

    .. math:: \frac{1}{C}\sum_k w_k \max(0, z_{max} - z_k - m)

    Args:
        logits: Scores before the softmax, ``[B, C]`` or ``[B, C, ...]``.
        margin: Gap :math:`m` that costs nothing.
        class_weights: Weight :math:`w_k` of each class, ``[C]``; one for all when ``None``.

    Shape:
        ``[B]`` or ``[B, ...]``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import margin_penalty
        >>> margin_penalty(torch.tensor([[5.0, 0.0]]), margin=3.0)
        tensor([1.])
    """
    excess = _excess(logits, margin)
    if class_weights is not None:
        excess = excess * class_weights.to(excess).view(1, -1, *[1] * (excess.ndim - 2))
    return excess.sum(1) / excess.shape[1]


class MbLS(LogitRegularizer):
    r"""Margin-based label smoothing: adds :math:`\alpha\,\mathrm{mean}(r(z))` to any criterion.

    .. math:: r(z) = \frac{1}{C}\sum_k \max(0, z_{max} - z_k - m)

    Label smoothing pulls all logits together; here they may differ by the margin, so that the prediction stays
    informative. With :math:`m = 0` this is MaxSup with the same factor. The gradient also flows through the largest
    logit.

    Cost: finding the largest logit and the excess over it, together about 1.5 cross-entropies on a CPU.

    Args:
        alpha: Factor of the penalty.
        margin: Gap :math:`m` to the largest logit that costs nothing.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar.

    Raises:
        ValueError: If ``alpha`` is not finite or ``margin`` is negative.

    References:
        Liu et al., arXiv:2111.15430. Their code applies the penalty to ignored samples unless its ``ignore_index`` is
        set to zero or above; here ignored samples never count.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import MbLS
        >>> MbLS(alpha=0.1, margin=3.0)(torch.tensor([[5.0, 0.0]]))
        tensor(0.1000)
    """

    name: ClassVar[str] = "mbls"
    coefficient_name: ClassVar[str] = "alpha"

    def __init__(self, *, alpha: float | Schedule = 0.1, margin: float = 10.0) -> None:
        super().__init__(coefficient=alpha)
        check_non_negative("margin", margin)
        self.margin = margin

    @override
    def penalty(self, logits: Tensor) -> Tensor:
        return margin_penalty(logits, margin=self.margin)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}"


class CALS(MbLS):
    r"""Class-adaptive margin penalty: :class:`MbLS` with a weight per class that follows the validation data.

    .. math:: r(z) = \frac{1}{C}\sum_k w_k \max(0, z_{max} - z_k - m)

    After a validation epoch the score :math:`s_k = \mathrm{mean}_n\,w_k\max(0, z_{max} - z_k - m)` of each class is
    compared with that of the validation epoch before it: where it grew by more than the factor :math:`\tau` the weight
    is multiplied by :math:`\gamma`, where it fell by more than :math:`\tau` it is divided by :math:`\gamma`. Weights
    start at 1 and stay in [1e-6, 1e6].

    The callback :class:`~lightning_robust.callbacks.LogitRegularization` shows it the validation batches; in a loop of
    your own call ``observe(logits, labels)`` for each of them and then ``validation_ends(total)``.

    Cost: about two cross-entropies on a CPU in a training step, and the forward part of it per validation batch.

    Args:
        num_classes: Number of classes.
        alpha: Factor of the penalty.
        margin: Gap :math:`m` to the largest logit that costs nothing.
        gamma: Factor :math:`\gamma` by which weights change.
        tau: Change of the score that counts.
        every: Weights change after every so many validation epochs.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` give a scalar; ``class_weights`` is ``[C]``.

    Raises:
        ValueError: If ``alpha`` is not finite, ``margin`` is negative, ``gamma`` or ``tau`` is not a number of at least
            1 (``gamma`` above 1), or logits have another number of classes.
        RuntimeError: If a validation epoch ends in which no sample was observed.

    References:
        Liu et al., arXiv:2211.15088, with the heuristic rule of the published code (its augmented Lagrangian is not
        here). There the factor per class is :math:`\alpha w_k`, the bounds are those of this product, and the default
        waits for 100 epochs. Scores of several processes are their mean there and the mean over samples here.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CALS
        >>> penalty = CALS(num_classes=2, margin=3.0, gamma=2.0)
        >>> for gap in (4.0, 8.0):
        ...     penalty.observe(torch.tensor([[gap, 0.0]]), torch.tensor([0]))
        ...     penalty.validation_ends(lambda tensor: tensor)
        >>> penalty.class_weights
        tensor([1., 2.])
    """

    name: ClassVar[str] = "cals"
    needs_validation = True
    level: Tensor
    score: Tensor
    validations: Tensor
    sums: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: float | Schedule = 0.1,
        margin: float = 10.0,
        gamma: float = 1.1,
        tau: float = 1.1,
        every: int = 1,
    ) -> None:
        super().__init__(alpha=alpha, margin=margin)
        check_integer("num_classes", num_classes, 2)
        check_integer("every", every, 1)
        for name, value, fits in (("gamma", gamma, gamma > 1), ("tau", tau, tau >= 1)):
            if not (fits and value < _LARGEST_WEIGHT):
                raise ValueError(f"Expected `{name}` to be {'>' if name == 'gamma' else '>='} 1 but got {value!r}.")
        self.num_classes = num_classes
        self.gamma = gamma
        self.tau = tau
        self.every = every
        # Weights are powers of gamma. Kept as whole exponents they are the same in every precision of the module.
        self.register_buffer("level", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("score", torch.zeros(num_classes))
        self.register_buffer("validations", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(num_classes), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @property
    def class_weights(self) -> Tensor:
        """Weight of each class, ``[C]``."""
        return self._weights_like(self.score)

    @override
    def penalty(self, logits: Tensor) -> Tensor:
        self._check_classes(logits)
        return margin_penalty(logits, margin=self.margin, class_weights=self._weights_like(logits))

    @override
    @torch.no_grad()
    def observe(self, logits: Tensor, target: Tensor) -> None:
        """Add a validation batch to the scores; samples whose hard label is no class do not count.

        Args:
            logits: ``[B, C]`` or ``[B, C, ...]``.
            target: Class indices ``[B, ...]``, or anything else that says nothing about ignored samples.
        """
        self._check_classes(logits)
        with autocast_off(logits):
            excess = _excess(logits, self.margin).movedim(1, -1)
            kept = torch.ones(excess.shape[:-1], dtype=torch.bool, device=excess.device)
            if target.shape == kept.shape and not target.is_floating_point():
                kept = (target >= 0) & (target < self.num_classes)
            weighted = torch.where(kept.unsqueeze(-1), excess * self._weights_like(excess), 0.0)
            # In place: under inference mode a new tensor could not be used in training.
            self.sums += weighted.reshape(-1, self.num_classes).sum(0)
            self.count += kept.sum()

    @override
    @torch.no_grad()
    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None:
        """Compare the scores with the last ones and change the weights.

        Args:
            total: Sums a tensor over the processes.
        """
        sums = total(torch.cat([self.sums, self.count[None]]))
        if not bool(sums[-1] > 0):
            raise RuntimeError(
                "CALS saw no validation sample in this validation epoch; call `observe(logits, target)` for every "
                "validation batch, or run with validation data."
            )
        score = sums[:-1] / sums[-1]
        self.validations += 1
        if bool(self.score.sum() != 0) and int(self.validations) % self.every == 0:
            grew = (score > self.score * self.tau).long()
            fell = (score < self.score / self.tau).long()
            bound = self._largest_level()
            self.level.copy_((self.level + grew - fell).clamp(-bound, bound))
        self.score.copy_(score)
        self.sums.zero_()
        self.count.zero_()

    def _weights_like(self, values: Tensor) -> Tensor:
        return self.gamma ** self.level.to(full_precision(values).dtype)

    def _largest_level(self) -> int:
        level = 0
        while self.gamma ** (level + 1) <= _LARGEST_WEIGHT:
            level += 1
        return level

    def _check_classes(self, logits: Tensor) -> None:
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Expected logits of {self.num_classes} classes, as `num_classes` says, but got {logits.shape[1]}."
            )

    @override
    def extra_repr(self) -> str:
        settings = f"gamma={self.gamma}, tau={self.tau}, every={self.every}"
        return f"num_classes={self.num_classes}, {super().extra_repr()}, {settings}"


def _excess(logits: Tensor, margin: float) -> Tensor:
    logits = full_precision(logits)
    return (logits.max(1, keepdim=True).values - margin - logits).relu_()
