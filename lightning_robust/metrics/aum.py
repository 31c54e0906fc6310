# SPDX-License-Identifier: Apache-2.0
"""Area under the margin: samples whose label the network resists during training are probably mislabelled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_robust.checks import check_in_range, check_integer

__all__ = ["MarginTable", "ThresholdSamples", "assign_threshold_samples", "flag_suspicious", "logit_margin"]


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Logit of the label minus the largest other one, :math:`z_y - \max_{k\ne y} z_k`.

    Args:
        logits: logits.
        labels: class indices.

    Shape:
        ``[B, C]`` and ``[B]`` -> ``[B]``.

    References:
        Pleiss et al., arXiv:2001.10528.

    Example:
        >>> logit_margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([2])).tolist()
        [-2.0]
    """
    at_label = labels.unsqueeze(1)
    others = logits.scatter(1, at_label, -torch.inf)
    return logits.gather(1, at_label).squeeze(1) - others.amax(1)


class ThresholdSamples(NamedTuple):
    """Labels with a class of samples that cannot be learned from others.

    Args:
        labels: the labels, with the class ``num_classes`` for the threshold samples, int64 ``[N]``.
        indices: which samples these are, ascending.
    """

    labels: Tensor
    indices: Tensor


def assign_threshold_samples(
    labels: Tensor, *, num_classes: int | None = None, part: int = 0, seed: int = 0
) -> ThresholdSamples:
    """Give ``N / (C + 1)`` randomly chosen samples a made-up class, which shows how mislabelled samples behave.

    Train a network with one class more on these labels. Threshold samples are not judged, so train twice, with ``part``
    0 and 1, to judge every sample: the two choices are disjoint.

    Args:
        labels: the labels.
        num_classes: number of real classes; the largest label plus one when ``None``.
        part: which of the disjoint choices.
        seed: seed of the choice.

    Shape:
        ``[N]``.

    Raises:
        ValueError: there are not enough samples for this part.

    References:
        Pleiss et al., arXiv:2001.10528, section 3.2; the authors' script takes ``N / C``.

    Example:
        >>> chosen = assign_threshold_samples(torch.arange(12) % 3)
        >>> chosen.indices.numel(), chosen.labels[chosen.indices].unique().tolist()
        (3, [3])
    """
    check_integer("part", part, 0)
    check_integer("seed", seed, 0)
    labels = torch.as_tensor(labels).long()
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    check_integer("num_classes", classes, 2)
    count = len(labels) // (classes + 1)
    if count < 1 or (part + 1) * count > len(labels):
        raise ValueError(
            f"There are {len(labels)} labels, not enough for choice number {part} of {count} threshold samples; use a "
            f"smaller `part`, or more samples."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    indices = order[part * count : (part + 1) * count].sort().values
    changed = labels.clone()
    changed[indices] = classes
    return ThresholdSamples(changed, indices)


def flag_suspicious(aum: Tensor, threshold_samples: Tensor, *, percentile: float = 99.0) -> Tensor:
    """Which samples have a smaller area than the given percentile of the threshold samples.

    A sample is flagged if more than ``100 - percentile`` percent of the threshold samples have a larger area, as in the
    authors' code. Samples without an area (NaN) are not flagged.

    Args:
        aum: area under the margin of each sample.
        threshold_samples: indices of the threshold samples; those without an area do not count.
        percentile: percentile.

    Shape:
        ``[N]`` and ``[T]`` -> bool ``[N]``.

    Raises:
        ValueError: no threshold sample has an area.

    Example:
        >>> flag_suspicious(torch.tensor([-3.0, 1.0, -2.0, -1.0]), torch.tensor([2, 3])).tolist()
        [True, False, True, False]
    """
    check_in_range("percentile", percentile, 0, 100)
    reference = aum[threshold_samples]
    reference = reference[~reference.isnan()].sort().values
    if not len(reference):
        raise ValueError("No threshold sample has an area under the margin; was one of them trained on?")
    larger = len(reference) - torch.searchsorted(reference, aum.contiguous(), right=True)
    return (larger * 100 > (100 - percentile) * len(reference)) & ~aum.isnan()


class MarginTable:
    """Sum and number of the margins of every sample of a training set, and what the network said instead.

    Several processes record their own samples and add them up in :meth:`merge`. Sums are integers (fixed point with 40
    fractional bits), exact in any order, so that sharing and saving in between changes nothing; margins are cut at
    8192 on either side.

    Cost: 40 bytes per sample; nothing waits for the device.

    Args:
        num_samples: number of samples.
        device: where the table is kept.

    Example:
        >>> table = MarginTable(4)
        >>> table.record(torch.tensor([2, 0]), torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]), step=0)
        >>> table.aum.tolist(), table.visits.tolist()
        ([-1.0, nan, 2.0, nan], [1, 0, 1, 0])
    """

    def __init__(self, num_samples: int, *, device: torch.device | str = "cpu") -> None:
        check_integer("num_samples", num_samples, 1)
        self._sums = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self._visits = torch.zeros_like(self._sums)
        # what came since the last merge
        self._new_sums, self._new_visits = torch.zeros_like(self._sums), torch.zeros_like(self._visits)
        self._last = torch.full_like(self._visits, -1)  # (step, label, best other class) of the last visit, packed

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def visits(self) -> Tensor:
        """How often each sample was recorded, ``[N]``."""
        return self._visits + self._new_visits

    @property
    def aum(self) -> Tensor:
        """Mean margin of each sample, ``[N]``; NaN for one that was never recorded."""
        return (self._sums + self._new_sums).double() / _ONE / self.visits

    @property
    def labels(self) -> Tensor:
        """The label of each sample at its last visit, -1 for none."""
        return torch.where(self._last < 0, -1, (self._last // _CLASSES) % _CLASSES)

    @property
    def suggested(self) -> Tensor:
        """The largest other logit's class at the last visit, -1 for none."""
        return torch.where(self._last < 0, -1, self._last % _CLASSES)

    @torch.no_grad()
    def record(self, indices: Tensor, logits: Tensor, labels: Tensor, *, step: int) -> None:
        """Add one visit of each sample; samples with a negative label or a NaN margin are left out.

        Args:
            indices: which samples, ``[B]``.
            logits: their logits, ``[B, C]``.
            labels: their labels, ``[B]``.
            step: number of the step, which decides what the last visit was.
        """
        logits = logits.detach().to(self._sums.device).double()
        labels, indices = labels.to(logits.device).long(), indices.to(logits.device)
        known = labels >= 0
        labels = labels.clamp(min=0)
        margin = logit_margin(logits, labels)
        known = known & margin.isfinite()
        fixed = (torch.where(known, margin, 0.0).clamp(-_LARGEST, _LARGEST) * _ONE).round().long()
        other = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(1)
        self._new_sums.index_add_(0, indices, fixed)
        self._new_visits.index_add_(0, indices, known.long())
        packed = torch.where(known, (step * _CLASSES + labels) * _CLASSES + other, -1)
        self._last.scatter_reduce_(0, indices, packed, "amax")

    def merge(self, total: Callable[[Tensor], Tensor], latest: Callable[[Tensor], Tensor]) -> None:
        """Share what was recorded since the last merge.

        Args:
            total: sum of a tensor over the processes.
            latest: maximum of a tensor over the processes.
        """
        self._sums += total(self._new_sums)
        self._visits += total(self._new_visits)
        self._last = latest(self._last)
        self._new_sums.zero_()
        self._new_visits.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The table as tensors; what was not merged counts as well."""
        return {"sums": (self._sums + self._new_sums).cpu(), "visits": self.visits.cpu(), "last": self._last.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a table.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of another number of samples.
        """
        if len(state["sums"]) != len(self):
            raise ValueError(
                f"The checkpoint remembers {len(state['sums'])} samples but the training set has {len(self)}; continue "
                "on the same training set, or start anew."
            )
        device = self._sums.device
        self._sums, self._visits, self._last = (state[name].to(device).clone() for name in ("sums", "visits", "last"))
        self._new_sums.zero_()
        self._new_visits.zero_()


_ONE, _LARGEST = 2.0**40, 2.0**13
_CLASSES = 1 << 17  # more than any label; step, label and class fit into 63 bits together
