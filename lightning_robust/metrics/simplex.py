# SPDX-License-Identifier: Apache-2.0
"""How close a set of vectors is to a simplex: equal lengths, equal angles, and the directions of a classifier."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["equiangularity", "equinorm", "row_blocks", "self_duality", "simplex_error"]

_ROWS = 1024


def row_blocks(count: int) -> Iterator[slice]:
    """Slices of the rows of a ``C x C`` matrix that are computed at a time, to bound memory.

    Args:
        count: number of rows.
    """
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def equinorm(vectors: Tensor) -> Tensor:
    """NC2, first half: standard deviation (unbiased) over mean of the lengths of the vectors; 0 for equal lengths.

    Args:
        vectors: centred class means, or the rows of the classifier, ``[C, D]``.
    """
    lengths = vectors.norm(dim=1)
    return lengths.std() / lengths.mean() if len(vectors) > 1 else torch.full_like(lengths.sum(), torch.nan)


def equiangularity(vectors: Tensor) -> Tensor:
    r"""NC2, second half: mean of :math:`|\cos(v_i, v_j) + 1/(C-1)|` over pairs; 0 for the angles of a simplex.

    Args:
        vectors: centred class means, or the rows of the classifier, ``[C, D]``.
    """
    count = len(vectors)
    if count < 2:
        return vectors.new_full((), torch.nan)
    unit, total = torch.nn.functional.normalize(vectors, dim=1), vectors.new_zeros(())
    for rows in row_blocks(count):
        off = (unit[rows] @ unit.T + 1 / (count - 1)).abs()
        off[torch.arange(len(off)), torch.arange(count)[rows]] = 0
        total = total + off.sum()
    return total / (count * (count - 1))


def simplex_error(vectors: Tensor, others: Tensor | None = None) -> Tensor:
    r"""Distance of the scaled products of two sets of vectors from a simplex, both halves of NC2 in one number.

    .. math:: \Big\lVert \frac{A B^\top}{\lVert A B^\top\rVert_F} - \frac{I - 11^\top/C}{\sqrt{C-1}} \Big\rVert_F

    Args:
        vectors: :math:`A`, centred class means or the rows of the classifier, ``[C, D]``.
        others: :math:`B`; ``vectors`` when ``None``. Classifier and class means give a form of NC3.

    References:
        Zhu et al., arXiv:2105.02375.
    """
    others = vectors if others is None else others
    count, total = len(vectors), vectors.new_zeros(())
    if count < 2:
        return vectors.new_full((), torch.nan)
    norm = torch.stack([(vectors[rows] @ others.T).square().sum() for rows in row_blocks(count)]).sum().sqrt()
    for rows in row_blocks(count):
        error = vectors[rows] @ others.T / norm + 1 / count / math.sqrt(count - 1)
        error[torch.arange(len(error)), torch.arange(count)[rows]] -= 1 / math.sqrt(count - 1)
        total = total + error.square().sum()
    return total.sqrt()


def self_duality(means: Tensor, weight: Tensor) -> Tensor:
    r"""NC3, :math:`\lVert W/\lVert W\rVert_F - M/\lVert M\rVert_F \rVert_F^2`: 0 for a classifier along the means.

    Args:
        means: centred class means :math:`M`, ``[C, D]``.
        weight: weights :math:`W` of the classifier, ``[C, D]``.

    References:
        Papyan et al., arXiv:2008.08186.
    """
    difference: Tensor = weight / weight.norm() - means / means.norm()
    return difference.square().sum()
