# SPDX-License-Identifier: Apache-2.0
"""Base class of the criteria that add a calibration error of the whole batch to another criterion."""

from collections.abc import Callable

import torch
import torch.distributed.nn.functional
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_non_negative
from lightning_robust.losses.criterion import Criterion, SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Target

__all__ = ["BatchPenalty"]


class BatchPenalty(Criterion):
    """A criterion plus a weight times a penalty on the confidences of a batch; subclasses implement :meth:`penalty`.

    Args:
        weight: Factor of the penalty.
        base: The criterion that it is added to; cross-entropy when ``None``.
        ignore_index: Hard label of the samples that do not count; a ``base`` that has one brings its own.
        gather: Whether several processes compute the penalty of their common batch.

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]`` and class indices ``[B, ...]`` give a scalar.

    Raises:
        ValueError: If ``weight`` is negative or ``base`` does not reduce to a scalar; in a forward, if the target is
            soft.
        TypeError: If a forward is given what neither it nor ``base`` needs.

    Example:
        >>> import torch
        >>> from lightning_robust.losses.batch_penalty import BatchPenalty
        >>> class Gap(BatchPenalty):
        ...     def penalty(self, confidence, correct, kept):
        ...         return torch.where(kept, confidence - correct, 0.0).sum().abs() / kept.sum()
        >>> Gap(weight=1.0)(torch.zeros(2, 2), torch.tensor([0, 0]))
        tensor(1.1931)
    """

    batch_level = True
    soft_targets = False

    def __init__(
        self, *, weight: float, base: Criterion | None = None, ignore_index: int = -100, gather: bool = False
    ) -> None:
        super().__init__()
        check_non_negative("weight", weight)
        if getattr(base, "reduction", "mean") == "none":
            raise ValueError('Expected `base` to give a scalar but got reduction="none"; use "mean".')
        self.weight = weight
        self.base = base
        # A base may wrap the criterion that knows.
        modules = () if base is None else base.modules()
        known = [module.ignore_index for module in modules if isinstance(module, SampleCriterion)]
        self.ignore_index = known[0] if known else ignore_index
        self.gather = gather
        if base is not None:
            self.needs = base.needs
            self.needs_epoch = base.needs_epoch
            self.needs_validation = base.needs_validation

    def penalty(self, confidence: Tensor, correct: Tensor, kept: Tensor) -> Tensor:
        """Return the penalty of a batch, a scalar; 0 with zero gradients where no sample counts.

        Args:
            confidence: Largest probability of each sample, ``[N]``.
            correct: 1 where the prediction is right, else 0, ``[N]``.
            kept: Which samples count, ``[N]``.
        """
        raise NotImplementedError

    @override
    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        if self.base is None and context:
            raise TypeError(
                f"{type(self).__name__} needs nothing beside logits and target but was given {', '.join(context)}."
            )
        with autocast_off(logits):
            wide = full_precision(logits)
            seen = Target.of(wide, target, ignore_index=self.ignore_index)
            labels = seen.labels(type(self).__name__)
            assert seen.kept is not None
            log_p = wide.log_softmax(1)
            top, answer = log_p.max(1)
            columns = (top.exp(), (answer == labels).to(wide), seen.kept.to(wide))
            rows = torch.stack([column.flatten() for column in columns])
            # Validation batches may differ in number from one process to the next, and nobody trains on them.
            if self.gather and torch.is_grad_enabled() and _several_processes():
                rows = torch.cat(torch.distributed.nn.functional.all_gather(rows), dim=1)  # type: ignore[no-untyped-call]
            penalty = self.weight * self.penalty(rows[0], rows[1].detach(), rows[2].detach().bool())
            if self.base is None:
                # The cross-entropy from the same log-probabilities: another pass less.
                return seen.reduce(-seen.pick(log_p), "mean") + penalty
        loss: Tensor = self.base(logits, target, **context)
        return loss + penalty

    @override
    def samples_known(self, num_samples: int) -> None:
        if self.base is not None:
            self.base.samples_known(num_samples)

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        if self.base is not None:
            self.base.epoch_starts(epoch, max_epochs)

    @override
    def epoch_ends(self, epoch: int, total: Callable[[Tensor], Tensor]) -> None:
        if self.base is not None:
            self.base.epoch_ends(epoch, total)

    @override
    def observe(self, logits: Tensor, target: Tensor) -> None:
        if self.base is not None:
            self.base.observe(logits, target)

    @override
    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None:
        if self.base is not None:
            self.base.validation_ends(total)

    @override
    def extra_repr(self) -> str:
        return f"weight={self.weight}, gather={self.gather}"


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
