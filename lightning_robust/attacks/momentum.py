# SPDX-License-Identifier: Apache-2.0
"""Iterated gradient sign with momentum, whose images transfer better to other models."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import AttackLoss
from lightning_robust.attacks.conditions import AttackMode
from lightning_robust.attacks.norms import per_sample
from lightning_robust.attacks.pgd import PGD, NormName, Start
from lightning_robust.attacks.problem import Problem
from lightning_robust.checks import check_non_negative

__all__ = ["MIM"]


class MIM(PGD):
    r"""Momentum iterative method (MI-FGSM), and with ``nesterov`` its look-ahead version (NI-FGSM).

    .. math:: v_{t+1} = \mu\, v_t + g_t / \overline{|g_t|}, \qquad x_{t+1} = P(x_t + \alpha\, s(v_{t+1}))

    with the gradient :math:`g_t` at :math:`x_t`, or at :math:`x_t + \alpha \mu v_t`. Against the model itself
    :class:`~lightning_robust.attacks.PGD` is stronger; momentum steadies the direction, so that other models err on
    these images more often.

    Cost: ``steps`` forwards and input-backwards.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        steps: number of steps.
        step_size: length of a step in pixel units; ``eps / steps`` when ``None``.
        decay: the part of the momentum that each step keeps.
        nesterov: take the gradient where the momentum alone would lead.
        random_start: as in :class:`~lightning_robust.attacks.PGD`.
        loss: what is maximised: ``"ce"``, ``"margin"``, ``"dlr"``, ``"prob-margin"`` or ``"kl"``.
        targeted: ``y`` is the class to reach.
        mode: mode of the model while it is attacked: ``"eval"``, ``"train"`` or ``"train-frozen-stats"``.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or arguments that exclude each other.

    References:
        Dong et al., Boosting Adversarial Attacks with Momentum, arXiv 1710.06081; Lin et al., Nesterov Accelerated
        Gradient and Scale Invariance for Adversarial Attacks, arXiv 1908.06281. Gradients are divided by their mean
        absolute value, not by its sum: the same signs, and a look-ahead as long as a step.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> bool((MIM(eps=0.1)(model, x, y) - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 10,
        step_size: float | None = None,
        decay: float = 1.0,
        nesterov: bool = False,
        random_start: bool | Start = False,
        loss: AttackLoss = "ce",
        targeted: bool = False,
        mode: AttackMode = "eval",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps=eps,
            norm=norm,
            steps=steps,
            step_size=eps / max(steps, 1) if step_size is None else step_size,
            random_start=random_start,
            loss=loss,
            targeted=targeted,
            mode=mode,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        check_non_negative("decay", decay)
        self.decay = decay
        self.nesterov = nesterov

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        velocity = torch.zeros_like(x_adv)
        for _ in range(self.steps):
            ahead = x_adv
            if self.nesterov:
                ahead = x_adv + self.space.from_pixels(self.decay * self.step_size * velocity)
            gradient, *_ = problem.gradient(ahead)
            size = per_sample(gradient.abs().flatten(1).mean(1), gradient)
            velocity = self.decay * velocity + gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
            x_adv = self.step(problem.x, x_adv, velocity, problem.scale)
        return x_adv
