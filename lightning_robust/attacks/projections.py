# SPDX-License-Identifier: Apache-2.0
"""Exact projections of perturbations: on an l1 ball within the possible pixels, and on a hyperplane within them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.losses import full_precision

__all__ = ["project_hyperplane_l1", "project_hyperplane_l2", "project_hyperplane_linf", "project_l1_box"]


def project_l1_box(
    x: Tensor, delta: Tensor, eps: float | Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    r"""The perturbation nearest to ``delta`` (Euclidean) with ``||d||_1 <= eps`` and ``low <= x + d <= high``.

    .. math:: d_i = \mathrm{sign}(\delta_i)\, \min\bigl(\max(|\delta_i| - \lambda, 0),\, r_i\bigr)

    with :math:`r_i` the distance of :math:`x_i` to the bound it moves to, and :math:`\lambda` the smallest number
    :math:`\geq 0` for which the budget holds, found by sorting the points at which an entry starts or stops to move.

    Cost: no pass of the model; a sort of twice the entries of a sample.

    Args:
        x: clean images; entries outside the bounds only move inwards.
        delta: perturbation to project.
        eps: budget, one or one per sample ``[B]``.
        low: smallest possible pixel, or one per entry.
        high: largest possible pixel, or one per entry.

    Shape:
        ``x``, ``delta`` and the result are ``[B, ...]``.

    References:
        Croce and Hein, Mind the box: l1-APGD for sparse adversarial attacks on image classifiers, arXiv 2103.01208.
        The budget is never exceeded, not by rounding either; in half precision the result is rounded towards zero.

    Example:
        >>> project_l1_box(torch.tensor([[0.5, 0.9]]), torch.tensor([[0.3, 0.4]]), eps=0.3)
        tensor([[0.2000, 0.1000]])
    """
    start, moved = full_precision(x).flatten(1), full_precision(delta).flatten(1)
    start = start.to(moved.dtype)
    below, above = start - _flat(low, x, start), _flat(high, x, start) - start
    size = moved.abs()
    most = torch.minimum(size, torch.where(moved > 0, above, below).clamp(min=0))
    if size.numel() == 0:
        return delta.clone()
    # the sum of many float32 numbers is not known to float32, and an exceeded budget is no attack
    exact = torch.float32 if size.device.type == "mps" else torch.float64
    budget = torch.as_tensor(eps, dtype=exact, device=size.device).expand(len(size))
    exceeded = most.sum(1, dtype=exact) > budget
    threshold = torch.where(exceeded, _l1_threshold(size, most, budget.to(size.dtype)), 0.0)
    shrunk = torch.minimum((size - threshold[:, None]).clamp(min=0), most)
    total = shrunk.sum(1, dtype=exact)
    slack = 1 - 4 * torch.finfo(size.dtype).eps
    factor = torch.where(total > budget, slack * budget / total, 1.0).to(size.dtype)
    result = moved.sign() * shrunk * factor[:, None]
    return _towards_zero(result, delta.dtype).view_as(delta)


def project_hyperplane_linf(
    x: Tensor, w: Tensor, b: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    r"""The step of least largest entry from ``x`` to the hyperplane ``w.z = b`` within ``low <= z <= high``.

    .. math:: d_i = -\mathrm{sign}(w_i (w^\top x - b))\, \min(\lambda, r_i), \qquad
        \sum_i |w_i| \min(\lambda, r_i) = |w^\top x - b|

    with :math:`r_i` the distance to the bound that entry moves to. The left side is concave and piecewise linear in
    :math:`\lambda`, so Newton's method from 0 is exact, in 3 or 4 iterations as a rule. Where the plane does not meet
    the box, the result leads to the corner nearest to it; entries with ``w = 0`` stay.

    Cost: no pass of the model; a few sums over the entries.

    Args:
        x: points within the bounds.
        w: normals of the hyperplanes.
        b: offset of each hyperplane.
        low: smallest possible pixel, or one per entry; finite.
        high: largest possible pixel, or one per entry; finite.

    Shape:
        ``x``, ``w`` and the result are ``[B, ...]``; ``b`` is ``[B]``.

    References:
        Croce and Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, arXiv 1907.02044.
        Their code sorts; normals are scaled here, so that small gradients do not count as zero.

    Example:
        >>> project_hyperplane_linf(torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.7]))
        tensor([[0.2000, 0.1000]])
    """
    return _project_hyperplane(_move_together, x, w, b, low, high)


def project_hyperplane_l2(
    x: Tensor, w: Tensor, b: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    r"""The shortest step from ``x`` to the hyperplane ``w.z = b`` within ``low <= z <= high``.

    As :func:`project_hyperplane_linf`, with :math:`\min(\lambda |w_i|, r_i)` for the length of each entry.

    Cost: no pass of the model; a few sums over the entries.

    Args:
        x: points within the bounds.
        w: normals of the hyperplanes.
        b: offset of each hyperplane.
        low: smallest possible pixel, or one per entry; finite.
        high: largest possible pixel, or one per entry; finite.

    Shape:
        ``x``, ``w`` and the result are ``[B, ...]``; ``b`` is ``[B]``.

    References:
        Croce and Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, arXiv 1907.02044.

    Example:
        >>> project_hyperplane_l2(torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 4.0]]), torch.tensor([4.0]))
        tensor([[0.0600, 0.0800]])
    """
    return _project_hyperplane(_move_by_weight, x, w, b, low, high)


def project_hyperplane_l1(
    x: Tensor, w: Tensor, b: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    r"""The step of least sum of absolute entries from ``x`` to the hyperplane ``w.z = b`` within ``low <= z <= high``.

    Entries move as far as they can, those of largest :math:`|w_i|` first, until the plane is reached. Where the plane
    does not meet the box, the result leads to the corner nearest to it; entries with ``w = 0`` stay.

    Cost: no pass of the model; a sort of the entries of a sample.

    Args:
        x: points within the bounds.
        w: normals of the hyperplanes.
        b: offset of each hyperplane.
        low: smallest possible pixel, or one per entry; finite.
        high: largest possible pixel, or one per entry; finite.

    Shape:
        ``x``, ``w`` and the result are ``[B, ...]``; ``b`` is ``[B]``.

    References:
        Croce and Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, arXiv 1907.02044.

    Example:
        >>> project_hyperplane_l1(torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 4.0]]), torch.tensor([4.0]))
        tensor([[0.0000, 0.1250]])
    """
    return _project_hyperplane(_fill_steepest, x, w, b, low, high)


def _l1_threshold(size: Tensor, most: Tensor, budget: Tensor) -> Tensor:
    # As the threshold falls, an entry starts to move at its size and stops where it reaches the most it can.
    points, order = torch.cat([size, size - most], 1).sort(1, descending=True)
    moving = torch.where(order < size.shape[1], 1.0, -1.0).to(size).cumsum(1)
    used = torch.nn.functional.pad((moving[:, :-1] * -points.diff(dim=1)).cumsum(1), (1, 0))
    over = used >= budget[:, None]
    first = over.int().argmax(1, keepdim=True)
    slope = moving.gather(1, (first - 1).clamp(min=0)).clamp(min=1)
    exact = points.gather(1, first) + (used.gather(1, first) - budget[:, None]) / slope
    # a sum of float32 numbers may just miss a budget that is exceeded
    return torch.where(over.any(1), exact.squeeze(1), 0.0)


def _project_hyperplane(
    lengths: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    b: Tensor,
    low: float | Tensor,
    high: float | Tensor,
) -> Tensor:
    point, normal = full_precision(x).flatten(1), full_precision(w).flatten(1)
    if point.numel() == 0:
        return x.clone()
    gap = b.to(point.dtype) - (normal * point).sum(1)
    # a plane stays the same when its equation is scaled, but squares of small normals would underflow
    scale = normal.abs().amax(1).clamp(min=torch.finfo(normal.dtype).tiny)
    towards = normal * (torch.where(gap > 0, 1.0, -1.0) / scale)[:, None]
    sign = towards.sign()
    # products with signs, as the choice by a mask costs many times as much on a CPU; entries without weight stay
    lowest, highest = _flat(low, x, point), _flat(high, x, point)
    room = sign.clamp(min=0).mul_(highest - lowest).add_(lowest).sub_(point).mul_(sign).clamp_(min=0)
    step = lengths(towards.abs_(), room, gap.abs() / scale)
    return sign.mul_(step).to(x.dtype).view_as(x)


def _move_together(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    multiplier = _newton(weight, weight * room, room, gap)
    return torch.minimum(room, multiplier[:, None])


def _move_by_weight(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    limits = torch.finfo(weight.dtype)
    multiplier = _newton(weight.square(), weight * room, room / weight.clamp(min=limits.tiny), gap)
    return torch.minimum(room, weight * multiplier.clamp(max=limits.max)[:, None])


def _newton(slopes: Tensor, most: Tensor, bound_at: Tensor, gap: Tensor) -> Tensor:
    """Where the sum of ``slopes * multiplier``, or ``most`` from ``bound_at`` on, is ``gap``; infinity if nowhere."""
    # what it would be if no entry met its bound: never too much
    multiplier = gap / slopes.sum(1).clamp(min=torch.finfo(gap.dtype).tiny)
    # each iteration adds at least one entry to those at their bound, so it ends; the test makes a device wait
    for iteration in range(slopes.shape[1] + 1):
        free = (bound_at - multiplier[:, None]).clamp_(min=0).sign_()
        slope = (slopes * free).sum(1)
        left = gap - torch.addcmul(most, most, free, value=-1).sum(1)
        new = torch.where(slope > 0, left / slope, torch.where(left > 0, torch.inf, multiplier))
        new = torch.maximum(new, multiplier)
        done = (gap.is_cpu or iteration % 4 == 3) and torch.equal(new, multiplier)
        multiplier = new
        if done:
            break
    return multiplier


def _fill_steepest(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    count = weight.shape[1]
    if not weight.is_cpu:
        return _fill(weight, room, gap, count)[0]
    # as a rule few entries are enough and found much faster than the order of all; a device would wait for the answer
    step, reached = _fill(weight, room, gap, min(64, count))
    if not reached.all() and count > 64:
        step[~reached] = _fill(weight[~reached], room[~reached], gap[~reached], count)[0]
    return step


def _fill(weight: Tensor, room: Tensor, gap: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Steps that use up the ``count`` entries of largest weight in their order, and whether the gap is closed."""
    steepest, order = weight.topk(count, dim=1) if count < weight.shape[1] else weight.sort(1, descending=True)
    room_left = room.gather(1, order)
    covered = (steepest * room_left).cumsum(1)
    share = (gap[:, None] - covered + steepest * room_left) / steepest.clamp(min=torch.finfo(weight.dtype).tiny)
    filled = torch.minimum(share.clamp(min=0), room_left)
    return torch.zeros_like(room).scatter(1, order, filled), covered[:, -1] >= gap


def _flat(bound: float | Tensor, x: Tensor, like: Tensor) -> float | Tensor:
    return bound.to(like.dtype).expand_as(x).flatten(1) if isinstance(bound, Tensor) else bound


def _towards_zero(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == value.dtype:
        return value
    kept = value * (1 - torch.finfo(dtype).eps)
    return torch.where(kept.abs() < torch.finfo(dtype).tiny, 0.0, kept).to(dtype)
