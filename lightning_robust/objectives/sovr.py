# SPDX-License-Identifier: Apache-2.0
"""SOVR and TSOVR: independent sigmoids instead of a softmax for the samples that matter most."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.losses import labels_of, margin
from lightning_robust.checks import check_choice, check_in_range, check_non_negative
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared
from lightning_robust.objectives.terms import divergences

__all__ = ["SOVR", "TSOVR", "important_samples", "one_vs_rest", "sovr_loss"]


def one_vs_rest(logits: Tensor, target: Tensor) -> Tensor:
    r"""One-vs-the-rest loss per sample, ``C`` independent binary questions put to the raw logits.

    .. math:: \log(1 + e^{-z_y}) + \sum_{k \ne y} \log(1 + e^{z_k})

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]``, or probabilities ``[B, C]``, each of which is then the answer to its question.

    Shape:
        Returns ``[B]``; float32, or float64 for float64 logits.

    Example:
        >>> one_vs_rest(torch.zeros(1, 3), torch.tensor([1]))
        tensor([2.0794])
    """
    logits = full_precision(logits)
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").sum(1)
    signed = logits * -torch.ones_like(logits).scatter(1, target.long().unsqueeze(1), -1.0)
    return -F.logsigmoid(signed).sum(1)  # log(1 + exp(-s)), exact for large s too


def important_samples(logits: Tensor, target: Tensor, percent: float = 40.0) -> Tensor:
    r"""Which samples of the batch have the largest :math:`\max_{k \ne y} z_k - z_y`, as a mask ``[B]``.

    :math:`\lfloor B M / 100 \rfloor` of them; of equal ones the first. Probabilities as targets count as their largest
    class.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        percent: the part ``M`` of the batch in percent.

    Raises:
        ValueError: a ``percent`` outside of [0, 100].

    Example:
        >>> important_samples(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), percent=50)
        tensor([False,  True])
    """
    check_in_range("percent", percent, 0.0, 100.0)
    margins = margin(full_precision(logits.detach()), labels_of(target))
    count = int(len(margins) * percent // 100)  # multiplied first: 29 percent of 100 are 29, not 28.999
    chosen = torch.zeros(len(margins), dtype=torch.bool, device=margins.device)
    chosen[margins.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def sovr_loss(logits: Tensor, target: Tensor, percent: float = 40.0, weight: float = 0.4) -> tuple[Tensor, Tensor]:
    r"""Cross entropy of the easy samples and ``weight`` times the one-vs-the-rest loss of the important ones.

    .. math:: \frac1B \Big( \sum_{i \notin I} \mathrm{CE}(z_i, y_i) + \lambda \sum_{i \in I} \mathrm{OVR}(z_i, y_i)
              \Big)

    with :math:`I` the ``percent`` of the batch with the largest :math:`\max_{k \ne y} z_k - z_y`; the choice has no
    gradient.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        percent: the part of the batch that is important, in percent; rounded down to whole samples.
        weight: factor :math:`\lambda` of the one-vs-the-rest loss.

    Returns:
        The loss and what each sample adds to it, ``[B]`` (the loss is their mean).

    Raises:
        ValueError: a ``percent`` outside of [0, 100].

    Example:
        >>> sovr_loss(torch.zeros(2, 2), torch.tensor([0, 1]), percent=50, weight=1.0)[1]
        tensor([1.3863, 0.6931])
    """
    chosen = important_samples(logits, target, percent)
    samples = torch.where(chosen, weight * one_vs_rest(logits, target), cross_entropy(logits, target, reduction="none"))
    return samples.mean(), samples


class SOVR(AttackedObjective):
    r"""Adversarial training that takes the one-vs-the-rest loss for the samples with the smallest margins.

    .. math:: \frac1B \Big( \sum_{i \notin I} \mathrm{CE}(z'_i, y_i) + \lambda \sum_{i \in I} \mathrm{OVR}(z'_i, y_i)
              \Big), \qquad
              \mathrm{OVR}(z, y) = \log(1 + e^{-z_y}) + \sum_{k \ne y} \log(1 + e^{z_k})

    with :math:`z'` the logits of the attacked images and :math:`I` the ``percent`` of the batch whose wrong class leads
    by most. It depends on absolute logits, so they, and temperatures fitted to them, mean something else afterwards.

    Cost: with 10 attack steps 10 forwards and input-backwards for the attack, then 1 forward and backward.

    Args:
        attack: finds the attacked images; when ``None`` ``PGD(eps=8/255, step_size=2/255, steps=10)``.
        percent: the part of the batch that is important, in percent, rounded down to whole samples; with several
            processes of each process' batch.
        weight: factor :math:`\lambda` of the one-vs-the-rest loss.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a ``percent`` outside of [0, 100] or a negative ``weight``.

    References:
        Kanai et al., One-vs-the-Rest Loss to Focus on Important Samples in Adversarial Training, arXiv 2207.10283. Its
        code is not public: the formula is the paper's, the rounding and the division by the whole batch are ours.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = SOVR(attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['adversarial']
    """

    def __init__(self, *, attack: Attack | None = None, percent: float = 40.0, weight: float = 0.4) -> None:
        super().__init__(PGD(eps=8 / 255, step_size=2 / 255, steps=10) if attack is None else attack)
        check_in_range("percent", percent, 0.0, 100.0)
        check_non_negative("weight", weight)
        self.percent = percent
        self.weight = weight

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        adv = model(prepared.x_adv)
        loss, samples = sovr_loss(adv, prepared.y, self.percent, self.weight)
        ce = cross_entropy(adv.detach(), prepared.y)
        return ObjectiveOutput(loss, adv, {"adversarial": ce}, samples)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner

    @override
    def extra_repr(self) -> str:
        return f"attack={self.attack!r}, percent={self.percent}, weight={self.weight}"


class TSOVR(AttackedObjective):
    r"""TRADES with SOVR in the place of its cross entropy.

    .. math:: \frac1B \Big( \sum_{i \notin I} \mathrm{CE}(z_i, y_i) + \lambda \sum_{i \in I} \mathrm{OVR}(z_i, y_i)
              \Big) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big)

    with :math:`z` the logits of the clean images, which also decide which samples are important.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 2 forwards and backwards.

    Args:
        attack: finds the attacked images; when ``None``
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="normal")``.
        beta: weight of the divergence.
        percent: the part of the batch that is important, in percent, rounded down to whole samples; with several
            processes of each process' batch.
        weight: factor :math:`\lambda` of the one-vs-the-rest loss.
        forwards: ``"separate"``: clean, then attacked; ``"joint"``: both in one batch, which matters for BatchNorm.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range or an unknown value of ``forwards``.

    References:
        Kanai et al., arXiv 2207.10283. Its code is not public, and how it is put together with TRADES is our reading;
        see :class:`SOVR`.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = TSOVR(attack=PGD(eps=0.1, steps=2, loss="kl"))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['natural', 'robust']
    """

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        beta: float = 6.0,
        percent: float = 40.0,
        weight: float = 0.4,
        forwards: Literal["separate", "joint"] = "separate",
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="normal")
            if attack is None
            else attack
        )
        check_non_negative("beta", beta)
        check_in_range("percent", percent, 0.0, 100.0)
        check_non_negative("weight", weight)
        check_choice("forwards", forwards, ("separate", "joint"))
        self.beta = beta
        self.percent = percent
        self.weight = weight
        self.forwards = forwards

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        natural, samples = sovr_loss(clean, prepared.y, self.percent, self.weight)
        moved = divergences(full_precision(clean), full_precision(adv))
        robust = moved.mean()
        logs = {"natural": natural.detach(), "robust": robust.detach()}
        return ObjectiveOutput(natural + self.beta * robust, clean, logs, samples + self.beta * moved)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 2

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, beta={self.beta}, percent={self.percent}, weight={self.weight}, "
            f"forwards={self.forwards!r}"
        )
