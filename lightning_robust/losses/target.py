# SPDX-License-Identifier: Apache-2.0
"""What a loss compares logits with: class indices, class probabilities or a mixture of two labels, in one form."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["MixedTarget", "Reduction", "Target"]

Reduction = Literal["mean", "sum", "none"]


class MixedTarget(NamedTuple):
    r"""What mixing pairs of samples leaves as target: :math:`\lambda\,e_{first} + (1-\lambda)\,e_{second}`.

    Args:
        first: Class indices, ``[B]``.
        second: Class indices, ``[B]``.
        lam: Share of ``first``; one number for all (a scalar tensor) or one per sample, ``[B]``.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CrossEntropy, MixedTarget
        >>> target = MixedTarget(torch.tensor([0]), torch.tensor([2]), torch.tensor(0.75))
        >>> target.probabilities(3)
        tensor([[0.7500, 0.0000, 0.2500]])
        >>> CrossEntropy()(torch.zeros(1, 3), target)
        tensor(1.0986)
    """

    first: Tensor
    second: Tensor
    lam: Tensor

    def head(self, count: int) -> "MixedTarget":
        """The target of the first samples.

        Args:
            count: How many.
        """
        return MixedTarget(self.first[:count], self.second[:count], self.lam[:count] if self.lam.ndim else self.lam)

    def probabilities(self, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same target as class probabilities, ``[B, C]``.

        Args:
            num_classes: Number of classes.
            dtype: Of the result.
        """
        lam = self.lam.to(dtype).expand(self.first.shape).unsqueeze(1)
        found = torch.zeros(len(self.first), num_classes, dtype=dtype, device=self.first.device)
        found.scatter_add_(1, self.first.unsqueeze(1), lam)
        return found.scatter_add_(1, self.second.unsqueeze(1), 1 - lam)


class Target:
    r"""The target of a batch as per-sample losses see it, with class weights and ignored samples.

    A loss that is linear in the target, :math:`\ell(z, t) = \sum_k t_k\,\ell(z, k)`, is one call of :meth:`expected`,
    whatever the form of the target; hard labels then cost one lookup. Any other loss reads :meth:`labels` or
    :meth:`probabilities` and hands its values to :meth:`weighted`.

    Args:
        parts: Class indices with their share; the share is ``None`` where it is one.
        dense: Class probabilities of the shape of the logits, in place of ``parts``.
        weight: Weight of each class, ``[C]``.
        kept: Which samples count; ``None`` for all.
        ignore_index: Hard label of the samples that do not count, for messages.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import Target
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 4.0]])
        >>> Target.of(logits, torch.tensor([0, 1])).expected(logits)
        tensor([2., 4.])
        >>> Target.of(logits, torch.tensor([[0.5, 0.5], [0.0, 1.0]])).expected(logits, lambda z: z + 1)
        tensor([2., 5.])
    """

    def __init__(
        self,
        parts: list[tuple[Tensor, Tensor | None]],
        dense: Tensor | None,
        *,
        weight: Tensor | None = None,
        kept: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        self.weight = weight
        self.kept = kept
        self._parts = parts
        self._dense = dense
        self._ignore_index = ignore_index

    @classmethod
    def of(
        cls,
        logits: Tensor,
        target: "Tensor | MixedTarget | Target",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> "Target":
        """Bring a target into this form; one that has it already is returned as it is.

        Args:
            logits: ``[B, C]`` or ``[B, C, ...]``.
            target: Class indices ``[B, ...]`` (integers), class probabilities of the shape of ``logits``, or a mixture.
            weight: Weight of each class, ``[C]``.
            ignore_index: Hard label of the samples that do not count; class probabilities have no such label.

        Raises:
            ValueError: If shapes do not fit.
        """
        if isinstance(target, Target):
            return target
        _check_shapes(logits, target, weight)
        weight = None if weight is None else weight.to(logits)
        if isinstance(target, Tensor) and target.is_floating_point():
            return cls([], target.to(logits.dtype), weight=weight)
        labels = [target] if isinstance(target, Tensor) else [target.first, target.second]
        labels = [each.long() for each in labels]
        kept = labels[0] != ignore_index
        shares: list[Tensor | None] = [None]
        if isinstance(target, MixedTarget):
            kept = kept & (labels[1] != ignore_index)
            lam = target.lam.to(logits.dtype)
            shares = [lam, 1 - lam]
        # A product, because `where` with a number costs a tensor and a copy of it.
        indices = [each * kept for each in labels]
        return cls(list(zip(indices, shares, strict=True)), None, weight=weight, kept=kept, ignore_index=ignore_index)

    @property
    def soft(self) -> bool:
        """Whether the target is more than one class index per sample."""
        return self._dense is not None or len(self._parts) > 1

    @property
    def pair(self) -> MixedTarget | None:
        """The two labels of each sample and their shares, of a mixture; the labels of ignored samples are 0."""
        if len(self._parts) < 2:
            return None
        (first, lam), (second, _) = self._parts
        assert lam is not None
        return MixedTarget(first, second, lam)

    def expected(self, values: Tensor, of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Mean of ``of(values)`` under the target, times class weights: ``sum_k w_k t_k of(values)_k``, ``[B, ...]``.

        Args:
            values: Something per class, ``[B, C, ...]``.
            of: An elementwise function; hard labels and mixtures evaluate it only where they look.
        """
        if self._dense is not None:
            return (self.weigh_classes(self._dense) * (values if of is None else of(values))).sum(1)
        return self._sum(values, of, self.weight)

    def pick(self, values: Tensor) -> Tensor:
        """The mean of ``values`` under the target without class weights, ``sum_k t_k values_k``, ``[B, ...]``.

        Args:
            values: Something per class, ``[B, C, ...]``.
        """
        return (self._dense * values).sum(1) if self._dense is not None else self._sum(values, None, None)

    def weighted(self, losses: Tensor) -> Tensor:
        """``losses`` times the class weight of each sample, ``sum_k w_k t_k``; for losses not linear in the target.

        Args:
            losses: ``[B, ...]``.
        """
        weights = self._weights()
        return losses if weights is None else losses * weights

    def weigh_classes(self, values: Tensor) -> Tensor:
        """``values`` times the weight of their class.

        Args:
            values: Something per class, ``[B, C, ...]``.
        """
        return values if self.weight is None else values * self.weight.view(1, -1, *[1] * (values.ndim - 2))

    def labels(self, who: str) -> Tensor:
        """Class indices, ``[B, ...]``; those of ignored samples are 0.

        Args:
            who: What needs them; named in a refusal.

        Raises:
            ValueError: If the target is soft.
        """
        if self.soft:
            raise ValueError(
                f"{who} needs class indices as targets, but got class probabilities or mixed labels; leave out label "
                "mixing and smoothing of targets, or choose a loss that is defined for them."
            )
        return self._parts[0][0]

    def probabilities(self, like: Tensor) -> Tensor:
        """Class probabilities of the shape of ``like``.

        Args:
            like: Logits ``[B, C, ...]``, of whose type the result is.
        """
        if self._dense is not None:
            return self._dense
        found = torch.zeros_like(like)
        for index, share in self._parts:
            ones = torch.ones_like(index, dtype=like.dtype) if share is None else share.expand(index.shape)
            try:
                found.scatter_add_(1, index.unsqueeze(1), ones.unsqueeze(1))
            except (IndexError, RuntimeError) as error:
                self._refuse_no_class(index, like.shape[1], error)
                raise
        return found

    def reduce(self, losses: Tensor, reduction: Reduction) -> Tensor:
        """Leave ignored samples out and reduce, with the meaning that torch gives to a mean.

        The mean of hard labels divides by the sum of their class weights, that of soft ones by the number of samples.
        Where nothing counts it is 0 with zero gradients.

        Args:
            losses: Values that have their class weights already, ``[B, ...]``.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        """
        if self.kept is not None:
            losses = torch.where(self.kept, losses, 0.0)
        if reduction == "none":
            return losses
        total = losses.sum()
        if reduction == "sum":
            return total
        if self.kept is None:
            return total / max(losses.numel(), 1)
        weights = None if self.soft else self._weights()
        # Nothing counts when every label is ignored or has weight zero: 0 instead of 0 / 0.
        if weights is None:
            return total / self.kept.sum().clamp(min=1)
        denominator = torch.where(self.kept, weights, 0.0).sum()
        nothing = denominator == 0
        return torch.where(nothing, total * 0, total / torch.where(nothing, 1, denominator))

    def _weights(self) -> Tensor | None:
        if self.weight is None:
            return None
        if self._dense is not None:
            return self.weigh_classes(self._dense).sum(1)
        return self._sum_of([self.weight[index] for index, _ in self._parts])

    def _sum(self, values: Tensor, of: Callable[[Tensor], Tensor] | None, weight: Tensor | None) -> Tensor:
        found = []
        for index, _ in self._parts:
            value = self._look_up(values, index)
            value = value if of is None else of(value)
            found.append(value if weight is None else value * weight[index])
        return self._sum_of(found)

    def _sum_of(self, values: list[Tensor]) -> Tensor:
        shares = [share for _, share in self._parts]
        terms = [value if share is None else share * value for value, share in zip(values, shares, strict=True)]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def _look_up(self, values: Tensor, index: Tensor) -> Tensor:
        try:
            return values.gather(1, index.unsqueeze(1)).squeeze(1)
        except (IndexError, RuntimeError) as error:
            self._refuse_no_class(index, values.shape[1], error)
            raise

    def _refuse_no_class(self, index: Tensor, classes: int, error: Exception) -> None:
        """Looked at only after a lookup failed, so that it costs nothing otherwise."""
        bad = (index < 0) | (index >= classes)
        if bool(bad.any()):
            raise ValueError(
                f"Expected labels to be in [0, {classes - 1}] for logits of {classes} classes, or `ignore_index` = "
                f"{self._ignore_index}, but got {int(index[bad][0])}."
            ) from error


def _check_shapes(logits: Tensor, target: Tensor | MixedTarget, weight: Tensor | None) -> None:
    if logits.ndim < 2:
        raise ValueError(f"Expected `logits` to be [B, C] or [B, C, ...] but got shape {tuple(logits.shape)}.")
    classes, samples = logits.shape[1], logits.shape[:1] + logits.shape[2:]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"Expected `weight` to have {classes} entries but got shape {tuple(weight.shape)}.")
    if isinstance(target, Tensor):
        if target.shape != (logits.shape if target.is_floating_point() else samples):
            raise ValueError(
                f"Expected `target` to be class indices of shape {tuple(samples)} or floating-point class "
                f"probabilities of shape {tuple(logits.shape)} but got shape {tuple(target.shape)} and {target.dtype}."
            )
        return
    if not target.first.shape == target.second.shape == samples or target.lam.shape not in ((), samples):
        raise ValueError(
            f"Expected a mixed target of two labels of shape {tuple(samples)} and a share of that shape or a scalar "
            f"but got {tuple(target.first.shape)}, {tuple(target.second.shape)} and {tuple(target.lam.shape)}."
        )
