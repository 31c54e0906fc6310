# SPDX-License-Identifier: Apache-2.0
"""Adversarial weight perturbation: relative to the size of the weights, and the variants that share its name."""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.sharpness.decay import add_decay, check_decay
from lightning_robust.sharpness.gradients import global_norm, tensor_norms
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, check_radius
from lightning_robust.sharpness.selection import ParameterSelection
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["AWP", "GlobalAWP", "SAMStyleAWP", "global_scales", "layerwise_scales"]

_NORM_EPS = 1e-20


def layerwise_scales(tensors: list[Tensor], directions: Gradients, radii: list[float]) -> list[Tensor]:
    r"""What makes each direction a given fraction as long as its weight tensor.

    .. math:: \gamma_l \lVert w_l \rVert_2 / (\lVert g_l \rVert_2 + 10^{-20})

    Args:
        tensors: weights.
        directions: one per weight; they stay as they are.
        radii: the fraction :math:`\gamma_l` of each weight.

    Example:
        >>> layerwise_scales([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])], [0.1])
        [tensor(0.2500)]
    """
    scales = tensor_norms(tensors)
    lengths = tensor_norms(directions)
    torch._foreach_add_(lengths, _NORM_EPS)
    torch._foreach_mul_(scales, radii)
    torch._foreach_div_(scales, lengths)
    return [_finite(scale, direction) for scale, direction in zip(scales, directions, strict=True)]


def global_scales(
    tensors: list[Tensor], directions: Gradients, radii: list[float], length: Tensor | None = None
) -> Tensor | list[Tensor]:
    r"""The same with one ratio of norms over all tensors; one number where all radii are equal.

    Args:
        tensors: weights.
        directions: one per weight; they stay as they are.
        radii: the fraction :math:`\gamma` of each weight.
        length: norm of all weights, where it is known.

    Example:
        >>> global_scales([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([0.0]), torch.ones(1)], [0.1, 0.1])
        tensor(0.5000)
    """
    ratio = (global_norm(tensors) if length is None else length) / (global_norm(directions) + _NORM_EPS)
    if all(radius == radii[0] for radius in radii):
        return _finite(ratio * radii[0], directions[0])
    return [_finite(ratio * radius, direction) for radius, direction in zip(radii, directions, strict=True)]


def _finite(scale: Tensor, direction: Tensor) -> Tensor:
    # in float16 the scale of a zero direction is infinite, and their product not zero
    return scale.clamp(max=torch.finfo(torch.float16).max) if direction.dtype == torch.float16 else scale


class WeightTensorPerturbation(SharpnessMethod):
    """What AWP, RWP and LAP have in common: they move weight tensors, and the pass at the moved ones counts."""

    counted: Literal["clean", "perturbed"] = "perturbed"
    ascent_only: ClassVar[bool] = True
    #: Whether the method copes with an optimizer that decays weights apart from the gradient.
    decays_either_way: ClassVar[bool] = False
    decay_at_perturbed: bool

    @override
    def default_parameters(self) -> ParameterSelection:
        return ParameterSelection(include="weight", min_ndim=2)

    @override
    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.decay_at_perturbed:
            check_decay(type(self).__name__, optimizer, apart=self.decays_either_way)


class AWP(WeightTensorPerturbation):
    r"""Adversarial weight perturbation: each weight tensor moves uphill by a fraction of its own length.

    .. math:: e_l = \gamma \, \frac{\lVert w_l \rVert_2}{\lVert g_l(w) \rVert_2 + 10^{-20}} \, g_l(w),
              \qquad d = g(w + e)

    tensor by tensor, for those with at least two dimensions and "weight" in their name: neither biases nor
    normalisation layers move. Made for adversarial training: the attack comes first, at the unperturbed weights, and
    both passes see its images. The pass at the perturbed weights is the one that logs and moves BatchNorm statistics.
    A group option ``gamma`` of the optimizer overrides ``gamma``.

    Cost: 2 forward + 2 backward passes per step, besides the attack.

    Args:
        gamma: length of the perturbation relative to the weights, a number or a schedule; 0.01 in the paper for
            PGD training, 0.005 for TRADES (there from epoch 10 on: ``SharpnessAware(AWP(gamma=0.005),
            start_epoch=10)``).
        decay_at_perturbed: weight decay acts at ``w + e``, as in the published code, which steps there. Equal for
            every optimizer that adds its decay to the gradient; others need ``False``, which decays ``w``.

    Raises:
        ValueError: ``gamma`` is not positive; with ``decay_at_perturbed``, if the optimizer decays weights apart from
            the gradient (AdamW) or in a way that is not known.

    References:
        Wu et al., Adversarial Weight Perturbation Helps Robust Generalization, arXiv 2004.05884. Their code climbs with
        a step of a copy of the model, whose learning rate cancels, and subtracts the perturbation again, which leaves
        rounding errors; here weights are restored exactly. Its clean forward for the log, which also moves
        BatchNorm statistics, is left out.

    Example:
        >>> from lightning_robust.sharpness import AWP
        >>> AWP(gamma=0.005)
        AWP(gamma=0.005, decay_at_perturbed=True)
    """

    def __init__(self, *, gamma: Radius = 0.01, decay_at_perturbed: bool = True) -> None:
        check_radius("gamma", gamma)
        self.gamma = gamma
        self.decay_at_perturbed = decay_at_perturbed

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        moved = weights.perturbed
        offsets = weights.pick(gradients)
        radii = probe.radii(self.gamma, option="gamma")
        torch._foreach_mul_(offsets, layerwise_scales(moved.tensors, offsets, radii))
        direction = probe.gradient_at(offsets)
        if self.decay_at_perturbed:
            add_decay(weights.pick(direction), offsets, moved, probe.optimizer)
        return direction


class GlobalAWP(SharpnessMethod):
    r"""AWP with one ratio of norms over all parameters, as in the MAIR library: SAM with a relative radius.

    .. math:: e = \rho \, \frac{\lVert w \rVert_2}{\lVert g(w) \rVert_2 + 10^{-20}} \, g(w), \qquad d = g(w + e)

    Biases and normalisation layers move too. Weight decay acts at the unperturbed weights; the clean pass logs and
    moves BatchNorm statistics. A group option ``rho`` of the optimizer overrides ``rho`` for its weights.

    Cost: 2 forward + 2 backward passes per step, besides the attack.

    Args:
        rho: length of the perturbation relative to all weights, a number or a schedule; 0.005 in MAIR.

    Raises:
        ValueError: ``rho`` is not positive.

    References:
        Wu et al., arXiv 2004.05884, for the idea; the minimizer ``AWP`` of the library MAIR for this form. MAIR attacks
        anew at the perturbed weights and moves BatchNorm statistics in both passes; here the attack runs once and one
        pass counts.

    Example:
        >>> from lightning_robust.sharpness import GlobalAWP
        >>> GlobalAWP()
        GlobalAWP(rho=0.005)
    """

    ascent_only: ClassVar[bool] = True

    def __init__(self, *, rho: Radius = 0.005) -> None:
        check_radius("rho", rho)
        self.rho = rho

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        offsets = weights.pick(gradients)
        torch._foreach_mul_(offsets, self._scales(weights.perturbed.tensors, offsets, probe.radii(self.rho)))
        return probe.gradient_at(offsets)

    def _scales(self, tensors: list[Tensor], directions: Gradients, radii: list[float]) -> Tensor | list[Tensor]:
        return global_scales(tensors, directions, radii)


class SAMStyleAWP(GlobalAWP):
    r"""AWP over every parameter, with the weights back before the optimizer steps: the form in the code of ADR.

    .. math:: e_l = \rho \, \frac{\lVert w_l \rVert_2}{\lVert g_l(w) \rVert_2 + 10^{-20}} \, g_l(w),
              \qquad d = g(w + e)

    tensor by tensor, biases and normalisation layers included. Weight decay acts at the unperturbed weights; the clean
    pass logs and moves BatchNorm statistics. A group option ``rho`` of the optimizer overrides ``rho``.

    Cost: 2 forward + 2 backward passes per step, besides the attack.

    Args:
        rho: length of the perturbation relative to each tensor, a number or a schedule; 0.005 for all networks of ADR.

    Raises:
        ValueError: ``rho`` is not positive.

    References:
        Wu et al., arXiv 2004.05884, for the idea; Wu et al., Annealing Self-Distillation Rectification Improves
        Adversarial Training, arXiv 2305.12118, for this form. Its code counts the batches of BatchNorm twice per step
        while the statistics move once; here the counter moves once.

    Example:
        >>> from lightning_robust.sharpness import SAMStyleAWP
        >>> SAMStyleAWP()
        SAMStyleAWP(rho=0.005)
    """

    @override
    def _scales(self, tensors: list[Tensor], directions: Gradients, radii: list[float]) -> list[Tensor]:
        return layerwise_scales(tensors, directions, radii)
