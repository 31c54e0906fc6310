# SPDX-License-Identifier: Apache-2.0
"""The probability margin attack, and the ensemble of it with APGD-T."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.multi_targeted import MultiTargeted
from lightning_robust.attacks.pgd import NormName
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.sequence import AttackSequence
from lightning_robust.attacks.two_stage import TwoStage

__all__ = ["PMA", "PMAPlus"]


class PMA(TwoStage):
    r"""Probability margin attack: margin decomposition of probabilities.

    .. math:: \ell = \max_{j \ne y} p_j - p_y, \qquad p = \mathrm{softmax}(f(x))

    in two rounds from starts of their own; for the first half of the steps one of the terms alone is maximised
    (:math:`-p_y`, then :math:`\max_{j \ne y} p_j`; the very first step raises :math:`p_y`, to explore). Steps follow
    the sign and shrink from :math:`2 \epsilon` by a cosine in each half. A sample leaves with the first point that
    fools the model, also if that is the clean image; of others the point of highest loss is returned.

    Where :math:`p_y` rounds to one, its gradient is zero; there the logits take the place of the probabilities.

    Cost: at most ``2 * steps`` forwards and input-backwards and 3 forwards; fewer as samples leave.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"``, as published, ``"l2"`` or ``"l1"``, with the steps of :class:`PGD` there.
        steps: steps of a round; the authors' quick variant takes 50.
        first_stage: steps with one term; half of ``steps`` when ``None``.
        restarts: independent runs of two rounds, for samples that are not fooled.
        targeted: ``y`` is the class to reach: the terms change their signs.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]``.

    Raises:
        ValueError: an argument out of range.

    References:
        Xie et al., Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual Attacks, arXiv
        2411.15210.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = PMA(eps=0.1, steps=10)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    first_part: ClassVar[float] = 0.5

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 100,
        first_stage: int | None = None,
        restarts: int = 1,
        targeted: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps=eps,
            norm=norm,
            steps=steps,
            first_stage=first_stage,
            restarts=restarts,
            loss="prob-margin",
            targeted=targeted,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )

    @override
    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        probabilities = logits.softmax(1)
        saturated = probabilities.gather(1, target.long().unsqueeze(1)) == 1
        return torch.where(saturated, logits, probabilities)

    @override
    def second_stage(self, problem: Problem) -> Problem:
        return self.weighted(problem, -1, 1)


class PMAPlus(AttackSequence):
    """PMA, then APGD towards several classes with the DLR loss, for the samples that PMA leaves right.

    Nearly as strong as AutoAttack at a fraction of its cost, says the paper.

    Cost: that of PMA, and of :class:`MultiTargeted` APGD for what is left.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"``, as published, ``"l2"`` or ``"l1"``.
        steps: steps of each round of PMA and of APGD towards each class.
        targets: number of classes that APGD steers to.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attacks' own generators, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]``.

    Raises:
        ValueError: an argument out of range.

    References:
        Xie et al., arXiv 2411.15210.

    Example:
        >>> list(PMAPlus().stages(num_classes=10))
        ['pma', 'apgd-t']
    """

    chooses_targets: ClassVar[bool] = True

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 100,
        targets: int = 9,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        pma = PMA(eps=eps, norm=norm, steps=steps, mean=mean, std=std, bounds=bounds, seed=seed)
        apgd = APGD(eps=eps, norm=norm, steps=steps, loss="dlr", mean=mean, std=std, bounds=bounds, seed=seed)
        super().__init__(attacks={"pma": pma, "apgd-t": MultiTargeted(apgd, targets=targets)})
        self.norm, self.steps, self.targets = norm, steps, targets

    @override
    def at(self, epoch: int, max_epochs: int) -> Attack:
        return self
