# SPDX-License-Identifier: Apache-2.0
"""Group orthogonalisation: filters within groups are drawn to be orthonormal."""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer
from lightning_robust.regularization.base import WeightRegularizer
from lightning_robust.schedules import Schedule

__all__ = ["GOR", "group_orthogonality"]

_MODES = ("inter", "intra")


def group_orthogonality(weight: Tensor, *, groups: int, mode: Literal["inter", "intra"] = "inter") -> Tensor:
    r"""Squared distance of groups of filters from orthonormal ones, :math:`\sum_g \lVert G_g - I \rVert_F^2`.

    :math:`G_g` is the smaller of the two Gram matrices of the filters of a group: where a group has at least as many
    filters as a filter has weights, the columns are compared instead of the filters.

    Args:
        weight: A weight ``[out, ...]``.
        groups: Number of groups that the ``out`` filters are cut into.
        mode: ``"inter"``: each group of consecutive filters; ``"intra"``: the first filters of all groups, the second
            ones, and so on.

    Shape:
        A scalar.

    Raises:
        ValueError: If ``out`` cannot be cut into that many groups.

    Example:
        >>> import torch
        >>> from lightning_robust.regularization import group_orthogonality
        >>> weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> group_orthogonality(weight, groups=2).item()
        0.0
        >>> group_orthogonality(weight, groups=2, mode="intra").item()
        4.0
    """
    check_choice("mode", mode, _MODES)
    check_integer("groups", groups, 1)
    if len(weight) % groups:
        raise ValueError(f"Expected `groups` to divide the {len(weight)} filters but got {groups}.")
    filters = weight.reshape(groups, len(weight) // groups, -1)  # [groups, size, weights of a filter]
    if mode == "intra":
        filters = filters.transpose(0, 1)
    if filters.shape[1] >= filters.shape[2]:
        filters = filters.mT
    gram = filters @ filters.mT
    difference: Tensor = gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return difference.square().sum()


class GOR(WeightRegularizer):
    r"""Group orthogonalisation regularisation: draws the filters within groups of a convolution to be orthonormal.

    .. math:: \lambda \sum_{\text{layers}} \sum_{g} \lVert W_g W_g^\top - I \rVert_F^2

    where the rows of :math:`W_g` are the filters of one group (or the smaller Gram matrix
    :math:`W_g^\top W_g`). A layer of :math:`C` filters has ``min(num_groups, C // min_filters)`` groups. Groups make it
    cheaper than the orthogonality of all filters, and possible where there are more filters than weights in one. It
    goes well with group normalisation of as many groups.

    Cost: one product of each group of weights with itself per step, independent of the batch size.

    Args:
        lam: Factor of the sum; 1e-2 for networks trained on CIFAR, 1e-6 for low-rank adapters of diffusion models.
        num_groups: Largest number of groups.
        mode: ``"inter"``: groups of consecutive filters; ``"intra"``: the first filters of all groups, the second ones,
            and so on.
        linear: Whether linear layers count.
        min_filters: Least number of filters in a group.
        include: Regular expressions, one of which must occur in the name of a layer; any name when ``None``.
        exclude: Regular expressions, none of which may occur in the name of a layer.

    Raises:
        ValueError: If an argument is out of range; when called, if no layer is chosen, or if the filters of one cannot
            be cut into equal groups.

    References:
        Kurtz et al., Group Orthogonalization Regularization For Vision Models Adaptation and Robustness,
        arXiv 2306.10001. The authors' code stops with an error at layers that cannot be grouped, as here, and knows
        two-dimensional convolutions only.

    Example:
        >>> from torch import nn
        >>> from lightning_robust.regularization import GOR
        >>> layer = nn.Conv2d(3, 8, 3)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> round(GOR(lam=0.01)(layer).item(), 4)
        0.08
    """

    name: ClassVar[str] = "gor"
    coefficient_name: ClassVar[str] = "lam"

    def __init__(
        self,
        *,
        lam: float | Schedule = 1e-2,
        num_groups: int = 32,
        mode: Literal["inter", "intra"] = "inter",
        linear: bool = False,
        min_filters: int = 4,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
    ) -> None:
        super().__init__(coefficient=lam, linear=linear, include=include, exclude=exclude)
        check_integer("num_groups", num_groups, 1)
        check_choice("mode", mode, _MODES)
        check_integer("min_filters", min_filters, 1)
        self.num_groups = num_groups
        self.mode: Literal["inter", "intra"] = mode
        self.min_filters = min_filters

    def groups_of(self, filters: int) -> int:
        """Return the number of groups of a layer; 0 if it has too few filters for one.

        Args:
            filters: Number of filters of the layer.
        """
        return min(self.num_groups, filters // self.min_filters)

    @override
    def check(self, name: str, weight: Tensor) -> None:
        filters = len(weight)
        groups = self.groups_of(filters)
        if groups == 0:
            reason = f"fewer than min_filters={self.min_filters}"
        elif filters % groups:
            reason = f"which cannot be cut into {groups} equal groups"
        else:
            return
        raise ValueError(
            f"Expected layers whose filters can be grouped, but {name or 'the layer'!r} has {filters}, {reason}; leave "
            f'it out with exclude="{name}", or choose another `num_groups` or `min_filters`.'
        )

    @override
    def penalty(self, weight: Tensor) -> Tensor:
        return group_orthogonality(weight, groups=self.groups_of(len(weight)), mode=self.mode)
