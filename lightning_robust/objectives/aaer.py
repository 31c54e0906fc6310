# SPDX-License-Identifier: Apache-2.0
"""AAER: single-step adversarial training that watches the samples on which the step backfires."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import FGSM, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.ascent import Ascent, check_one_run
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared

__all__ = ["AAER", "AbnormalExamples", "aaer_loss", "abnormal_examples"]

CETerm = Literal["detached", "differentiable"]


class AbnormalExamples(NamedTuple):
    """The samples whose loss the attack's step lowered, and how they and the others moved.

    Args:
        mask: which samples are abnormal, ``[B]``.
        abnormal_variation: mean squared change of their logits, with graph; 0 without any.
        normal_variation: the same of the others, with graph.
        ce_drop: by how much the step lowered their cross entropy, on average, with graph.

    Example:
        >>> abnormal_examples(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([0])).mask
        tensor([True])
    """

    mask: Tensor
    abnormal_variation: Tensor
    normal_variation: Tensor
    ce_drop: Tensor


def abnormal_examples(start_logits: Tensor, adv_logits: Tensor, target: Tensor) -> AbnormalExamples:
    r"""Find the abnormal adversarial examples of a batch: :math:`\mathrm{CE}(z^0, y) > \mathrm{CE}(z', y)`.

    Args:
        start_logits: logits ``[B, C]`` where the attack's step began; constants.
        adv_logits: logits ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.

    Example:
        >>> start, adv = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> abnormal_examples(start, adv, torch.tensor([0, 0]))[:3]
        (tensor([ True, False]), tensor(1.), tensor(4.))
    """
    start, adv = full_precision(start_logits.detach()), full_precision(adv_logits)
    before, after = (cross_entropy(logits, target, reduction="none") for logits in (start, adv))
    abnormal = before > after.detach()
    moved = (adv - start).square().sum(1)
    return AbnormalExamples(
        abnormal, _mean_over(moved, abnormal), _mean_over(moved, ~abnormal), _mean_over(before - after, abnormal)
    )


def aaer_loss(
    start_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    *,
    weight: float = 1.0,
    ce_weight: float = 2.5,
    variation_weight: float = 1.5,
    ce_term: CETerm = "detached",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Adversarial cross entropy plus a penalty on the abnormal adversarial examples of the batch.

    .. math:: \frac1B \sum_i \mathrm{CE}(z'_i, y_i)
              + \lambda_1 \frac{|A|}{B} \big( \lambda_2\, G_A + \lambda_3 \max(V_A - V_N, 0) \big)

    with :math:`A` the samples with :math:`\mathrm{CE}(z^0_i, y_i) > \mathrm{CE}(z'_i, y_i)`, :math:`N` the others,
    :math:`V` the mean of :math:`\|z'_i - z^0_i\|_2^2` over either (:math:`V_N` is a constant) and :math:`G_A` the mean
    of :math:`\mathrm{CE}(z^0_i, y_i) - \mathrm{CE}(z'_i, y_i)` over :math:`A`. If either set is empty there is no
    penalty.

    Args:
        start_logits: logits ``[B, C]`` where the attack's step began; constants.
        adv_logits: logits ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        weight: :math:`\lambda_1`.
        ce_weight: :math:`\lambda_2`.
        variation_weight: :math:`\lambda_3`.
        ce_term: ``"detached"``: :math:`G_A` is a constant, as in the authors' code: it shows in the loss and changes no
            gradient; ``"differentiable"``: its gradient raises the loss of abnormal samples at the attacked image.

    Returns:
        The loss, its cross-entropy part and its penalty.

    Raises:
        ValueError: an unknown ``ce_term``.

    Example:
        >>> start, adv = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> aaer_loss(start, adv, torch.tensor([0, 0]), ce_weight=0.0)
        (tensor(2.9701), tensor(0.7201), tensor(2.2500))
    """
    loss, adversarial, penalty, _ = _parts(
        start_logits, adv_logits, target, (weight, ce_weight, variation_weight), ce_term
    )
    return loss, adversarial, penalty


def _parts(
    start_logits: Tensor, adv_logits: Tensor, target: Tensor, weights: tuple[float, float, float], ce_term: CETerm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, cross entropy, penalty, and the part of the batch that is abnormal."""
    check_choice("ce_term", ce_term, ("detached", "differentiable"))
    found = abnormal_examples(start_logits, adv_logits, target)
    drop = found.ce_drop.detach() if ce_term == "detached" else found.ce_drop
    variation = (found.abnormal_variation - found.normal_variation.detach()).clamp(min=0)
    part = found.mask.to(drop).mean()
    penalty = weights[0] * part * (weights[1] * drop + weights[2] * variation)
    # of an empty batch of abnormal samples nothing is left already; without normal ones there is no comparison
    penalty = torch.where(found.mask.all(), torch.zeros_like(penalty), penalty)
    adversarial = cross_entropy(adv_logits, target)
    return adversarial + penalty, adversarial, penalty, part


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    # no indexing: the host would wait for the device
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum().clamp(min=1)


class AAER(AttackedObjective):
    r"""Keeps single-step adversarial training from collapsing by regularising abnormal adversarial examples.

    A sample is abnormal when the attack's step *lowers* its loss. Few are, until catastrophic overfitting sets in;
    their number, and how far the step moves their logits, is what is penalised. See :func:`aaer_loss` for the formula.
    The logits where the step begins come from the attack's own forward.

    Cost: that of single-step training: 1 forward and input-backward for the attack, 1 forward and backward.

    Args:
        attack: finds the attacked images, in one run over the whole batch; when ``None`` that of RS-AAER,
            ``FGSM(eps=8/255, step_size=10/255, random_start=True, mode="train")``. N-AAER is
            ``FGSM(eps=8/255, random_start=True, start_scale=2, projection="box", mode="train")`` with
            ``ce_weight=1.5, variation_weight=0.15``.
        weight: :math:`\lambda_1`, of the whole penalty.
        ce_weight: :math:`\lambda_2`, of the fall of the cross entropy.
        variation_weight: :math:`\lambda_3`, of the movement of the logits beyond that of normal samples. The defaults
            are those of RS-AAER on CIFAR-10 at 8/255; they differ by data, budget and attack.
        ce_term: ``"detached"``, as in the authors' code, where the fall of the cross entropy has no gradient, or
            ``"differentiable"``.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative weight, an unknown ``ce_term``, or an attack with several restarts or ``early_stop``.

    References:
        Lin et al., Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization, arXiv
        2404.08154. With several processes sets and means are those of each process' batch.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = AAER()
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['abnormal', 'adversarial', 'penalty']
    """

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        weight: float = 1.0,
        ce_weight: float = 2.5,
        variation_weight: float = 1.5,
        ce_term: CETerm = "detached",
    ) -> None:
        super().__init__(
            FGSM(eps=8 / 255, step_size=10 / 255, random_start=True, mode="train") if attack is None else attack
        )
        check_one_run("AAER", self.attack)
        check_non_negative("weight", weight)
        check_non_negative("ce_weight", ce_weight)
        check_non_negative("variation_weight", variation_weight)
        check_choice("ce_term", ce_term, ("detached", "differentiable"))
        self.weight = weight
        self.ce_weight = ce_weight
        self.variation_weight = variation_weight
        self.ce_term: CETerm = ce_term

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        check_one_run("AAER", self.current_attack)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        ascent = Ascent(model)
        x_adv = self.current_attack(ascent, x, y, generator=generator)
        return Prepared(x, y, x_adv, {"start_logits": ascent.logits()[0]})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        adv = model(prepared.x_adv)
        weights = (self.weight, self.ce_weight, self.variation_weight)
        start = prepared.extra["start_logits"]
        loss, adversarial, penalty, part = _parts(start, adv, prepared.y, weights, self.ce_term)
        logs = {"adversarial": adversarial.detach(), "penalty": penalty.detach(), "abnormal": part}
        return ObjectiveOutput(loss, adv, logs)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, weight={self.weight}, ce_weight={self.ce_weight}, "
            f"variation_weight={self.variation_weight}, ce_term={self.ce_term!r}"
        )
