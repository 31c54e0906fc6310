# SPDX-License-Identifier: Apache-2.0
"""SAM: the gradient at the weights of locally highest loss."""

from typing import ClassVar

from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["SAM"]


class SAM(SharpnessMethod):
    r"""Sharpness-aware minimization: the base optimizer gets the gradient at the ascended weights.

    .. math:: e = \rho \, g(w) / (\lVert g(w) \rVert_2 + 10^{-12}), \qquad d = g(w + e)

    with one norm over all weights. A group option ``rho`` of the optimizer overrides ``rho`` for its weights. Weight
    decay belongs to the base optimizer: it acts at the unperturbed weights and is no part of ``e``.

    Cost: 2 forward + 2 backward passes per step.

    Args:
        rho: radius of the neighbourhood, in units of the weights; 0.05 in the paper for CIFAR. A schedule changes it
            from optimizer step to optimizer step.
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive.

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412. The
        official JAX code puts the L2 penalty into the loss and hence into the ascent; here, as in all PyTorch ports,
        it is not.

    Example:
        >>> from lightning_robust.sharpness import SAM
        >>> SAM(rho=0.1)
        SAM(rho=0.1, norm_eps=1e-12)
    """

    ascent_only: ClassVar[bool] = True
    sharded: ClassVar[bool] = True

    def __init__(self, *, rho: Radius = 0.05, norm_eps: float = 1e-12) -> None:
        check_radius("rho", rho)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.norm_eps = norm_eps

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        steep = weights.pick(gradients)
        return probe.gradient_at(steep, ascent_scales(probe.radii(self.rho), global_norm(steep), self.norm_eps))
