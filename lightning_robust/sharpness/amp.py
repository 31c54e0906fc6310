# SPDX-License-Identifier: Apache-2.0
"""AMP: the gradient where a few clipped ascent steps per tensor lead."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_positive
from lightning_robust.sharpness.gradients import tensor_norms
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["AMP", "clip_tensor_norms_"]


def clip_tensor_norms_(tensors: list[Tensor], radii: list[float], norm_eps: float = 1e-12) -> None:
    """Shorten, in place, each tensor whose norm is above its radius; shorter ones stay as they are.

    Args:
        tensors: offsets of weights.
        radii: one per tensor.
        norm_eps: added to each norm.

    Example:
        >>> offsets = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])]
        >>> clip_tensor_norms_(offsets, [1.0, 1.0])
        >>> offsets
        [tensor([0.6000, 0.8000]), tensor([0.3000, 0.4000])]
    """
    scales = [
        (radius / (norm + norm_eps)).clamp(max=1.0).to(tensor.dtype)
        for tensor, radius, norm in zip(tensors, radii, tensor_norms(tensors), strict=True)
    ]
    torch._foreach_mul_(tensors, scales)


class AMP(SharpnessMethod):
    r"""Adversarial model perturbation: each tensor climbs by its own gradient, at most to its own radius.

    .. math::
        \Delta \leftarrow \mathrm{clip}\big(\Delta + \zeta \, g(w + \Delta), \rho\big), \qquad d = g(w + \Delta)

    ``inner_iter`` times from zero. The norm is taken tensor by tensor, and a perturbation that is shorter than
    ``rho`` stays so: where gradients are small, this is almost a plain step. A group option ``rho`` of the optimizer
    overrides ``rho`` for its weights.

    Cost: ``1 + inner_iter`` forward + backward passes per step.

    Args:
        rho: largest norm of the perturbation of a tensor, a number or a schedule; the ``epsilon`` of the paper.
        inner_lr: step size of the ascent, :math:`\zeta`.
        inner_iter: ascent steps.
        norm_eps: added to each norm.

    Raises:
        ValueError: ``rho``, ``inner_lr`` or ``norm_eps`` is not positive, or ``inner_iter`` is below 1.

    References:
        Zheng et al., Regularizing Neural Networks via Adversarial Model Perturbation, arXiv 2010.04925. The official
        code restores weights by subtraction; here they are restored exactly.

    Example:
        >>> from lightning_robust.sharpness import AMP
        >>> AMP(inner_iter=2).extra_passes
        2
    """

    ascent_only: ClassVar[bool] = True

    def __init__(
        self, *, rho: Radius = 0.5, inner_lr: float = 1.0, inner_iter: int = 1, norm_eps: float = 1e-12
    ) -> None:
        check_radius("rho", rho)
        check_positive("inner_lr", inner_lr)
        check_integer("inner_iter", inner_iter, 1)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.inner_lr = inner_lr
        self.inner_iter = inner_iter
        self.norm_eps = norm_eps

    @property
    @override
    def extra_passes(self) -> float:
        return self.inner_iter

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        radii = probe.radii(self.rho)
        offsets = weights.pick(gradients)
        if self.inner_lr != 1.0:
            torch._foreach_mul_(offsets, self.inner_lr)
        clip_tensor_norms_(offsets, radii, self.norm_eps)
        for _ in range(self.inner_iter - 1):
            uphill = weights.pick(probe.ascent_gradient_at(offsets))
            torch._foreach_add_(offsets, uphill, alpha=self.inner_lr)
            del uphill
            clip_tensor_norms_(offsets, radii, self.norm_eps)
        return probe.gradient_at(offsets)
