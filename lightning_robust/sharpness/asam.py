# SPDX-License-Identifier: Apache-2.0
"""ASAM: SAM in a neighbourhood that scales with the weights."""

from typing import ClassVar

import torch
from typing_extensions import override

from lightning_robust.checks import check_choice, check_non_negative, check_positive
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["ASAM"]


class ASAM(SharpnessMethod):
    r"""Adaptive SAM: invariant to re-scaling the weights of a layer.

    .. math::
        T = \lvert w \rvert + \eta, \qquad
        e = \rho \, T^2 g(w) / (\lVert T g(w) \rVert_2 + 10^{-12}), \qquad d = g(w + e)

    element by element, with one norm over all weights. A group option ``rho`` of the optimizer overrides ``rho``.

    Cost: 2 forward + 2 backward passes per step.

    Args:
        rho: radius, a number or a schedule; about ten times that of SAM. 0.5 for CIFAR-10 and 1.0 for CIFAR-100 in
            the official code.
        eta: keeps weights that are exactly zero movable; 0.01 in the official class.
        scaling: ``"weight"`` uses ``T`` on parameters whose name contains "weight" and 1 elsewhere, as the official
            code does; ``"all"`` uses it everywhere, as davda54's ``SAM(adaptive=True)`` does (with ``eta=0``).
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive, ``eta`` is negative, or ``scaling`` is unknown; in the
            first step, if ``scaling="weight"`` applies to no parameter.

    References:
        Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization, arXiv 2102.11600. The official code adds 1e-16 to
        the norm and restores weights by subtraction; here they are restored exactly.

    Example:
        >>> from lightning_robust.sharpness import ASAM
        >>> ASAM(rho=2.0, eta=0.0, scaling="all")
        ASAM(rho=2.0, eta=0.0, scaling='all', norm_eps=1e-12)
    """

    ascent_only: ClassVar[bool] = True
    sharded: ClassVar[bool] = True

    def __init__(
        self, *, rho: Radius = 0.5, eta: float = 0.01, scaling: str = "weight", norm_eps: float = 1e-12
    ) -> None:
        check_radius("rho", rho)
        check_non_negative("eta", eta)
        check_choice("scaling", scaling, ("weight", "all"))
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.eta = eta
        self.scaling = scaling
        self.norm_eps = norm_eps

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        moved = weights.perturbed
        offsets = weights.pick(gradients)
        scaled = [self.scaling == "all" or "weight" in name for name in moved.names]
        if not any(scaled):
            raise ValueError(
                "No parameter has 'weight' in its name, so ASAM(scaling='weight') would be plain SAM; pass the module "
                "(module=...) so that names are known, or use scaling='all'."
            )
        adaptive = [tensor for tensor, chosen in zip(moved.tensors, scaled, strict=True) if chosen]
        steep = [offset for offset, chosen in zip(offsets, scaled, strict=True) if chosen]
        scales: Gradients = list(torch._foreach_abs(adaptive))
        if self.eta:
            torch._foreach_add_(scales, self.eta)
        torch._foreach_mul_(steep, scales)
        norm = global_norm(offsets)
        torch._foreach_mul_(steep, scales)
        del scales
        return probe.gradient_at(offsets, ascent_scales(probe.radii(self.rho), norm, self.norm_eps))
