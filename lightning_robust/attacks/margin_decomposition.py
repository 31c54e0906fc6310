# SPDX-License-Identifier: Apache-2.0
"""Margin decomposition: the two terms of the margin one after the other, against imbalanced gradients."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import Model, attack_conditions, ordinary, unwrap
from lightning_robust.attacks.draws import SampleDraws
from lightning_robust.attacks.losses import margin_terms
from lightning_robust.attacks.pgd import NormName
from lightning_robust.attacks.problem import check_batch
from lightning_robust.attacks.two_stage import TwoStage
from lightning_robust.checks import check_choice
from lightning_robust.losses import full_precision

__all__ = ["MD", "gradient_imbalance"]


def gradient_imbalance(model: Model, x: Tensor, y: Tensor) -> Tensor:
    r"""How unequal the gradients of the two terms of the margin are, per sample; 1 is balanced.

    .. math:: r = \max\left(\rho, 1 / \rho\right), \qquad
        \rho = \frac{\|\nabla_x z_y\|_1}{\|\nabla_x \max_{j \ne y} z_j\|_1}

    Large values tell that the gradient of a margin points where one term wants: attacks with a single stage then
    overestimate robustness, as with label smoothing. Infinite where one of the gradients is zero.

    Cost: one forward and two input-backwards.

    Args:
        model: module or callable ``x -> logits``, put into evaluation mode meanwhile.
        x: images ``[B, ...]``.
        y: classes ``[B]``.

    Shape:
        Returns ``[B]``.

    References:
        Jiang et al., Imbalanced Gradients, arXiv 2006.13726.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> gradient_imbalance(model, torch.rand(1, 2), torch.tensor([0])).item()
        4.0
    """
    check_batch(x, y)
    network, module = unwrap(model)
    indices = torch.arange(len(x), device=x.device)
    with attack_conditions(module, "eval", x.device, SampleDraws(0, indices)):
        images = ordinary(x).requires_grad_()
        terms = margin_terms(full_precision(network(images)), y)
        gradients = (torch.autograd.grad(term.sum(), images, retain_graph=True)[0] for term in terms)
        own, other = (full_precision(gradient).abs().flatten(1).sum(1) for gradient in gradients)
        largest, smallest = torch.maximum(own, other), torch.minimum(own, other)
        return torch.where(largest > 0, largest / smallest, 1.0)


class MD(TwoStage):
    r"""Margin decomposition attack: first one term of the margin alone, then the margin.

    Where the gradient of one term dominates, the gradient of :math:`\max_{j \ne y} z_j - z_y` points the wrong way.
    Each run therefore consists of two rounds from starts of their own; in their first stage

    .. math:: \ell = -z_y \text{ (round 1)}, \qquad \ell = \max_{j \ne y} z_j \text{ (round 2)}

    is maximised for :math:`K` steps (the very first step raises :math:`z_y`, to explore), then the margin. Steps follow
    the sign and shrink from :math:`2 \epsilon` by a cosine in each stage. A sample leaves with the first point that
    fools the model, also if that is the clean image; of others the point of highest loss is returned.

    Cost: at most ``2 * steps`` forwards and input-backwards and 3 forwards; fewer as samples leave. With
    ``towards`` (:class:`MultiTargeted`) the term of the wanted class takes the place of the largest one.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"``, as published, ``"l2"`` or ``"l1"``, with the steps of :class:`PGD` there.
        steps: steps of a round.
        first_stage: steps with one term; two fifths of ``steps`` when ``None`` (20 of 50, as published).
        restarts: independent runs of two rounds, for samples that are not fooled.
        loss: ``"margin"`` or ``"dlr"``: what the second stage maximises.
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
        Jiang et al., Imbalanced Gradients, arXiv 2006.13726. The authors' DLR divides by the sum of all logits; here it
        is that of AutoAttack. Their code goes on with fooled samples, and draws starts outside of the possible pixels.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = MD(eps=0.1, steps=10)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    first_part: ClassVar[float] = 0.4

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        steps: int = 50,
        first_stage: int | None = None,
        restarts: int = 1,
        loss: Literal["margin", "dlr"] = "margin",
        targeted: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        check_choice("loss", loss, ("margin", "dlr"))
        super().__init__(
            eps=eps,
            norm=norm,
            steps=steps,
            first_stage=first_stage,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
