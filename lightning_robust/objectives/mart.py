# SPDX-License-Identifier: Apache-2.0
"""MART: adversarial training that asks most of the samples that are misclassified without any attack."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared
from lightning_robust.objectives.terms import divergences, label_probabilities, log_plus

__all__ = ["MART", "mart_loss"]


def mart_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    beta: float = 5.0,
    *,
    prob_eps: float = 1e-12,
    margin_eps: float = 1e-4,
    weight_eps: float = 1e-7,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Boosted cross entropy on attacked images plus ``beta`` times the weighted divergence of the attacked prediction.

    .. math:: \frac1B \sum_i \Big[ -\log q_{i,y_i} - \log\big(1 - \max_{k \ne y_i} q_{i,k}\big) \Big]
              + \beta\, \frac1B \sum_i \mathrm{KL}(p_i \,\|\, q_i)\,(1 - p_{i,y_i})

    with :math:`p` and :math:`q` the softmax of clean and attacked logits; gradients flow through everything, the weight
    included. For probabilities as targets each term is its mean over the label.

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        beta: weight of the divergence.
        prob_eps: added to :math:`q` inside the logarithm of the divergence.
        margin_eps: added, with ``prob_eps``, inside the logarithm of the margin term, which it bounds by 9.2.
        weight_eps: added to the weight :math:`1 - p_y`.

    Returns:
        The loss, its boosted cross entropy and its weighted divergence (before ``beta``).

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1, 2)
        >>> mart_loss(zeros, zeros, torch.tensor([0]), prob_eps=0.0, margin_eps=0.0)
        (tensor(1.3863), tensor(1.3863), tensor(0.))
    """
    boosted, robust = (
        losses.mean() for losses in _samples(clean_logits, adv_logits, target, prob_eps, margin_eps, weight_eps)
    )
    return boosted + beta * robust, boosted, robust


def _samples(
    clean_logits: Tensor, adv_logits: Tensor, target: Tensor, prob_eps: float, margin_eps: float, weight_eps: float
) -> tuple[Tensor, Tensor]:
    """Boosted cross entropy and weighted divergence of each sample."""
    clean, adv = full_precision(clean_logits), full_precision(adv_logits)
    labels = label_probabilities(target, adv)
    boosted = cross_entropy(adv, target, reduction="none") + _margin(adv, labels, margin_eps + prob_eps)
    wrong = ((1 - labels) * clean.softmax(1)).sum(1) + weight_eps  # 1 - p_y without cancellation
    return boosted, divergences(clean, adv, prob_eps) * wrong


def _margin(logits: Tensor, labels: Tensor, constant: float) -> Tensor:
    """``-log(1 - max_{k != y} q_k + constant)`` per sample."""
    # of equal logits the later class counts as the larger, as in the authors' code
    second, first = logits.detach().argsort(dim=1, stable=True)[:, -2:].unbind(1)
    total = logits.logsumexp(1)

    def without(index: Tensor) -> Tensor:
        # log(1 - q_k): what the other classes have, of all
        others = logits.scatter(1, index.unsqueeze(1), float("-inf")).logsumexp(1)
        return -log_plus(others - total, constant)

    # the strongest other class is the second where the label is the first
    on_top = labels.gather(1, first.unsqueeze(1)).squeeze(1)
    return (1 - on_top) * without(first) + on_top * without(second)


class MART(AttackedObjective):
    r"""Adversarial training that cares most about samples that are misclassified without any attack.

    .. math:: \mathrm{BCE}(f(x'), y) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big)\,\big(1 - f(x)_y\big), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{CE}(f(x'), y)

    The boosted cross entropy adds to the cross entropy the margin to the strongest wrong class. The attack runs once
    per batch, by default in evaluation mode. The gain of this method is partly one against PGD only: judge it by
    AutoAttack.

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 2 forwards and backwards.

    Args:
        beta: weight of the divergence; 5 in the authors' script for ResNet-18, 6 for WRN-34-10.
        attack: finds the attacked images; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=0.031, step_size=0.007, steps=10, random_start="normal")``.
        forwards: ``"separate"``: clean, then attacked; ``"joint"``: both in one batch, which matters for BatchNorm.
        prob_eps: added to the attacked probabilities inside logarithms, as the authors do; 0 for the exact divergence.
        margin_eps: added inside the logarithm of the margin term, as the authors do; it bounds the term by 9.2, where
            the exact one (0) grows with the logits.
        weight_eps: added to the weight of the divergence, as the authors do.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative number, or an unknown value of ``forwards``.

    References:
        Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020. Computed in
        float32 from the logits, where their form gives NaN in float16; of several equally strong wrong classes one is
        taken, theirs depends on the sort.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = MART(attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['boosted', 'robust']
    """

    def __init__(
        self,
        *,
        beta: float = 5.0,
        attack: Attack | None = None,
        forwards: Literal["separate", "joint"] = "separate",
        prob_eps: float = 1e-12,
        margin_eps: float = 1e-4,
        weight_eps: float = 1e-7,
    ) -> None:
        super().__init__(PGD(eps=0.031, step_size=0.007, steps=10, random_start="normal") if attack is None else attack)
        check_choice("forwards", forwards, ("separate", "joint"))
        numbers = {"beta": beta, "prob_eps": prob_eps, "margin_eps": margin_eps, "weight_eps": weight_eps}
        for name, value in numbers.items():
            check_non_negative(name, value)
        self.beta = beta
        self.forwards = forwards
        self.prob_eps, self.margin_eps, self.weight_eps = prob_eps, margin_eps, weight_eps

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        boosted, robust = _samples(clean, adv, prepared.y, self.prob_eps, self.margin_eps, self.weight_eps)
        losses = boosted + self.beta * robust
        logs = {"boosted": boosted.detach().mean(), "robust": robust.detach().mean()}
        return ObjectiveOutput(losses.mean(), clean, logs, losses)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 2

    @override
    def extra_repr(self) -> str:
        return f"beta={self.beta}, attack={self.attack!r}, forwards={self.forwards!r}"
