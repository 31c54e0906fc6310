# SPDX-License-Identifier: Apache-2.0
"""Momentum-SAM: the gradient ahead of the weights along the momentum, at the cost of a plain step."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.sharpness.ascent import add_scaled
from lightning_robust.sharpness.backup import Scale
from lightning_robust.sharpness.decay import decays_apart
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.selection import ParameterSelection
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["MSAM"]

_MOMENTUM = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class MSAM(SharpnessMethod):
    r"""Momentum-SAM: perturbs along the optimizer's momentum, so that no pass is spent on the ascent.

    .. math:: d = g(w + e), \qquad e = -\rho \, v / (\lVert v \rVert_2 + 10^{-12})

    with the momentum :math:`v` of the optimizer before its step: the ``momentum_buffer`` of SGD, the ``exp_avg`` of
    Adam and AdamW, and one norm over all weights. Before the first step there is no momentum and no perturbation. A
    group option ``rho`` of the optimizer overrides ``rho`` for its weights.

    The one pass is at the perturbed weights: it logs, gives the value of the loss and moves BatchNorm statistics. The
    weights between steps are the unperturbed ones, so validation and checkpoints see those; nothing has to be moved
    back. :meth:`offsets` gives the perturbation for whoever wants to evaluate the perturbed weights.

    Cost: 1 forward + 1 backward pass per step. In memory, one copy of the weights.

    Args:
        rho: radius of the perturbation, a number or a schedule. 0.3 is the default of the official class; its commands
            for CIFAR-100 and ImageNet use 3.
        decay_at_perturbed: weight decay that the optimizer adds to the gradient (SGD, Adam) is that of the perturbed
            weights, as in the official SGD; ``False`` for that of the clean ones. The decoupled decay of AdamW always
            acts on the clean weights, as in the official AdamW.
        norm_eps: added to the norm, so that zero momentum gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive; before the first step, without optimizer, or for one
            that is not SGD with momentum, Adam or AdamW.

    References:
        Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv 2401.12033. The
        official optimizers keep the weights perturbed between steps until they are told to move back, have one
        parameter group, and ignore ``nesterov``. Here the base optimizer stays in charge: any groups, Nesterov,
        dampening; gradient clipping includes the share of the decay that belongs to the perturbation.

    Example:
        >>> from lightning_robust.sharpness import MSAM
        >>> MSAM(rho=3.0)
        MSAM(rho=3.0, decay_at_perturbed=True, norm_eps=1e-12)
    """

    counted: Literal["clean", "perturbed"] = "perturbed"
    needs_ascent: ClassVar[bool] = False

    def __init__(self, *, rho: Radius = 0.3, decay_at_perturbed: bool = True, norm_eps: float = 1e-12) -> None:
        check_radius("rho", rho)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.decay_at_perturbed = decay_at_perturbed
        self.norm_eps = norm_eps

    @property
    @override
    def extra_passes(self) -> float:
        return 0

    @override
    def check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if not isinstance(optimizer, _MOMENTUM):
            given = "there is no optimizer" if optimizer is None else f"that of {type(optimizer).__name__} is not known"
            raise ValueError(
                f"MSAM perturbs along the momentum of the optimizer, but {given}; give SGD with momentum, Adam or "
                "AdamW, or use SAM, which works with any."
            )
        if any(group.get("momentum") == 0 and group.get("perturb", True) for group in optimizer.param_groups):
            raise ValueError(
                f"MSAM perturbs along the momentum of the optimizer, but {type(optimizer).__name__} has momentum=0; "
                "set momentum=0.9, or leave out groups without momentum by their option perturb=False."
            )

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        momentum, scale = self._perturbation(probe)
        direction = probe.gradient_at(momentum, scale)
        if self.decay_at_perturbed:
            _add_decay(weights.pick(direction), momentum, scale, weights.perturbed.groups, probe.optimizer)
        return direction

    def offsets(
        self, optimizer: torch.optim.Optimizer, *, step: int | None = None, total_steps: int = -1
    ) -> dict[Tensor, Tensor]:
        """By how much the next step will perturb each trainable parameter of the optimizer.

        Args:
            optimizer: the base optimizer.
            step: optimizer steps taken so far, for a schedule of ``rho``.
            total_steps: optimizer steps of the run, for a schedule that needs its length.
        """
        self.check_optimizer(optimizer)
        weights = ParameterSelection().apply(Weights.of(optimizer))
        clock = None if step is None else lambda: (step, total_steps)
        momentum, scale = self._perturbation(Probe(weights, list, optimizer=optimizer, step=clock))
        return dict(zip(weights.perturbed.tensors, torch._foreach_mul(momentum, scale), strict=True))

    def _perturbation(self, probe: Probe) -> tuple[Gradients, Scale]:
        momentum = _momentum_of(probe.weights.perturbed, probe.optimizer)
        if momentum is None:
            return [torch.zeros_like(tensor) for tensor in probe.weights.perturbed.tensors], 0.0
        radii = [-radius for radius in probe.radii(self.rho)]
        return momentum, ascent_scales(radii, global_norm(momentum), self.norm_eps)


def _momentum_of(weights: Weights, optimizer: torch.optim.Optimizer | None) -> list[Tensor] | None:
    """The optimizer's momentum of each weight, zero for one that was never stepped; ``None`` if no weight was."""
    assert isinstance(optimizer, _MOMENTUM), "check_optimizer refuses"
    name = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
    found = [optimizer.state[tensor].get(name) if tensor in optimizer.state else None for tensor in weights.tensors]
    if all(buffer is None for buffer in found):
        return None
    return [
        torch.zeros_like(tensor) if buffer is None else buffer
        for tensor, buffer in zip(weights.tensors, found, strict=True)
    ]


def _add_decay(
    directions: Gradients,
    momentum: Gradients,
    scale: Scale,
    groups: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Add the decay of the perturbation to the directions, whose optimizer adds that of the unperturbed weights.

    What :func:`~lightning_robust.sharpness.decay.add_decay` does, without memory for the scaled perturbation.
    """
    assert optimizer is not None, "check_optimizer refuses"
    rates = [
        0.0 if decays_apart(optimizer, group) else group["weight_decay"] * (-1 if group["maximize"] else 1)
        for group in groups
    ]
    for rate in set(rates) - {0.0}:
        chosen = [index for index, own in enumerate(rates) if own == rate]
        scales = [scale[index] * rate for index in chosen] if isinstance(scale, list) else scale * rate
        add_scaled([directions[index] for index in chosen], [momentum[index] for index in chosen], scales)
