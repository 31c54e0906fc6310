# SPDX-License-Identifier: Apache-2.0
"""Hold samples out, the same part of every class."""

import numpy as np
from torch import Tensor

__all__ = ["stratified_split"]


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fraction of each class.

    Args:
        labels: class of each sample, ``[N]``.
        fraction: part that is held out, rounded within each class.
        seed: the same seed gives the same split on every machine.

    Returns:
        Indices that stay and indices that are held out, both in ascending order.

    Example:
        >>> import torch
        >>> stay, out = stratified_split(torch.tensor([0, 0, 1, 1]), 0.5, seed=0)
        >>> len(stay), len(out)
        (2, 2)
    """
    classes = labels.numpy()
    random = np.random.RandomState(seed)  # its stream is frozen by NumPy, unlike the newer generators'
    held: list[int] = []
    for value in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == value))
        held.extend(members[: round(fraction * len(members))].tolist())
    out = sorted(held)
    return sorted(set(range(len(classes))) - set(out)), out
