# SPDX-License-Identifier: Apache-2.0
"""Layer-aware weight perturbation: early layers are pushed further than late ones, and stay there."""

import math
from typing import ClassVar, Literal

import torch
from typing_extensions import override

from lightning_robust.checks import check_choice, check_integer, check_positive
from lightning_robust.sharpness.awp import WeightTensorPerturbation, layerwise_scales
from lightning_robust.sharpness.decay import add_decay, shrink_as_decay
from lightning_robust.sharpness.gradients import tensor_norms
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, check_radius
from lightning_robust.sharpness.trial import trial_step
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["LAP", "layer_factors"]


def layer_factors(count: int, gamma: float = 0.3, layers: int | None = None) -> list[float]:
    r"""How far each layer may be pushed: 1 for the first, 0 for the last.

    .. math:: 1 - (\ln l / \ln N)^{\gamma}, \qquad l = 1 \ldots \mathrm{count}

    Args:
        count: number of layers.
        gamma: the smaller, the sooner the factor falls.
        layers: the number :math:`N` in the formula; ``count`` when ``None``.

    Example:
        >>> [round(factor, 3) for factor in layer_factors(3)]
        [1.0, 0.129, 0.0]
    """
    layers = count if layers is None else layers
    if layers < count:
        raise ValueError(
            f"Expected `layers` to be at least the {count} weight tensors that are perturbed but got {layers}; the "
            "factors of the last ones would be negative."
        )
    return [
        1.0 if number == 1 else 1.0 - (math.log(number) / math.log(layers)) ** gamma for number in range(1, count + 1)
    ]


class LAP(WeightTensorPerturbation):
    r"""Layer-aware weight perturbation against catastrophic overfitting in single-step adversarial training.

    .. math:: e_l = \beta \Big(1 - \big(\tfrac{\ln l}{\ln N}\big)^{\gamma}\Big)
              \frac{\lVert w_l \rVert_2}{\lVert \Delta_l \rVert_2 + 10^{-20}} \, \Delta_l,
              \qquad d = g(w + e), \qquad w \leftarrow \mathrm{step}(w + e, d)

    with :math:`\Delta` what the optimizer would do about the gradient at the start of the attack, momentum and decay
    included, for the :math:`N` tensors with at least two dimensions and "weight" in their name, in the order of the
    module. The perturbation is never taken back. :class:`~lightning_robust.callbacks.LayerAwarePerturbation` and
    :func:`lap_backward` bring the attack, whose gradient comes from the same backward as :math:`\Delta`.

    Cost: 2 forward + 2 backward passes per step, the attack included, and a copy of weights and optimizer state.

    Args:
        beta: length of the perturbation relative to the weights of the first layer, a number or a schedule. In the
            code for CIFAR-10 at 8 / 12 / 16 / 32 of 255: 0.002 / 0.03 / 0.05 / 0.3 with a uniform start, 0.001 / 0.002
            / 0.005 / 0.75 with the noise of N-FGSM, 0.03 / 0.058 / 0.07 / 0.48 from the clean images.
        gamma: how soon the factor falls from layer to layer.
        layers: the number :math:`N` of layers in the formula; that of the perturbed tensors when ``None``.
        move: ``"descent"``: along the step of the optimizer, as in the published code, which lowers the loss at the
            start; ``"ascent"``: against it, which is what the paper's text speaks of.
        decay_at_perturbed: weight decay acts at ``w + e``, where the published code steps. ``False`` decays ``w``.
        track_start: BatchNorm statistics move in the pass at the start, too, as in the published code.

    Raises:
        ValueError: an argument out of range; without optimizer; fewer ``layers`` than perturbed tensors; with
            ``decay_at_perturbed``, if it is not known how the optimizer decays weights.

    References:
        Lin et al., Layer-Aware Analysis of Catastrophic Overfitting, arXiv 2405.16262. Their code lets the optimizer
        itself take the trial step and then loads its earlier state, which current PyTorch does not copy any more, so
        that momentum is not restored; here a copy steps. A tensor whose gradient is zero is not moved.

    Example:
        >>> from lightning_robust.sharpness import LAP
        >>> LAP(beta=0.03).extra_passes
        1
    """

    decays_either_way: ClassVar[bool] = True
    collective: ClassVar[bool] = True
    moves_after_step: ClassVar[bool] = True

    def __init__(
        self,
        *,
        beta: Radius = 0.002,
        gamma: float = 0.3,
        layers: int | None = None,
        move: Literal["descent", "ascent"] = "descent",
        decay_at_perturbed: bool = True,
        track_start: bool = True,
    ) -> None:
        check_radius("beta", beta)
        check_positive("gamma", gamma)
        if layers is not None:
            check_integer("layers", layers, 1)
        check_choice("move", move, ("descent", "ascent"))
        self.beta = beta
        self.gamma = gamma
        self.layers = layers
        self.move = move
        self.decay_at_perturbed = decay_at_perturbed
        self.track_start = track_start

    @property
    @override
    def ascent_moves_buffers(self) -> bool:
        return self.track_start

    @override
    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            raise ValueError(
                "LAP perturbs weights along the optimizer's step; give the optimizer instead of parameters."
            )
        super().check_optimizer(optimizer)

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        assert probe.optimizer is not None, "check_optimizer refuses"
        moved = weights.perturbed
        reached = [norm > 0 for norm in tensor_norms(weights.pick(gradients))]
        offsets = weights.pick(trial_step(probe.optimizer, weights.tensors, gradients))
        scales = layerwise_scales(moved.tensors, offsets, self._radii(moved, probe))
        torch._foreach_mul_(scales, reached)
        torch._foreach_mul_(offsets, scales)
        direction = probe.gradient_at(offsets)
        if self.decay_at_perturbed:
            add_decay(weights.pick(direction), offsets, moved, probe.optimizer)
            shrink_as_decay(offsets, moved, probe.optimizer)
        probe.move_after_step(offsets)
        return direction

    def _radii(self, moved: Weights, probe: Probe) -> list[float]:
        """The signed length of each perturbation relative to its weight."""
        sign = 1.0 if self.move == "descent" else -1.0
        factors = [0.0] * len(moved)
        order = sorted(range(len(moved)), key=lambda index: moved.positions[index] if moved.positions else index)
        for index, factor in zip(order, layer_factors(len(moved), self.gamma, self.layers), strict=True):
            factors[index] = factor
        return [
            sign * factor * beta for factor, beta in zip(factors, probe.radii(self.beta, option="beta"), strict=True)
        ]
