# SPDX-License-Identifier: Apache-2.0
"""SCORE: adversarial training that measures predictions by a distance instead of a divergence."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.base import AttackLoss
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range, check_non_negative
from lightning_robust.losses.probability_distance import DISTANCES, Distance
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared
from lightning_robust.objectives.score_loss import ClipOn, score_bound, score_loss, score_pgd_loss

__all__ = ["SCORE"]

Form = Literal["trades", "pgd"]


class SCORE(AttackedObjective):
    r"""Self-consistent robust error: TRADES, or PGD training, with a distance between predictions in place of KL.

    .. math:: D\big(f(x), y\big) + \beta\, \max\Big(D\big(f(x'), f(x)\big) - b,\, 0\Big), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} D\big(f(x'), f(x)\big)

    with the squared distance of probabilities :math:`D(q, p) = \sum_k (q_k - p_k)^2` as the authors' main choice. The
    attack runs once per batch.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 2 forwards and backwards; with
    ``form="pgd"`` 10 and 10, then 1.

    Args:
        beta: weight of the distance between predictions; 3 or 4 in the paper.
        distance: ``"lse"`` (the paper's), ``"l1"``, ``"l1-squared"``, ``"l2"``, ``"js"``, ``"js-sqrt"``, ``"kl"`` or
            ``"kl-sqrt"``; see :func:`~lightning_robust.losses.probability_distance`.
        form: ``"trades"``, or ``"pgd"``: only the distance of the attacked prediction from the label.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, random_start="uniform")``, on the same distance (or one with the
            same direction), with ``mode="train-frozen-stats"``, and ``mode="train"`` for PGD.
        clip: losses below those of a prediction that leaves this much to the wrong classes count as nothing; 0.3 in the
            authors' runs without generated data, 0.4 with PGD.
        bound: the bound itself, in place of ``clip``.
        clip_on: ``"penalty"``: the bound applies to the distance between predictions; ``"whole"``: to the whole loss.
        label_smoothing: mass that the label gives to the other classes, in equal parts.
        forwards: ``"separate"``: clean, then attacked; ``"joint"``: both in one batch, which matters for BatchNorm.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a number out of range, ``clip`` and ``bound`` together, or an unknown value of ``distance``,
            ``form``, ``clip_on`` or ``forwards``.

    References:
        Pang et al., Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, arXiv 2202.10103. Roots have
        gradient 0 at 0, where their code gives NaN. The reverse divergence is not offered: it is infinite for hard
        labels.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = SCORE(attack=PGD(eps=0.1, steps=2, loss="lse"))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['natural', 'robust']
    """

    def __init__(
        self,
        *,
        beta: float = 3.0,
        distance: Distance = "lse",
        form: Form = "trades",
        attack: Attack | None = None,
        clip: float = 0.0,
        bound: float | None = None,
        clip_on: ClipOn = "penalty",
        label_smoothing: float = 0.0,
        forwards: Literal["separate", "joint"] = "separate",
    ) -> None:
        check_choice("distance", distance, DISTANCES)
        check_choice("form", form, ("trades", "pgd"))
        super().__init__(_default_attack(distance, form) if attack is None else attack)
        check_choice("clip_on", clip_on, ("penalty", "whole"))
        check_choice("forwards", forwards, ("separate", "joint"))
        check_non_negative("beta", beta)
        check_in_range("clip", clip, 0.0, 1.0)
        check_in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        if bound is not None:
            check_non_negative("bound", bound)
            if clip > 0:
                raise ValueError("`clip` and `bound` are two ways to say the same; give one of them.")
        self.beta = beta
        self.distance: Distance = distance
        self.form = form
        self.clip, self.bound = clip, bound
        self.clip_on: ClipOn = clip_on
        self.label_smoothing = label_smoothing
        self.forwards = forwards

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        if self.form == "pgd":
            return self._pgd(model, prepared)
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        losses, natural, robust = score_loss(
            clean,
            adv,
            prepared.y,
            self.beta,
            distance=self.distance,
            bound=self._bound(clean),
            clip_on=self.clip_on,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        logs = {"natural": natural.detach().mean(), "robust": robust.detach().mean()}
        return ObjectiveOutput(losses.mean(), clean, logs, losses)

    def _pgd(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        logits = model(prepared.x_adv)
        losses = score_pgd_loss(
            logits,
            prepared.y,
            distance=self.distance,
            bound=self._bound(logits),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return ObjectiveOutput(losses.mean(), logits, {}, losses)

    def _bound(self, logits: Tensor) -> float:
        return score_bound(self.distance, self.clip, logits.shape[1]) if self.bound is None else self.bound

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * (1 if self.form == "pgd" else 2)

    @override
    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, distance={self.distance!r}, form={self.form!r}, attack={self.attack!r}, "
            f"clip={self.clip}, bound={self.bound}, clip_on={self.clip_on!r}"
        )


#: What to climb so that the steepest direction is that of the distance: roots and squares have the same one, and for a
#: hard label all but "lse" depend on the probability of the label alone.
_BETWEEN: dict[str, AttackLoss] = {"lse": "lse", "l2": "lse", "l1": "l1", "js": "js", "kl": "kl"}
_TO_LABEL: dict[str, AttackLoss] = {"lse": "brier", "l2": "brier"}


def _default_attack(distance: Distance, form: Form) -> Attack:
    kind = distance.partition("-")[0]
    if form == "pgd":
        return PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss=_TO_LABEL.get(kind, "ce"), mode="train")
    return PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss=_BETWEEN[kind], mode="train-frozen-stats")
