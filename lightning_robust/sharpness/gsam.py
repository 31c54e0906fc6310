# SPDX-License-Identifier: Apache-2.0
"""GSAM: SAM that also shrinks the gap between the loss and its maximum nearby."""

from typing import ClassVar

from typing_extensions import override

from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.sharpness.ascent import steepest, subtract_perpendicular
from lightning_robust.sharpness.dense import check_dense
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["GSAM"]


class GSAM(SharpnessMethod):
    r"""Surrogate-gap guided SAM: ascends along the part of the clean gradient that SAM's gradient does not contain.

    .. math::
        g_0 = g(w), \qquad g_1 = g(w + \rho \, g_0 / (\lVert g_0 \rVert + 10^{-12})), \qquad
        d = g_1 - \alpha \, (g_0 - \langle g_0, \hat g_1 \rangle \hat g_1), \qquad \hat g_1 = g_1 / \lVert g_1 \rVert

    Moving against the perpendicular part of :math:`g_0` leaves the loss at the perturbed weights alone and raises the
    one at the clean weights, so that the gap between the two, a measure of sharpness, closes. A group option ``rho``
    of the optimizer overrides ``rho`` for its weights. Where only some weights are perturbed, the ascent and its norm
    are theirs; the decomposition is over all weights.

    Cost: 2 forward + 2 backward passes per step. In memory, beyond the copy of the weights, one set of gradients
    during the second pass (two with ``adaptive``).

    Args:
        rho: radius of the neighbourhood. In the paper it falls with the learning rate,
            ``ProportionalToLR(rho_max=0.04, rho_min=0.02, lr_max=...)`` for ResNet-50 and 0.6 to 0.2 for ViT-B/16 on
            ImageNet; a number keeps it constant.
        alpha: weight of the perpendicular part; 0 is SAM. 0.4 for ViT-B/16 and in the CIFAR-10 script of the code,
            0.01 for ResNet-50 and Mixer-B/16.
        adaptive: measure the radius relative to the weights, as ASAM does: with :math:`T = \lvert w \rvert` the
            perturbation is :math:`\rho \, T^2 g_0 / (\lVert T g_0 \rVert + 10^{-12})`. The CIFAR-10 script does, with
            ``rho=2.0``.
        norm_eps: added to norms before dividing by them, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive, or ``alpha`` is negative.

    References:
        Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065. The PyTorch code
        of its author needs its scheduler stepped by hand and cannot accumulate gradients; its numbers are met.

    Example:
        >>> from lightning_robust.sharpness import GSAM, ProportionalToLR
        >>> method = GSAM(rho=ProportionalToLR(rho_max=0.6, rho_min=0.2, lr_max=3e-3), alpha=0.4)
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self, *, rho: Radius = 0.05, alpha: float = 0.4, adaptive: bool = False, norm_eps: float = 1e-12
    ) -> None:
        check_radius("rho", rho)
        check_non_negative("alpha", alpha)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.alpha = alpha
        self.adaptive = adaptive
        self.norm_eps = norm_eps

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        check_dense("GSAM", weights, gradients)
        offsets, norm = steepest(weights.perturbed.tensors, weights.pick(gradients), adaptive=self.adaptive)
        scales = ascent_scales(probe.radii(self.rho), norm, self.norm_eps)
        moved = probe.gradient_at(offsets, scales)
        reach = norm if offsets is gradients else None
        return subtract_perpendicular(moved, gradients, self.alpha, self.norm_eps, reach=reach)
