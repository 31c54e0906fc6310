# SPDX-License-Identifier: Apache-2.0
"""What methods share that climb along gradients and take them apart: steps, inner products, perpendicular parts."""

import torch
from torch import Tensor

from lightning_robust.sharpness.backup import Scale
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.sharded import is_sharded, local_parts, over_shards
from lightning_robust.sharpness.weights import Gradients

__all__ = ["add_scaled", "inner_product", "steepest", "subtract_perpendicular"]


def steepest(tensors: list[Tensor], gradients: Gradients, *, adaptive: bool) -> tuple[Gradients, Tensor]:
    r"""The way to climb and the norm that goes with it: :math:`g, |g|`, or :math:`T^2 g, |T g|` with :math:`T = |w|`.

    Args:
        tensors: the weights, where they are climbed from.
        gradients: one per weight; they stay as they are.
        adaptive: whether steps are measured relative to the weights.

    Returns:
        The offsets, which are the gradients themselves unless ``adaptive``, and their norm as a scalar tensor.
    """
    if not adaptive:
        return gradients, global_norm(gradients)
    offsets: Gradients = list(torch._foreach_mul(gradients, tensors))
    norm = global_norm(offsets)
    torch._foreach_mul_(offsets, tensors)
    return offsets, norm


def add_scaled(tensors: list[Tensor], offsets: list[Tensor], scale: Scale) -> None:
    """Add ``scale * offsets`` to the tensors, in place and without waiting for a device.

    Args:
        tensors: what is added to.
        offsets: as many; they stay as they are.
        scale: a number, a scalar tensor, or a scalar tensor per offset.
    """
    if isinstance(scale, list):
        torch._foreach_add_(tensors, [offset * each for offset, each in zip(offsets, scale, strict=True)])
    elif isinstance(scale, Tensor) and scale.device.type != "cpu":
        torch._foreach_add_(tensors, torch._foreach_mul(offsets, scale))
    else:
        torch._foreach_add_(tensors, offsets, alpha=float(scale))


def inner_product(first: Gradients, second: Gradients) -> Tensor:
    """The sum over all entries of all products, in float32 at least.

    Args:
        first: tensors on one device.
        second: as many, of the same shapes.
    """
    products = [
        torch.dot(*_lines(one, other)) for one, other in zip(local_parts(first), local_parts(second), strict=True)
    ]
    total: Tensor = torch.stack(products).sum()
    return over_shards(total, first[0]).sum(0) if is_sharded(first) else total


def subtract_perpendicular(
    direction: Gradients, other: Gradients, share: float, norm_eps: float, *, reach: Tensor | None = None
) -> Gradients:
    r"""Subtract from a direction a share of what another one has perpendicular to it, in place.

    .. math:: d \leftarrow d - s \, (h - \langle h, \hat d \rangle \hat d), \qquad \hat d = d / |d|

    with all weights as one vector.

    Args:
        direction: :math:`d`, one tensor per weight; changed and returned.
        other: :math:`h`; it stays as it is.
        share: :math:`s`.
        norm_eps: added to norms and their product before dividing by them.
        reach: the norm of ``other``, where it is known.
    """
    if share:
        length = global_norm(direction)
        reach = global_norm(other) if reach is None else reach
        cosine = inner_product(other, direction) / (length * reach + norm_eps)
        along = cosine * reach / (length + norm_eps)
        torch._foreach_mul_(direction, 1.0 + share * along)
        torch._foreach_add_(direction, other, alpha=-share)
    return direction


def _lines(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors with one dimension; views of dense memory in any format, where their formats agree."""
    if first.dtype in (torch.float16, torch.bfloat16):
        first, second = first.float(), second.float()
    if not first.is_contiguous() and first.stride() == second.stride():
        order = sorted(range(first.ndim), key=first.stride, reverse=True)
        first, second = first.permute(order), second.permute(order)
    return first.flatten(), second.flatten()
