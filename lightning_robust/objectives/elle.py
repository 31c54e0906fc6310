# SPDX-License-Identifier: Apache-2.0
"""ELLE: single-step adversarial training that keeps the loss linear around the images."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import FGSM, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.norms import per_sample
from lightning_robust.checks import check_non_negative
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared

__all__ = ["ELLE", "LocalLinearity", "elle_loss"]


def elle_loss(
    adv_logits: Tensor, triplet_logits: Tensor, target: Tensor, alpha: Tensor, weight: float | Tensor = 1000.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Adversarial cross entropy plus ``weight`` times the squared error of a linear interpolation of the loss.

    .. math:: \frac1B \sum_i \mathrm{CE}(z'_i, y_i) + \lambda\, \frac1B \sum_i
              \big( \ell^c_i - (1 - \alpha_i)\, \ell^a_i - \alpha_i\, \ell^b_i \big)^2

    with :math:`\ell` the cross entropy at the three points of a triplet. Gradients flow through all of them; no second
    derivative is taken.

    Args:
        adv_logits: logits ``[B, C]`` of the attacked images.
        triplet_logits: logits ``[3 B, C]`` of the points a, b and c, in this order.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        alpha: where c lies between a and b, ``[B]``.
        weight: factor :math:`\lambda`.

    Returns:
        The loss, its cross-entropy part, its linearity error (before ``weight``), and what each sample adds to the
        loss, ``[B]``.

    Raises:
        ValueError: the triplets are not three to a target.

    Example:
        >>> zeros, triplet = torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> elle_loss(zeros, triplet, torch.tensor([0]), torch.tensor([0.5]), weight=1.0)[2]
        tensor(0.0094)
    """
    if len(triplet_logits) != 3 * len(target):
        raise ValueError(
            f"Expected `triplet_logits` of 3 points for each of {len(target)} targets but got {len(triplet_logits)}."
        )
    samples = cross_entropy(adv_logits, target, reduction="none")
    at_a, at_b, at_c = (cross_entropy(each, target, reduction="none") for each in triplet_logits.chunk(3))
    alpha = alpha.to(at_a)
    errors = (at_c - (1 - alpha) * at_a - alpha * at_b).square()
    adversarial, linearity = samples.mean(), errors.mean()
    return adversarial + weight * linearity, adversarial, linearity, samples + weight * errors


class LocalLinearity(AttackedObjective):
    """What ELLE and ELLE-A share: the draws, the passes, and the loss for a weight that the subclass knows.

    Args:
        attack: finds the attacked images and says the radius; ``FGSM(eps=8/255, mode="train")`` when ``None``.
        clamp: bring the drawn points into the possible pixels.

    Raises:
        ValueError: an attack in another norm than linf.
    """

    weight: float | Tensor

    def __init__(self, *, attack: Attack | None, clamp: bool) -> None:
        super().__init__(FGSM(eps=8 / 255, mode="train") if attack is None else attack)
        self._check_norm()
        self.clamp = clamp

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        self._check_norm()

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        attack = self.current_attack
        x_adv = attack(model, x, y, generator=generator)
        images = full_precision(x.detach())
        noise = torch.empty((2, *images.shape), dtype=images.dtype, device=images.device)
        noise.uniform_(-attack.eps, attack.eps, generator=generator)
        alpha = torch.rand(len(images), generator=generator, dtype=images.dtype, device=images.device)
        a, b = (images + attack.space.from_pixels(each) for each in noise)
        if self.clamp:
            a, b = attack.space.clip(a), attack.space.clip(b)
        c = torch.lerp(a, b, per_sample(alpha, images))
        return Prepared(x, y, x_adv, {"triplet": torch.cat([a, b, c]).to(x.dtype), "alpha": alpha})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        adv, triplet = model(prepared.x_adv), model(prepared.extra["triplet"])
        loss, adversarial, linearity, samples = elle_loss(
            adv, triplet, prepared.y, prepared.extra["alpha"], self.weight
        )
        logs = {"adversarial": adversarial.detach(), "linearity": linearity.detach()}
        return ObjectiveOutput(loss, adv, logs, samples)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 4

    def _check_norm(self) -> None:
        norm = getattr(self.current_attack, "norm", "linf")
        if norm != "linf":
            raise ValueError(
                f"{type(self).__name__} draws its points from the linf ball and knows no attack in {norm}; take one "
                "in linf."
            )


class ELLE(LocalLinearity):
    r"""Single-step adversarial training with a penalty on the curvature of the loss within the budget.

    .. math:: \mathrm{CE}(f(x'), y) + \lambda\, \big( \ell(x^c) - (1 - \alpha)\, \ell(x^a) - \alpha\, \ell(x^b) \big)^2,
              \qquad x^c = (1 - \alpha)\, x^a + \alpha\, x^b

    with :math:`x^a, x^b` drawn uniformly from the linf ball around the image, :math:`\alpha` from [0, 1], anew for each
    sample and batch, and :math:`\ell = \mathrm{CE}(f(\cdot), y)`. A loss that is linear there cannot be fooled by one
    step and not by ten, which is what catastrophic overfitting is. No double backward.

    Cost: 1 forward and input-backward for the attack, then forwards and backwards on 4 B images: about 5 / 2 of plain
    single-step training.

    Args:
        attack: finds the attacked images and says the radius; when ``None`` ``FGSM(eps=8/255, mode="train")``. N-FGSM,
            the other start of the paper, is
            ``FGSM(eps=8/255, random_start=True, start_scale=2, projection="box", mode="train")``.
        weight: factor :math:`\lambda`: 1000 for eps up to 8/255, 5000 up to 20/255, 10000 above.
        clamp: bring the drawn points into the possible pixels; the authors do not.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative ``weight``, or an attack in another norm than linf.

    References:
        Abad Rocamora et al., Efficient Local Linearity Regularization to Overcome Catastrophic Overfitting, ICLR 2024
        (OpenReview SZzQz8ikwg). Their code clips the attacked images neither to the ball nor to the pixels (here the
        attack decides; ``bounds=(-1, 2)`` does the same), runs the clean images in training mode for its log, and calls
        the optimizer twice for every gradient; here it is called once.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = ELLE(weight=10.0)
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['adversarial', 'linearity']
    """

    def __init__(self, *, attack: Attack | None = None, weight: float = 1000.0, clamp: bool = False) -> None:
        super().__init__(attack=attack, clamp=clamp)
        check_non_negative("weight", weight)
        self.weight = weight

    @override
    def extra_repr(self) -> str:
        return f"attack={self.attack!r}, weight={self.weight}, clamp={self.clamp}"
