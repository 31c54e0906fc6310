# SPDX-License-Identifier: Apache-2.0
"""WSAM: sharpness as a weighted term beside the loss."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_positive
from lightning_robust.sharpness.ascent import steepest
from lightning_robust.sharpness.dense import check_dense
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["WSAM"]


class WSAM(SharpnessMethod):
    r"""Weighted SAM: minimizes the loss plus a multiple of its sharpness, each with its own kind of step.

    .. math::
        g_0 = g(w), \qquad g_1 = g(w + \rho \, g_0 / (\lVert g_0 \rVert + 10^{-12})), \qquad
        \alpha = \gamma / (1 - \gamma)

    Decoupled, the optimizer steps with :math:`g_0`, and then :math:`w \leftarrow w - \eta \, \alpha \, (g_1 - g_0)`
    with the learning rate of each weight's group: the sharpness term bypasses momentum and second moments. Coupled,
    the optimizer gets :math:`d = (1 - \alpha) \, g_0 + \alpha \, g_1`, of which :math:`\gamma = 1/2` is SAM. A group
    option ``rho`` of the optimizer overrides ``rho`` for its weights.

    The decoupled move follows ``optimizer.step()``, before anything looks at the weights. Processes and accumulated
    batches average it as they average gradients, and a step that a loss scaler skips drops it. Gradient clipping acts
    on what the optimizer gets, so not on the move. Where only some weights are perturbed, the others take the coupled
    form.

    Cost: 2 forward + 2 backward passes per step. In memory, beyond the copy of the weights, one set of gradients during
    the second pass (two with ``adaptive``), and decoupled one more until the optimizer steps.

    Args:
        rho: radius of the neighbourhood, a number or a schedule.
        gamma: weight of the sharpness term, from 0 (plain training) to below 1; 0.8 to 0.95 is recommended.
        decouple: whether the sharpness term moves the weights by itself, after the optimizer.
        adaptive: measure the radius relative to the weights, as ASAM does: with :math:`T = \lvert w \rvert` the
            perturbation is :math:`\rho \, T^2 g_0 / (\lVert T g_0 \rVert + 10^{-12})`.
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive, or ``gamma`` is not in [0, 1); before the first
            step, if ``decouple`` and there is no optimizer or it has no learning rate.

    References:
        Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
        2305.15817. The official code can clip both gradients by itself (``max_norm``); older versions of the port in
        pytorch_optimizer divide by the norm of the plain gradient when they are adaptive, where the official code and
        this class use that of :math:`T g_0`.

    Example:
        >>> from lightning_robust.sharpness import WSAM
        >>> WSAM(gamma=0.8)
        WSAM(rho=0.05, gamma=0.8, decouple=True, adaptive=False, norm_eps=1e-12)
    """

    def __init__(
        self,
        *,
        rho: Radius = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        adaptive: bool = False,
        norm_eps: float = 1e-12,
    ) -> None:
        check_radius("rho", rho)
        check_in_range("gamma", gamma, 0.0, 1.0)
        if gamma == 1:
            raise ValueError("Expected `gamma` to be below 1 but got 1; the sharpness term would have infinite weight.")
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.gamma = gamma
        self.decouple = decouple
        self.adaptive = adaptive
        self.norm_eps = norm_eps

    @property
    def moves_after_step(self) -> bool:  # type: ignore[override]
        """Whether weights are moved once more after the optimizer's step."""
        return self.decouple

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether processes exchange tensors."""
        return self.decouple

    @override
    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.decouple and not all("lr" in group for group in (optimizer.param_groups if optimizer else [{}])):
            raise ValueError(
                "WSAM moves weights by the learning rate after the optimizer's step, but there is no optimizer with a "
                "learning rate; give the optimizer instead of parameters, or use decouple=False."
            )

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        check_dense("WSAM", weights, gradients)
        alpha = self.gamma / (1.0 - self.gamma)
        offsets, norm = steepest(weights.perturbed.tensors, weights.pick(gradients), adaptive=self.adaptive)
        moved = probe.gradient_at(offsets, ascent_scales(probe.radii(self.rho), norm, self.norm_eps))
        del offsets
        if not self.decouple:
            torch._foreach_lerp_(gradients, moved, alpha)
            return gradients
        torch._foreach_sub_(moved, gradients)
        # a loss scaler looks at what the optimizer gets: a move that is not finite must show there
        torch._foreach_add_(gradients, 0.0 * global_norm(moved))
        _add_to_others(weights, gradients, moved, alpha)
        sharpness = weights.pick(moved)
        _scale(sharpness, [-alpha * group["lr"] for group in weights.perturbed.groups])
        probe.move_after_step(sharpness)
        return gradients


def _add_to_others(weights: Weights, gradients: Gradients, sharpness: Gradients, alpha: float) -> None:
    others = [not movable for movable in weights.movable or []]
    if any(others):
        chosen = weights.with_movable(others)
        torch._foreach_add_(chosen.pick(gradients), chosen.pick(sharpness), alpha=alpha)


def _scale(tensors: Gradients, factors: list[Any]) -> None:
    if any(isinstance(factor, Tensor) for factor in factors):
        for tensor, factor in zip(tensors, factors, strict=True):
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factors)
