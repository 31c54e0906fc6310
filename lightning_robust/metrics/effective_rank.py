# SPDX-License-Identifier: Apache-2.0
"""How many directions a set of features really uses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_robust.checks import check_integer

__all__ = ["EffectiveRank", "Ranks", "effective_rank", "gram_of", "stable_rank"]


class Ranks(NamedTuple):
    """Two smooth counts of the directions that features use.

    Args:
        effective: exponential of the entropy of the singular values.
        stable: squared Frobenius norm over squared spectral norm; at most the effective rank of the squares.
    """

    effective: Tensor
    stable: Tensor


def effective_rank(singular_values: Tensor) -> Tensor:
    r"""Exponential of the entropy of the singular values, between 1 and their number.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \quad p_i = \sigma_i / \sum_j \sigma_j

    Args:
        singular_values: the singular values :math:`\sigma \ge 0`.

    Shape:
        ``[R]`` -> scalar; NaN if all of them are zero.

    References:
        Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])).item(), 4)
        2.0
    """
    p: Tensor = singular_values / singular_values.sum()
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy.exp()


def stable_rank(singular_values: Tensor) -> Tensor:
    r"""Squared Frobenius norm over squared spectral norm, :math:`\sum_i \sigma_i^2 / \max_i \sigma_i^2`.

    Args:
        singular_values: the singular values.

    Shape:
        ``[R]`` -> scalar; NaN if all of them are zero.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0])).item()
        1.25
    """
    squares = singular_values.square()
    return squares.sum() / squares.max()


def gram_of(outer: Tensor, total: Tensor, count: Tensor, *, centered: bool = True) -> Tensor:
    r"""The Gram matrix :math:`H^\top H` of the features, with their mean taken away if wanted.

    Args:
        outer: :math:`\sum h h^\top`, ``[D, D]``.
        total: :math:`\sum h`, ``[D]``.
        count: number of samples.
        centered: whether the mean is taken away.
    """
    return outer - torch.outer(total, total) / count if centered else outer


def singular_values_of(gram: Tensor) -> Tensor:
    """Singular values of a matrix from its Gram matrix in float64: good to about 1e-8 of the largest one.

    Args:
        gram: the Gram matrix ``[D, D]``.
    """
    if not bool(gram.isfinite().all()):  # LAPACK would raise
        return torch.full_like(gram[0], torch.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp(min=0).sqrt()


class EffectiveRank(Metric):
    """Effective and stable rank of all features seen, whatever their labels.

    ``compute`` returns `Ranks`. With ``centered`` the mean feature is taken away first: behind a ReLU it would be the
    one direction that hides all others. Features that have collapsed to one point per class have an effective rank of
    at most ``C - 1`` then.

    Cost: ``B D^2`` multiplications in float64 per batch, ``D^2 * 8`` bytes, one symmetric eigenvalue problem in
    ``compute``.

    Args:
        num_features: number of features of a sample.
        centered: whether the mean feature is taken away.
        **kwargs: options of `torchmetrics.Metric`.

    Shape:
        ``update(features)`` with ``[B, D]``.

    Raises:
        ValueError: in ``update``, for a wrong shape.

    References:
        Roy and Vetterli, The effective rank, EUSIPCO 2007; Garrido et al. (RankMe), arXiv:2210.02885, do not centre.

    Example:
        >>> metric = EffectiveRank(num_features=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> round(metric.compute().effective.item(), 4)
        2.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, *, num_features: int, centered: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("num_features", num_features, 1)
        self.num_features = num_features
        self.centered = centered
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: features ``[B, D]``.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"Expected `features` [B, {self.num_features}] but got {list(features.shape)}.")
        h = features.detach().to(self.outer.device).double()
        self.count = self.count + len(h)
        self.total = self.total + h.sum(0)
        self.outer = self.outer + h.T @ h

    @override
    def compute(self) -> Ranks:
        """The ranks of all features seen; NaN without a sample."""
        values = singular_values_of(gram_of(self.outer, self.total, self.count, centered=self.centered))
        return Ranks(effective_rank(values), stable_rank(values))

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Do nothing: the sums are float64 in every precision.

        Args:
            dst_type: ignored.
        """
        return self
