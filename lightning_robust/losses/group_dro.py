# SPDX-License-Identifier: Apache-2.0
"""Group distributionally robust optimisation: the groups that do worst count most."""

import math

import torch
from torch import Tensor, distributed
from typing_extensions import override

from lightning_robust.checks import check_integer, check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.cross_entropy import CrossEntropy
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.target import MixedTarget, Target
from lightning_robust.losses.wrapped import WrappedCriterion

__all__ = ["GroupDRO", "group_weights"]


def group_weights(weights: Tensor, losses: Tensor, *, step_size: float = 0.01, normalize: bool = False) -> Tensor:
    r"""Move the weights of groups towards those with a large loss: :math:`q_g \propto q_g\, e^{\eta \ell_g}`.

    Args:
        weights: The weights so far, ``[G]``.
        losses: Mean loss of each group, ``[G]``.
        step_size: The :math:`\eta`.
        normalize: Divide the losses by their sum first.

    Shape:
        ``[G]``, detached; the sum is one.

    Example:
        >>> group_weights(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 1.0]), step_size=1.0)
        tensor([0.7311, 0.2689])
    """
    with torch.no_grad():
        if normalize:
            losses = losses / losses.sum()
        return (weights.log() + step_size * losses).softmax(0)


class GroupDRO(WrappedCriterion):
    r"""Trains for the worst group instead of the average sample.

    .. math:: \sum_g q_g \ell_g, \qquad q_g \leftarrow \frac{q_g\, e^{\eta\, \ell_g}}{\sum_h q_h\, e^{\eta\, \ell_h}}

    :math:`\ell_g` is the mean loss of the samples of group :math:`g` in the batch, 0 if it has none. The weights
    :math:`q` start uniform and are updated before the loss of the same step, without gradient. A group is, for example,
    a combination of class and background. Models that fit every training sample need strong regularisation with it,
    weight decay of 0.1 to 1 or few epochs, or the worst group gains nothing.

    In several processes the sums of all of them make :math:`\ell_g`, so that :math:`q` is the same everywhere; the
    loss is the one of the whole batch, and its gradient is such that the mean over the processes, as
    ``DistributedDataParallel`` takes it, is that of the whole batch. A pass that does not count and evaluation use the
    :math:`q` that they find and the own samples, without communication.

    Cost: negligible; a sum of ``2 G`` numbers over the processes in each step.

    Args:
        num_groups: Number of groups; the callback reads the group of each sample from the batch, ``Criterion(...,
            group_key=...)``.
        step_size: How fast the weights move.
        normalize: Divide the losses of the groups by their sum before the weights are updated.
        adjustment: :math:`C` of the term :math:`C / \sqrt{n_g}` that is added to the loss of each group, for the larger
            generalisation gap of small groups; one number for all or one per group. It is part of the returned loss.
        group_counts: Number of training samples :math:`n_g` of each group; for ``adjustment``.
        base: Gives the loss of a sample; its own reduction is not used. The cross-entropy when ``None``.

    Shape:
        What ``base`` takes, and ``group``, the group of each sample, ``[B]``; gives a scalar.

    Raises:
        ValueError: If an argument is out of range, or if a group of a batch is.

    References:
        Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, arXiv:1911.08731. Their code leaves the
        adjustment out unless that of every group is above zero; here each group gets its own.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import GroupDRO
        >>> criterion = GroupDRO(num_groups=2, step_size=1.0)
        >>> logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> criterion(logits, labels, group=torch.tensor([0, 1]))
        tensor(1.8885)
        >>> criterion.q
        tensor([0.1192, 0.8808])
    """

    q: Tensor
    base: SampleCriterion

    def __init__(
        self,
        *,
        num_groups: int,
        step_size: float = 0.01,
        normalize: bool = False,
        adjustment: float | list[float] | None = None,
        group_counts: list[int] | None = None,
        base: SampleCriterion | None = None,
    ) -> None:
        super().__init__(CrossEntropy() if base is None else base)
        check_integer("num_groups", num_groups, 1)
        check_non_negative("step_size", step_size)
        if not isinstance(self.base, SampleCriterion):
            raise ValueError(
                f"GroupDRO needs the loss of each sample, but {type(self.base).__name__} gives one of the whole batch; "
                "take a base like CrossEntropy, or put GroupDRO inside: LogitClip(base=GroupDRO(...))."
            )
        self.num_groups = num_groups
        self.step_size = step_size
        self.normalize = normalize
        self.needs = ("group", *self.base.needs)
        self.batch_level = True
        self.register_buffer("q", torch.full((num_groups,), 1 / num_groups))
        self._shifts = _shifts(num_groups, adjustment, group_counts)
        self._shift = torch.tensor(self._shifts)

    @override
    def forward(self, logits: Tensor, target: Tensor | MixedTarget, **context: Tensor) -> Tensor:
        if "group" not in context:
            raise TypeError("GroupDRO is called as criterion(logits, target, group=...), but group is missing.")
        with autocast_off(logits):
            wide = full_precision(logits)
            base = self.base
            seen = Target.of(wide, target, weight=base.weight, ignore_index=base.ignore_index)
            if seen.soft and not base.soft_targets:
                seen.labels(type(base).__name__)  # refuses
            rest = {name: value for name, value in context.items() if name != "group"}
            base._check_context(rest)
            losses = seen.reduce(base.sample_losses(wide, seen, **rest), "none")
            shares = torch.ones_like(losses) if seen.soft else seen.weighted(torch.ones_like(losses))
            return self._robust(losses, seen.reduce(shares, "none").detach(), context["group"])

    def _robust(self, losses: Tensor, shares: Tensor, group: Tensor) -> Tensor:
        sums, counts = self._by_group(losses, group), self._by_group(shares, group)
        shift = self._shift_like(losses)
        if not self.recording:
            return self.q.to(losses, copy=True) @ (_means(sums, counts) + shift)
        processes, whole = _over_processes(torch.stack([sums.detach(), counts]))
        means = _means(*whole.unbind()) + shift
        q = group_weights(self.q.to(losses), means, step_size=self.step_size, normalize=self.normalize)
        self.q.copy_(q)  # a copy: the graph of this loss keeps its own
        if processes == 1:
            return q @ (_means(sums, counts) + shift)
        own = processes * (q @ _means(sums, whole[1]))
        return q @ means + (own - own.detach())

    def _shift_like(self, losses: Tensor) -> Tensor:
        # Not a buffer, which would be rounded to the precision of the module; it moves once.
        if self._shift.device != losses.device or self._shift.dtype != losses.dtype:
            self._shift = losses.new_tensor(self._shifts)
        return self._shift

    def _by_group(self, values: Tensor, group: Tensor) -> Tensor:
        if group.shape != values.shape[:1]:
            raise ValueError(f"Expected `group` of shape [{len(values)}] but got {tuple(group.shape)}.")
        group = group.long().view(-1, *[1] * (values.ndim - 1)).expand_as(values).reshape(-1)
        try:
            return values.new_zeros(self.num_groups).index_add(0, group, values.reshape(-1))
        except (IndexError, RuntimeError) as error:
            bad = group[(group < 0) | (group >= self.num_groups)]
            if not len(bad):
                raise
            raise ValueError(
                f"Expected groups from 0 to {self.num_groups - 1} (`num_groups` = {self.num_groups}) but got "
                f"{int(bad[0])}."
            ) from error

    @override
    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, step_size={self.step_size}, normalize={self.normalize}"


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / torch.where(counts == 0, 1.0, counts)


def _over_processes(values: Tensor) -> tuple[int, Tensor]:
    """Number of processes, and the sum over them."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return 1, values
    distributed.all_reduce(values)
    return distributed.get_world_size(), values


def _shifts(num_groups: int, adjustment: float | list[float] | None, group_counts: list[int] | None) -> list[float]:
    """What is added to the loss of each group."""
    if adjustment is None:
        return [0.0] * num_groups
    if group_counts is None or len(group_counts) != num_groups:
        raise ValueError(
            f"Expected `group_counts` with {num_groups} entries for `adjustment` but got {group_counts!r}."
        )
    each = adjustment if isinstance(adjustment, list) else [adjustment] * num_groups
    if len(each) != num_groups:
        raise ValueError(f"Expected `adjustment` to have {num_groups} entries but got {len(each)}.")
    for value, count in zip(each, group_counts, strict=True):
        check_non_negative("adjustment", value)
        check_integer("group_counts", count, 1)
    return [value / math.sqrt(count) for value, count in zip(each, group_counts, strict=True)]
