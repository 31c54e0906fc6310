# SPDX-License-Identifier: Apache-2.0
"""The boundary of a class as a plane, and a step to it that stays close to the clean image."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.attacks.losses import labels_of
from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projections import (
    project_hyperplane_l1,
    project_hyperplane_l2,
    project_hyperplane_linf,
)
from lightning_robust.attacks.space import InputSpace

__all__ = ["boundary_step", "nearest_boundary"]

_PROJECTIONS: dict[str, Callable[..., Tensor]] = {
    "linf": project_hyperplane_linf,
    "l2": project_hyperplane_l2,
    "l1": project_hyperplane_l1,
}
# a plane is as far as its value divided by the length of its normal in the dual norm
_DUALS = {"linf": "l1", "l2": "l2", "l1": "linf"}


def nearest_boundary(problem: Problem, x_adv: Tensor, norm: str, space: InputSpace) -> tuple[Tensor, Tensor, Tensor]:
    r"""The linearised boundary between the label and the class steered to, or the class whose plane is nearest.

    .. math:: t = \arg\min_{j \neq y} \frac{|f_j - f_y|}{\|\nabla_x (f_j - f_y)\|_q}

    with the dual norm :math:`q`. A class whose difference has no gradient is taken last.

    Cost: one forward; one input-backward with ``towards``, else C - 1.

    Args:
        problem: images and labels.
        x_adv: where to linearise.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, in which distances are measured.
        space: converts gradients to those of pixels.

    Shape:
        ``x_adv`` is ``[B, ...]``.

    Returns:
        Values ``[B]`` of :math:`f_t - f_y`, their gradients with respect to the pixels, shaped like the images, and
        whether each point fools the model.
    """
    x_adv = x_adv.detach().requires_grad_()
    logits = problem.logits(x_adv)
    fooled = problem.fooled(logits.detach())
    if problem.towards is not None:
        values = problem.losses(logits)
        return values.detach(), space.pixel_gradient(problem.input_gradient(values.sum(), x_adv)), fooled
    labels = labels_of(problem.y)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    best, best_value, best_normal = None, own.detach(), x_adv.detach()
    for rank in range(logits.shape[1] - 1):
        other = rank + (rank >= labels).long()
        values = logits.gather(1, other[:, None]).squeeze(1) - own
        last = rank == logits.shape[1] - 2
        normal = space.pixel_gradient(problem.input_gradient(values.sum(), x_adv, retain_graph=not last))
        # squares of the gradients of confident samples underflow
        largest = normal.abs().flatten(1).amax(1).clamp(min=torch.finfo(normal.dtype).tiny)
        steepness = largest * NORMS[_DUALS[norm]].size(normal / per_sample(largest, normal))
        distance = torch.where(steepness > 0, values.detach().abs() / steepness, torch.inf)
        nearer = torch.ones_like(fooled) if best is None else distance < best
        best = distance if best is None else torch.minimum(best, distance)
        best_value = torch.where(nearer, values.detach(), best_value)
        best_normal = torch.where(per_sample(nearer, normal), normal, best_normal)
    return best_value, best_normal, fooled


def boundary_step(
    x: Tensor,
    delta: Tensor,
    value: Tensor,
    normal: Tensor,
    norm: str,
    *,
    eta: float = 1.05,
    alpha_max: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    r"""The perturbation after one step of FAB: beyond the plane, and drawn to its point nearest to the clean image.

    .. math:: \delta' = (1 - \alpha)(\delta + \eta\, d_1) + \alpha \eta\, d_2, \qquad
        \alpha = \min\Bigl(\frac{\|d_1\|}{\|d_1\| + \|d_2\|},\, \alpha_{\max}\Bigr)

    with the steps :math:`d_1` from :math:`x + \delta` and :math:`d_2` from :math:`x` to the plane within the bounds.

    Cost: no pass of the model; two projections.

    Args:
        x: clean pixels.
        delta: perturbation before the step.
        value: values ``[B]`` of the difference of logits at ``x + delta``.
        normal: its gradients there.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eta: how far to go, as a multiple of the step to the plane.
        alpha_max: largest weight of the clean image.
        bounds: smallest and largest possible pixel.

    Shape:
        ``x``, ``delta``, ``normal`` and the result are ``[B, ...]``; ``value`` is ``[B]``.

    References:
        Croce and Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, arXiv 1907.02044.

    Example:
        >>> x, normal = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 1.0]])
        >>> boundary_step(x, torch.zeros(1, 2), torch.tensor([-0.2]), normal, "linf", eta=1.5)
        tensor([[0.1500, 0.1500]])
    """
    at = x + delta
    offset = (normal * at).flatten(1).sum(1) - value
    steps = _PROJECTIONS[norm](torch.cat([at, x]), torch.cat([normal, normal]), torch.cat([offset, offset]), *bounds)
    from_here, from_clean = steps.chunk(2)
    here, clean = NORMS[norm].size(steps).clamp(min=1e-8).chunk(2)
    alpha = per_sample((here / (here + clean)).clamp(max=alpha_max), delta)
    moved = torch.add(delta, from_here, alpha=eta).mul_(1 - alpha).addcmul_(from_clean, alpha * eta)
    return moved.add_(x).clamp_(*bounds).sub_(x)
