# SPDX-License-Identifier: Apache-2.0
"""ARoW: a robustness penalty that weighs most where the model is least robust."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range, check_non_negative
from lightning_robust.losses import Criterion, cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared
from lightning_robust.objectives.terms import divergences, label_probabilities

__all__ = ["ARoW", "arow_loss"]

Weighting = Literal["arow", "cow"]


def arow_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    beta: float = 7.0,
    *,
    label_smoothing: float = 0.2,
    weighting: Weighting = "arow",
    prob_eps: float = 1e-12,
    criterion: Criterion | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Smoothed cross entropy on clean images plus ``beta`` times the weighted divergence of the attacked prediction.

    .. math:: \frac1B \sum_i \mathrm{CE}_s(z_i, y_i)
              + \beta\, \frac1B \sum_i \mathrm{KL}(p_i \,\|\, q_i)\,(1 - q_{i, y_i})

    with :math:`p` and :math:`q` the softmax of clean and attacked logits; gradients flow through everything, the weight
    included. For probabilities as targets :math:`q_y` is their mean under them.

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        beta: weight of the penalty.
        label_smoothing: of the cross entropy, spread over all classes.
        weighting: ``"arow"``, or ``"cow"`` for the weight :math:`p_y`.
        prob_eps: added to :math:`q` inside the logarithm, as the authors do; 0 for the exact divergence.
        criterion: takes the place of the smoothed cross entropy.

    Returns:
        The loss, its cross-entropy part and its penalty (before ``beta``).

    Raises:
        ValueError: an unknown ``weighting``.

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1, 2)
        >>> arow_loss(zeros, zeros, torch.tensor([0]), prob_eps=0.0)
        (tensor(0.6931), tensor(0.6931), tensor(0.))
    """
    check_choice("weighting", weighting, ("arow", "cow"))
    natural = _natural(clean_logits, target, label_smoothing, criterion)
    robust = _penalties(clean_logits, adv_logits, target, weighting, prob_eps).mean()
    return natural + beta * robust, natural, robust


def _natural(clean_logits: Tensor, target: Tensor, label_smoothing: float, criterion: Criterion | None) -> Tensor:
    """The loss on clean images."""
    clean = full_precision(clean_logits)
    if criterion is None:
        return cross_entropy(clean, target, label_smoothing=label_smoothing)
    loss: Tensor = criterion(clean, target)
    return loss


def _penalties(
    clean_logits: Tensor, adv_logits: Tensor, target: Tensor, weighting: Weighting, prob_eps: float
) -> Tensor:
    """The weighted divergence of each sample."""
    clean, adv = full_precision(clean_logits), full_precision(adv_logits)
    judged = (adv if weighting == "arow" else clean).softmax(1)
    labels = label_probabilities(target, judged)
    weights = ((1 - labels if weighting == "arow" else labels) * judged).sum(1)  # 1 - q_y without cancellation
    return divergences(clean, adv, prob_eps) * weights


class ARoW(AttackedObjective):
    r"""TRADES with its penalty shifted to the samples that the attack fools.

    .. math:: \mathrm{CE}_s(f(x), y) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big)\,\big(1 - f(x')_y\big), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{KL}\big(f(x) \,\|\, f(x')\big)

    A sample that stays right under attack is left in peace. The attack runs once per batch, by default in evaluation
    mode.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 2 forwards and backwards.

    Args:
        beta: weight of the penalty, twice the paper's lambda; 7 for ResNet-18 on CIFAR-10.
        attack: finds the attacked images; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="uniform")``. The authors take
            ``loss="ce"`` for CIFAR-100.
        label_smoothing: of the cross entropy on clean images; 0 is the paper's ARoW-CE.
        weighting: ``"arow"``; ``"cow"`` weighs by the probability of the label on the clean image instead.
        forwards: ``"separate"``: clean, then attacked; ``"joint"``: both in one batch, which matters for BatchNorm.
        prob_eps: added to the attacked probabilities inside the logarithm, as the authors do; it bounds the divergence
            by 27.6. 0 for the exact divergence.
        criterion: takes the place of the smoothed cross entropy on clean images.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative ``beta`` or ``prob_eps``, a ``label_smoothing`` outside of [0, 1], or an unknown value of
            ``weighting`` or ``forwards``.

    References:
        Yang et al., Improving Adversarial Robustness by Putting More Regularizations on Less Robust Samples, arXiv
        2206.03353. Their training also averages weights from epoch 51 of 120 on (Lightning's ``WeightAveraging``), and
        their backward runs through the attack, which changes nothing.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = ARoW(attack=PGD(eps=0.1, steps=2, loss="kl"))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['natural', 'robust']
    """

    def __init__(
        self,
        *,
        beta: float = 7.0,
        attack: Attack | None = None,
        label_smoothing: float = 0.2,
        weighting: Weighting = "arow",
        forwards: Literal["separate", "joint"] = "separate",
        prob_eps: float = 1e-12,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="uniform")
            if attack is None
            else attack
        )
        check_non_negative("beta", beta)
        check_in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        check_choice("weighting", weighting, ("arow", "cow"))
        check_choice("forwards", forwards, ("separate", "joint"))
        check_non_negative("prob_eps", prob_eps)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.weighting: Weighting = weighting
        self.forwards = forwards
        self.prob_eps = prob_eps
        self.criterion = criterion

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        natural = _natural(clean, prepared.y, self.label_smoothing, self.criterion)
        penalties = _penalties(clean, adv, prepared.y, self.weighting, self.prob_eps)
        robust = penalties.mean()
        sample_losses = None
        if self.criterion is None:
            smoothed = cross_entropy(clean, prepared.y, label_smoothing=self.label_smoothing, reduction="none")
            sample_losses = smoothed + self.beta * penalties
        logs = {"natural": natural.detach(), "robust": robust.detach()}
        return ObjectiveOutput(natural + self.beta * robust, clean, logs, sample_losses)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 2

    @override
    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, attack={self.attack!r}, label_smoothing={self.label_smoothing}, "
            f"weighting={self.weighting!r}, forwards={self.forwards!r}, prob_eps={self.prob_eps}"
        )
