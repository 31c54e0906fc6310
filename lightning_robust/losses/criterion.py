# SPDX-License-Identifier: Apache-2.0
"""Base classes of the losses that compare logits with a target."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_choice
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.table import SampleTable
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["CONTEXT", "Criterion", "SampleCriterion"]

#: What a criterion may need to know of each sample, and what the callback ``Criterion`` can tell it.
CONTEXT = ("index", "features", "group")


class Criterion(nn.Module):
    """A loss ``criterion(logits, target) -> scalar``; subclasses implement :meth:`forward`.

    Implementations accept hard targets (class indices), soft targets (rows that sum to one) and mixtures of two labels
    (:class:`MixedTarget`), compute in float32 (float64 for float64 logits) with autocast disabled, and build everything
    from ``log_softmax``, so that they stay finite at logits of +-120. :class:`SampleCriterion` does all of that for a
    loss that is a mean over samples.

    The flags below say what a criterion needs beyond logits and target. The callback ``Criterion`` looks at them, tells
    the criterion what it needs and keeps its state in checkpoints; in a loop of your own, do what they ask for.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import Criterion
        >>> class Brier(Criterion):
        ...     def forward(self, logits, target):
        ...         one_hot = torch.nn.functional.one_hot(target, logits.shape[1])
        ...         return (logits.float().softmax(1) - one_hot).square().sum(1).mean()
        >>> Brier()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.7500)
    """

    #: Tensors with one row per sample that :meth:`forward` gets by name: "index", "features", "group".
    needs: tuple[str, ...] = ()
    #: Whether :meth:`epoch_starts` and :meth:`epoch_ends` have to be called.
    needs_epoch: bool = False
    #: Whether :meth:`observe` and :meth:`validation_ends` have to be called.
    needs_validation: bool = False
    #: Whether the loss is no mean over samples: a value of its own per batch, that no reduction takes apart.
    batch_level: bool = False
    #: Whether class probabilities and mixtures are accepted as targets.
    soft_targets: bool = True
    #: How the callback logs a criterion that takes the place of a loss which it cannot see, ``train/NAME``.
    name: ClassVar[str] = "criterion"

    def __init__(self) -> None:
        super().__init__()
        self._counted = True

    @property
    def recording(self) -> bool:
        """Whether a forward may change what the criterion remembers: in training mode, in a pass that counts."""
        return self.training and self._counted

    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        """Return the loss.

        Args:
            logits: Scores before the softmax, ``[B, C]``.
            target: Class indices ``[B]``, class probabilities ``[B, C]``, or a mixture of two labels.
            **context: What :attr:`needs` names.
        """
        raise NotImplementedError

    def counted(self, yes: bool) -> None:
        """Say whether the next forwards belong to a pass that counts; a sharpness-aware ascent, for one, does not."""
        for module in self.modules():
            if isinstance(module, Criterion):
                module._counted = yes

    def samples_known(self, num_samples: int) -> None:
        """Learn the number of training samples, once before the first step; for criteria that need "index"."""

    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        """Learn the epoch (counted from 0) and the number of epochs (-1: unknown), before its first batch."""

    def epoch_ends(self, epoch: int, total: Callable[[Tensor], Tensor]) -> None:
        """Close an epoch, in all processes at once.

        Args:
            epoch: Counted from 0.
            total: Sums a tensor over the processes; the identity in a loop of one.
        """

    def synchronise(self, total: Callable[[Tensor], Tensor]) -> None:
        """Give all processes what each of them remembers; before an epoch ends and before a checkpoint is written.

        Args:
            total: Sums a tensor over the processes.
        """
        for module in self.modules():
            if isinstance(module, SampleTable):
                module.merge(total)

    def observe(self, logits: Tensor, target: Tensor) -> None:
        """Look at a validation batch."""

    def validation_ends(self, total: Callable[[Tensor], Tensor]) -> None:
        """Close a validation epoch, in all processes at once; ``total`` sums a tensor over them."""


class SampleCriterion(Criterion, ABC):
    """A mean of per-sample losses; subclasses implement :meth:`sample_losses` and nothing else.

    Precision, the form of the target, class weights, ignored samples and the reduction are taken care of here.

    Args:
        weight: Weight of each class.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]`` or ``[B, C, ...]``; ``target`` ``[B, ...]``, the shape of ``logits``, or a mixture. A
        scalar, or ``[B, ...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If an argument is out of range, shapes do not fit or a label is no class.
        TypeError: If a forward is not given what :attr:`needs` names.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import SampleCriterion
        >>> class Wrongness(SampleCriterion):
        ...     def sample_losses(self, logits, target, **context):
        ...         return target.expected(logits.softmax(1), lambda p: 1 - p)
        >>> Wrongness()(torch.zeros(2, 4), torch.tensor([0, -100]))
        tensor(0.7500)
    """

    weight: Tensor | None

    def __init__(
        self, *, weight: list[float] | None = None, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        # The weights come from the arguments, so a checkpoint does not repeat them.
        self.register_buffer("weight", None if weight is None else torch.tensor(weight), persistent=False)

    @abstractmethod
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        """Return the loss of each sample with its class weight, ``[B, ...]``.

        Args:
            logits: ``[B, C, ...]`` in full precision.
            target: The target; its methods bring the class weights in.
            **context: What :attr:`needs` names.
        """

    @override
    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        self._check_context(context)
        with autocast_off(logits):
            wide = full_precision(logits)
            seen = Target.of(wide, target, weight=self.weight, ignore_index=self.ignore_index)
            if seen.soft and not self.soft_targets:
                seen.labels(type(self).__name__)  # refuses
            return seen.reduce(self.sample_losses(wide, seen, **context), self.reduction)

    def _check_context(self, context: dict[str, Tensor]) -> None:
        if sorted(context) != sorted(self.needs):
            missing = [name for name in self.needs if name not in context]
            wrong = missing or [name for name in context if name not in self.needs]
            told = ", ".join(f"{name}=..." for name in self.needs) or "nothing"
            raise TypeError(
                f"{type(self).__name__} is called as criterion(logits, target) with {told} beside it, but "
                f"{', '.join(wrong)} {'is missing' if missing else 'was given'}; the callback Criterion passes what a "
                "criterion needs by itself."
            )

    @override
    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
