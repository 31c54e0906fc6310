# SPDX-License-Identifier: Apache-2.0
"""Telling data sets apart: what a teacher cache remembers of the samples that it is about."""

import hashlib
import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_robust.guards import rng_preserved

__all__ = ["describe_dataset", "labels_of"]

_ENDS = 16  # samples at either end that are looked at where not all labels are known
_LABELS = ("labels", "targets")


def labels_of(dataset: Any) -> Tensor | None:
    """All labels of a data set without loading its samples, ``[N]``; ``None`` where that is not possible.

    Reads ``labels`` or ``targets``, the last tensor of a ``TensorDataset``, and passes through ``Subset`` and what has
    ``dataset`` and ``indices`` like it.

    Args:
        dataset: a map-style data set.

    Example:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> labels_of(Subset(TensorDataset(torch.zeros(3, 2), torch.tensor([4, 5, 6])), [2, 0]))
        tensor([6, 4])
    """
    count = len(dataset)
    for value in (*(getattr(dataset, name, None) for name in _LABELS), _last_tensor(dataset)):
        if (labels := _as_labels(value, count)) is not None:
            return labels
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is None or indices is None:
        return None
    labels = labels_of(inner)
    return None if labels is None else labels[torch.as_tensor(indices, dtype=torch.long)]


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """What tells a data set from others: length, digests of labels, and how its samples are transformed.

    Args:
        dataset: a map-style data set; one with ``describe_view`` says by itself how its samples are made.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> sorted(describe_dataset(TensorDataset(torch.zeros(3, 2), torch.tensor([4, 5, 6]))))
        ['ends', 'labels', 'samples', 'transform', 'variants', 'view']
    """
    count = len(dataset)
    labels = labels_of(dataset)
    rows = [*range(min(count, _ENDS)), *range(max(count - _ENDS, _ENDS), count)]
    if labels is not None:
        ends = labels[rows].tolist()
    else:
        with rng_preserved():
            ends = [_label_in(dataset[row]) for row in rows]
    told = {
        "samples": count,
        "labels": None if labels is None else _digest(labels.tolist()),
        "ends": None if None in ends else _digest(ends),
        "view": "fixed",
        "variants": 1,
        "transform": transform_of(dataset),
    }
    describe = getattr(dataset, "describe_view", None)
    return told if describe is None else {**told, **describe()}


def transform_of(dataset: Any) -> str:
    """The transforms of a data set and of those that it wraps, as text that is the same in every process.

    Args:
        dataset: a map-style data set.
    """
    parts = []
    while dataset is not None:
        transform = getattr(dataset, "transforms", None) or getattr(dataset, "transform", None)
        if transform is not None:
            # one that draws by (seed, epoch) is another one with another seed
            seed = f"seed={dataset.seed}: " if hasattr(dataset, "set_epoch") and hasattr(dataset, "seed") else ""
            parts.append(seed + re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform)))
        dataset = getattr(dataset, "dataset", None)
    return "; ".join(parts)


def _last_tensor(dataset: Any) -> Any:
    tensors = getattr(dataset, "tensors", None)
    return tensors[-1] if isinstance(tensors, tuple) and tensors else None


def _as_labels(value: Any, count: int) -> Tensor | None:
    try:
        labels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.detach().cpu().long()


def _label_in(sample: Any) -> int | None:
    for leaf in tree_leaves(sample):
        if isinstance(leaf, Tensor) and leaf.ndim == 0 and not leaf.is_floating_point():
            return int(leaf)
        if isinstance(leaf, int):
            return leaf
    return None


def _digest(labels: list[int]) -> str:
    text = " ".join(map(str, labels))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
