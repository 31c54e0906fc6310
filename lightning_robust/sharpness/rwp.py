# SPDX-License-Identifier: Apache-2.0
"""Robust weight perturbation: AWP that climbs the losses of well-fitted samples only, in several steps."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_positive
from lightning_robust.sharpness.awp import WeightTensorPerturbation, global_scales
from lightning_robust.sharpness.decay import add_decay
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.method import Evaluation
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["RWP", "stationary_loss"]


def stationary_loss(sample_losses: Tensor, threshold: float) -> Tensor:
    r"""The loss of the samples below a threshold, divided by the number of all samples.

    .. math:: \frac1B \sum_i \mathbf 1[\ell_i < c] \, \ell_i

    Args:
        sample_losses: losses ``[B]``.
        threshold: the threshold :math:`c`; no gradient flows through the comparison.

    Example:
        >>> stationary_loss(torch.tensor([1.0, 3.0]), threshold=1.7)
        tensor(0.5000)
    """
    return torch.where(sample_losses.detach() < threshold, sample_losses, 0.0).mean()


class RWP(WeightTensorPerturbation):
    r"""Robust weight perturbation: only samples of small loss push the weights, in several small climbs.

    .. math::
        L_c(w) = \frac1B \sum_i \mathbf 1[\ell_i(w) < c] \, \ell_i(w), \qquad
        e_k = \gamma \, \frac{\lVert w \rVert_2}{\lVert v_k \rVert_2 + 10^{-20}} \, v_k, \qquad
        v_{k+1} = v_k + \nabla L_c(w + e_k), \qquad d = g(w + e_K)

    with :math:`v_0 = 0` and one ratio of norms over all perturbed tensors: those with at least two dimensions and
    "weight" in their name. The pass at the perturbed weights logs and moves BatchNorm statistics. Needs the losses of
    single samples: a plain loop returns them from its closure; inside Lightning they are ``"sample_losses"`` in what
    the step returns (objectives do that), else the cross entropy of its logits. A group option ``gamma`` of the
    optimizer overrides ``gamma``.

    Cost: ``inner_steps + 1`` forward + backward passes per step, besides the attack: 11 with the defaults, so twice
    that of training with a ten-step attack.

    Args:
        gamma: length of the perturbation relative to the weights, a number or a schedule; 0.01 in the code for PGD
            training, 0.005 for TRADES (there from epoch 10 on: ``SharpnessAware(RWP(gamma=0.005), start_epoch=10)``).
        loss_threshold: samples with this loss or more do not push; 1.7 in the code for CIFAR-10 and SVHN, 4.0 for
            CIFAR-100. For TRADES it is compared with the whole loss of a sample.
        inner_steps: number of climbs.
        decay_at_perturbed: weight decay acts at ``w + e``, as in the published code, which steps there. Equal for
            every optimizer that adds its decay to the gradient; others need ``False``, which decays ``w``.

    Raises:
        ValueError: an argument out of range; with ``decay_at_perturbed``, if the optimizer decays weights apart from
            the gradient (AdamW) or in a way that is not known; if the losses of single samples are not known.

    References:
        Yu et al., Robust Weight Perturbation for Adversarial Training, arXiv 2205.14826. Like their code this always
        climbs ``inner_steps`` times, also when no sample is below the threshold; the learning rate of its copy of the
        model cancels. Its version for TRADES adds losses ``[B]`` to divergences ``[B, C]`` and cannot run; here the
        divergence is summed over the classes first.

    Example:
        >>> from lightning_robust.sharpness import RWP
        >>> RWP(gamma=0.005).extra_passes
        10
    """

    needs_sample_losses: ClassVar[bool] = True

    def __init__(
        self,
        *,
        gamma: Radius = 0.01,
        loss_threshold: float = 1.7,
        inner_steps: int = 10,
        decay_at_perturbed: bool = True,
    ) -> None:
        check_radius("gamma", gamma)
        check_positive("loss_threshold", loss_threshold)
        check_integer("inner_steps", inner_steps, 1)
        self.gamma = gamma
        self.loss_threshold = loss_threshold
        self.inner_steps = inner_steps
        self.decay_at_perturbed = decay_at_perturbed

    @property
    @override
    def extra_passes(self) -> float:
        return self.inner_steps

    @override
    def ascent_loss(self, evaluation: Evaluation) -> Tensor:
        return stationary_loss(evaluation.sample_losses(), self.loss_threshold)

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        moved = weights.perturbed
        climbed = weights.pick(gradients)
        radii = probe.radii(self.gamma, option="gamma")
        length = global_norm(moved.tensors)
        for _ in range(self.inner_steps - 1):
            found = probe.ascent_gradient_at(climbed, global_scales(moved.tensors, climbed, radii, length))
            torch._foreach_add_(climbed, weights.pick(found))
            del found
        torch._foreach_mul_(climbed, global_scales(moved.tensors, climbed, radii, length))
        direction = probe.gradient_at(climbed)
        if self.decay_at_perturbed:
            add_decay(weights.pick(direction), climbed, moved, probe.optimizer)
        return direction
