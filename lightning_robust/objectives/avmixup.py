# SPDX-License-Identifier: Apache-2.0
"""AVmixup: training between clean images and points beyond the attacked ones, with labels to match."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.losses import PREDICTION_LOSSES
from lightning_robust.attacks.norms import per_sample
from lightning_robust.checks import check_in_range, check_non_negative, check_positive
from lightning_robust.losses import Criterion, cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, Objective, ObjectiveOutput, Prepared
from lightning_robust.objectives.terms import label_probabilities

__all__ = ["AVmixup", "avmixup_images", "avmixup_labels"]


def avmixup_images(
    x: Tensor, x_adv: Tensor, weights: Tensor, *, gamma: float = 2.0, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> Tensor:
    r"""Points between clean images and their adversarial vertices, ``w x + (1 - w) clip(x + gamma (x' - x))``.

    Args:
        x: clean images ``[B, ...]``.
        x_adv: attacked images.
        weights: of the clean images, ``[B]`` in [0, 1].
        gamma: how far beyond the attacked image the vertex lies; it leaves the budget of the attack by design.
        bounds: smallest and largest possible pixel; ``None`` to clip nothing.

    Shape:
        Returns ``[B, ...]``.

    Example:
        >>> x, x_adv = torch.tensor([[0.2, 0.9]]), torch.tensor([[0.3, 1.0]])
        >>> avmixup_images(x, x_adv, torch.tensor([0.5]))
        tensor([[0.3000, 0.9500]])
    """
    vertex = x + gamma * (x_adv - x)
    if bounds is not None:
        vertex = vertex.clamp(*bounds)
    return _between(x, vertex, weights)


def avmixup_labels(
    labels: Tensor, weights: Tensor, *, clean_confidence: float = 1.0, vertex_confidence: float = 0.1
) -> Tensor:
    r"""Labels of the points of :func:`avmixup_images`, ``w s(y, l1) + (1 - w) s(y, l2)``.

    :math:`s(y, l)` has :math:`l` on the true class and :math:`(1-l)/(C-1)` on each other one.

    Args:
        labels: probabilities ``[B, C]``, one-hot for hard labels.
        weights: of the clean images, ``[B]`` in [0, 1].
        clean_confidence: :math:`l_1`, of clean images.
        vertex_confidence: :math:`l_2`, of vertices.

    Shape:
        Returns ``[B, C]``.

    Example:
        >>> avmixup_labels(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]))
        tensor([[0.5500, 0.4500]])
    """
    clean, vertex = (_smoothed(labels, confidence) for confidence in (clean_confidence, vertex_confidence))
    return _between(clean, vertex, weights)


def _between(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    weights = per_sample(weights.to(first), first)
    return weights * first + (1 - weights) * second


def _smoothed(labels: Tensor, confidence: float) -> Tensor:
    return labels * confidence + (1 - labels) * ((1 - confidence) / (labels.shape[1] - 1))


class AVmixup(AttackedObjective):
    r"""Adversarial vertex mixup: trains on points between clean images and vertices beyond the attacked ones.

    .. math:: \mathrm{CE}\big(f(w x + (1 - w) v),\; w\, s(y, l_1) + (1 - w)\, s(y, l_2)\big), \qquad
              v = \mathrm{clip}\big(x + \gamma (x' - x)\big), \quad w \sim \mathrm{Beta}(a, a)

    with one weight per sample and :math:`s(y, l)` the label with confidence :math:`l`. Vertices leave the budget of the
    attack by design. Its gain against PGD is known to be masking of gradients in part: judge it by AutoAttack.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 1 forward and backward.

    Args:
        attack: finds the attacked images with the label; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=8/255, step_size=2/255, steps=10, random_start="uniform", mode="train")``.
        gamma: how far the vertex lies from the clean image, in lengths of the perturbation.
        clean_confidence: confidence of the label at the clean image, the paper's lambda 1.
        vertex_confidence: confidence of the label at the vertex, the paper's lambda 2 for CIFAR-10, where it is the
            uniform distribution.
        concentration: of the Beta distribution; 1 is the uniform one of the paper.
        criterion: a loss of logits and probabilities that takes the place of the cross entropy.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or an attack that ignores the label, ``loss="kl"`` say.
        TypeError: an objective such as TRADES as ``criterion``: it needs clean images, and here there are none.

    References:
        Lee et al., Adversarial Vertex Mixup: Toward Better Adversarially Robust Generalization, arXiv 2003.02484. Their
        code works in pixels from 0 to 255.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = AVmixup(attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> objective(model, prepared).logits.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        gamma: float = 2.0,
        clean_confidence: float = 1.0,
        vertex_confidence: float = 0.1,
        concentration: float = 1.0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, random_start="uniform", mode="train")
            if attack is None
            else attack
        )
        check_non_negative("gamma", gamma)
        check_in_range("clean_confidence", clean_confidence, 0.0, 1.0)
        check_in_range("vertex_confidence", vertex_confidence, 0.0, 1.0)
        check_positive("concentration", concentration)
        if self.attack.loss in PREDICTION_LOSSES:
            raise ValueError(f"AVmixup mixes along an attack on the label, which loss={self.attack.loss!r} ignores.")
        if isinstance(criterion, Objective):
            raise TypeError(
                f"Expected `criterion` to be a loss of logits and targets but got {type(criterion).__name__}; AVmixup "
                "trains on mixed images alone, so there is no clean prediction that TRADES and its kin could use."
            )
        self.gamma = gamma
        self.clean_confidence, self.vertex_confidence = clean_confidence, vertex_confidence
        self.concentration = concentration
        self.criterion = criterion

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        prepared = super().prepare(model, x, y, generator=generator)
        assert prepared.x_adv is not None, "made by the attack"
        weights = _beta(len(x), self.concentration, x.device, generator)
        vertex = self.attack.space.clip(x + self.gamma * (prepared.x_adv - x))
        mixed = _between(x, vertex.to(x.dtype), weights)
        return Prepared(x, y, prepared.x_adv, {"mixed": mixed, "weights": weights})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        logits = model(prepared.extra["mixed"])
        precise = full_precision(logits)
        target = avmixup_labels(
            label_probabilities(prepared.y, precise),
            prepared.extra["weights"],
            clean_confidence=self.clean_confidence,
            vertex_confidence=self.vertex_confidence,
        )
        if self.criterion is not None:
            return ObjectiveOutput(self.criterion(precise, target), logits, {})
        losses = cross_entropy(precise, target, reduction="none")
        return ObjectiveOutput(losses.mean(), logits, {}, losses)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, gamma={self.gamma}, clean_confidence={self.clean_confidence}, "
            f"vertex_confidence={self.vertex_confidence}, concentration={self.concentration}"
        )


def _beta(count: int, concentration: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """``count`` draws of a symmetric Beta distribution."""
    if concentration == 1:
        return torch.rand(count, device=device, generator=generator)
    # a ratio of Gamma draws; in logarithms it would take small concentrations, too, but those mix nothing
    shape = torch.full((2, count), concentration, device=device)
    first, second = torch._standard_gamma(shape, generator=generator)
    drawn: Tensor = first / (first + second)
    return drawn
