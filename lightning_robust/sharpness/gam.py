# SPDX-License-Identifier: Apache-2.0
"""GAM: training that seeks low loss and a small gradient norm in the neighbourhood."""

from typing import ClassVar

import torch
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range, check_non_negative, check_positive
from lightning_robust.sharpness.ascent import add_scaled, steepest, subtract_perpendicular
from lightning_robust.sharpness.backup import Scale
from lightning_robust.sharpness.dense import check_dense
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["GAM"]


class GAM(SharpnessMethod):
    r"""Gradient norm aware minimization, in the accelerated form that its authors released.

    .. math::
        g_0 &= g(w), & g_1 &= g(w + \rho' \, g_0 / (\lVert g_0 \rVert + \xi)), & h &= g_1 - g_0, \\
        w_2 &= w + \rho \, h / (\lVert h \rVert + \xi), & g_2 &= g(w_2), &
        g_3 &= g(w_2 + \rho' \, g_2 / (\lVert g_2 \rVert + \xi)),

    .. math::
        h_+ = \beta_1 g_1 + \beta_3 g_3, \qquad h_- = g_0 + \beta_2 g_2, \qquad
        d = h_+ - \gamma \, (h_- - \langle h_-, \hat h_+ \rangle \hat h_+), \qquad
        \hat h_+ = h_+ / \lVert h_+ \rVert

    with :math:`\beta_2 = 1 - \beta_0` and :math:`\beta_3 = 1 - \beta_1`. The difference :math:`h` stands for the
    Hessian times :math:`g_0 / \lVert g_0 \rVert`, so :math:`w_2` is where the norm of the gradient is large. Optimizer
    groups override the radii by the options ``grad_rho`` and ``grad_norm_rho``. Where only some weights are perturbed,
    the perturbations and the norms in them are those of these weights; :math:`h_+`, :math:`h_-`, their norms and
    their inner product are over all weights.

    Cost: 4 forward + 4 backward passes per step. In memory, beyond the copy of the weights, up to three sets of
    gradients during a pass (one during the second, three during the third and fourth); the released code keeps six
    and the gradient itself.

    Args:
        grad_rho: :math:`\rho'`, radius of the ascent steps on the loss. This and the following defaults are those of
            the script for ResNet on CIFAR-100; PyramidNet on CIFAR-100: ``grad_rho=0.04, beta0=0.3, beta1=0.5,
            gamma=0.05``; CIFAR-10: ``grad_rho=0.03, beta0=0.1, beta1=0.1`` with ``gamma=0.05`` for ResNet and 0.03 for
            PyramidNet; ``grad_norm_rho=0.2`` in all of them.
        grad_norm_rho: :math:`\rho`, radius of the ascent step on the gradient norm.
        beta0: :math:`\beta_0`, from 0 to 1.
        beta1: :math:`\beta_1`, from 0 to 1.
        gamma: weight of the part of :math:`h_-` perpendicular to :math:`h_+`.
        adaptive: measure every radius relative to the weights that are perturbed, as ASAM does: with
            :math:`T = \lvert w \rvert` each :math:`g / (\lVert g \rVert + \xi)` becomes
            :math:`T^2 g / (\lVert T g \rVert + \xi)`; in the last pass :math:`T` is that of :math:`w_2`.
        h_minus: ``"code"`` as above; ``"paper"`` for :math:`h_- = \beta_0 g_0 + \beta_2 g_2`, as in the algorithm of
            the paper's appendix, where the code leaves out :math:`\beta_0`.
        norm_eps: :math:`\xi`, added to norms before dividing by them, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: a radius or ``norm_eps`` is not positive, ``beta0`` or ``beta1`` is outside 0 to 1, ``gamma`` is
            negative, or ``h_minus`` is unknown.

    References:
        Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization, arXiv
        2303.03108. Its main text uses Hessian-vector products; the released code and this class are the accelerated
        form of its appendix. In the code both radii are tied to the learning rate, by schedulers whose two ends are
        equal: constants. ``ProportionalToLR`` and schedules are accepted here.

    Example:
        >>> from lightning_robust.sharpness import GAM, ProportionalToLR
        >>> method = GAM(grad_rho=ProportionalToLR(rho_max=0.04, rho_min=0.02, lr_max=0.1), gamma=0.05)
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        grad_rho: Radius = 0.02,
        grad_norm_rho: Radius = 0.2,
        beta0: float = 0.5,
        beta1: float = 0.6,
        gamma: float = 0.03,
        adaptive: bool = False,
        h_minus: str = "code",
        norm_eps: float = 1e-12,
    ) -> None:
        check_radius("grad_rho", grad_rho)
        check_radius("grad_norm_rho", grad_norm_rho)
        check_in_range("beta0", beta0, 0.0, 1.0)
        check_in_range("beta1", beta1, 0.0, 1.0)
        check_non_negative("gamma", gamma)
        check_choice("h_minus", h_minus, ("code", "paper"))
        check_positive("norm_eps", norm_eps)
        self.grad_rho = grad_rho
        self.grad_norm_rho = grad_norm_rho
        self.beta0 = beta0
        self.beta1 = beta1
        self.gamma = gamma
        self.adaptive = adaptive
        self.h_minus = h_minus
        self.norm_eps = norm_eps

    @property
    @override
    def extra_passes(self) -> float:
        return 3

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        check_dense("GAM", weights, gradients)
        loss_radii = probe.radii(self.grad_rho, "grad_rho")
        norm_radii = probe.radii(self.grad_norm_rho, "grad_norm_rho")

        g0 = gradients
        offsets, scale = self._climb(weights, weights.pick(g0), loss_radii)
        g1 = probe.gradient_at(offsets, scale)
        del offsets

        probe.backup.restore()  # an adaptive radius is relative to the unperturbed weights here
        h: Gradients = list(torch._foreach_sub(weights.pick(g1), weights.pick(g0)))
        h, scale = self._climb(weights, h, norm_radii)
        g2 = probe.gradient_at(h, scale)

        # each set of gradients is used up as early as possible, since the last pass needs the memory
        torch._foreach_mul_(h, scale)
        offsets, scale = self._climb(weights, weights.pick(g2), loss_radii)
        h_minus = g0
        if self.h_minus == "paper":
            torch._foreach_mul_(h_minus, self.beta0)
        torch._foreach_add_(h_minus, g2, alpha=1.0 - self.beta0)
        add_scaled(h, offsets, scale)
        del g2, offsets
        h_plus = probe.gradient_at(h)
        del h

        torch._foreach_lerp_(h_plus, g1, self.beta1)
        del g1
        return subtract_perpendicular(h_plus, h_minus, self.gamma, self.norm_eps)

    def _climb(self, weights: Weights, gradients: Gradients, radii: list[float]) -> tuple[Gradients, Scale]:
        offsets, norm = steepest(weights.perturbed.tensors, gradients, adaptive=self.adaptive)
        return offsets, ascent_scales(radii, norm, self.norm_eps)
