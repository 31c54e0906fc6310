# SPDX-License-Identifier: Apache-2.0
"""Friendly-SAM: ascend along the noise of the batch, without the part that all batches share."""

from typing import ClassVar

import torch
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_non_negative, check_positive
from lightning_robust.sharpness.ascent import steepest
from lightning_robust.sharpness.dense import check_dense
from lightning_robust.sharpness.gradients import global_norm, tensor_norms
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["FriendlySAM"]


class FriendlySAM(SharpnessMethod):
    r"""Friendly sharpness-aware minimization: the ascent leaves out what the batch shares with all batches.

    .. math::
        u = g(w) - \sigma m, \qquad e = \rho \, u / (\lVert u \rVert_2 + 10^{-12}), \qquad d = g(w + e), \qquad
        m \leftarrow \lambda m + (1 - \lambda) \, g(w)

    :math:`m` is a running mean of the gradient, as an estimate of that of all data. The first gradient of a weight
    leads the ascent by itself, and becomes :math:`m`. A group option ``rho`` of the optimizer overrides ``rho``.

    With several processes the mean of their gradients enters :math:`m`, so that all remember the same and a
    checkpoint holds it; each still ascends from its own gradient. With accumulated batches :math:`m` moves once per
    batch. A batch whose gradient is zero or not finite, after an overflow of the loss scale for example, does not
    enter it.

    Cost: 2 forward + 2 backward passes per step, and memory for one more gradient; with several processes, one more
    exchange of a gradient.

    Args:
        rho: radius, a number or a schedule; 0.2 in the official run script, 0.05 in its class.
        sigma: how much of :math:`m` is taken off; 0 gives SAM.
        lmbda: inertia of :math:`m`; 0.6 in the official run script, 0.9 in its class, 0.95 in its training script.
        adaptive: scale the perturbation with the squared weights and the norm with the weights, as in ASAM.
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive, ``sigma`` is negative, or ``lmbda`` is not in [0, 1]; in
            the first step, if a gradient is sparse.

    References:
        Li et al., Friendly Sharpness-Aware Minimization, arXiv 2403.12350. In the official code :math:`m` belongs to
        the process, and a weight without gradient is left out; here it counts with a gradient of zero.

    Example:
        >>> from lightning_robust.sharpness import FriendlySAM
        >>> FriendlySAM(rho=0.1, lmbda=0.95)
        FriendlySAM(rho=0.1, sigma=1.0, lmbda=0.95, adaptive=False, norm_eps=1e-12)
    """

    ascent_only: ClassVar[bool] = True
    collective: ClassVar[bool] = True

    def __init__(
        self,
        *,
        rho: Radius = 0.2,
        sigma: float = 1.0,
        lmbda: float = 0.6,
        adaptive: bool = False,
        norm_eps: float = 1e-12,
    ) -> None:
        check_radius("rho", rho)
        check_non_negative("sigma", sigma)
        check_in_range("lmbda", lmbda, 0.0, 1.0)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.sigma = sigma
        self.lmbda = lmbda
        self.adaptive = adaptive
        self.norm_eps = norm_eps

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        moved = weights.perturbed
        kept = self.recall("mean", moved)
        means = [torch.zeros_like(w) if m is None else m for w, m in zip(moved.tensors, kept, strict=True)]
        own = weights.pick(gradients)
        check_dense("FriendlySAM", moved, own)
        steep: Gradients = list(torch._foreach_sub(own, means, alpha=self.sigma))
        self._learn(moved, own, means, probe)
        del means, kept, own
        gradients.clear()
        steep, norm = steepest(moved.tensors, steep, adaptive=self.adaptive)
        return probe.gradient_at(steep, ascent_scales(probe.radii(self.rho), norm, self.norm_eps))

    def _learn(self, moved: Weights, own: Gradients, means: Gradients, probe: Probe) -> None:
        """Take the gradients, which are overwritten, into the running mean; no number is read from the device."""
        size = global_norm(own)
        usable = ((size > 0) & size.isfinite()).to(size.dtype)
        probe.average([*own, usable])
        usable = usable == 1  # in every process
        inertia = self.lmbda * (torch.stack(tensor_norms(means)) > 0).to(size.dtype)
        inertia.masked_fill_(~usable, 1.0)
        for gradient in own:
            gradient.masked_fill_(~usable, 0.0)
        each = [number.to(mean.dtype) for number, mean in zip(inertia.unbind(), means, strict=True)]
        torch._foreach_lerp_(own, means, each)
        self.remember("mean", moved, own)
