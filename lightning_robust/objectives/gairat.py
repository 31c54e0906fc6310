# SPDX-License-Identifier: Apache-2.0
"""GAIRAT: adversarial training weighted by how long each sample withstands the attack."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.losses import labels_of
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.ascent import Ascent, check_one_run
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared

__all__ = ["GAIRAT", "gairat_weights"]

Assignment = Literal["tanh", "sigmoid", "discrete"]


def gairat_weights(kappa: Tensor, steps: int, *, shift: float = -1.0, assignment: Assignment = "tanh") -> Tensor:
    r"""Weights of the samples of a batch, larger the sooner a sample falls, with mean 1.

    .. math:: \omega_i \propto \tfrac12 \big(1 + \tanh(\Lambda + 5\,(1 - \kappa_i / h))\big), \qquad
              h = \lfloor K / 2 \rfloor

    Args:
        kappa: of how many of the ``steps`` iterates the model is right, ``[B]``.
        steps: number ``K`` of iterates.
        shift: the constant :math:`\Lambda`; smaller ones make the weights differ more.
        assignment: ``"tanh"``; ``"sigmoid"``: the logistic function of the same number; ``"discrete"``:
            :math:`1 - \kappa_i / (K + 1)`, without ``shift``.

    Shape:
        Returns ``[B]``.

    Raises:
        ValueError: an unknown ``assignment``, no step, or a ``shift`` that is not finite.

    Example:
        >>> gairat_weights(torch.tensor([0, 5]), steps=10)
        tensor([1.7869, 0.2131])
    """
    check_integer("steps", steps, 1)
    _check_assignment(shift, assignment)
    kappa = kappa.to(kappa.dtype if kappa.is_floating_point() else torch.float32)
    if assignment == "discrete":
        logarithms = torch.log1p(-kappa / (steps + 1))
    else:
        half = max(steps // 2, 0.5)
        score = shift + 5 * (1 - kappa / half)
        # (1 + tanh s) / 2 is the logistic function of 2 s; the quotient of weights that underflow is still defined
        logarithms = F.logsigmoid(2 * score if assignment == "tanh" else score)
    return len(kappa) * logarithms.softmax(0)


def _check_assignment(shift: float, assignment: str) -> None:
    if not math.isfinite(shift):
        raise ValueError(f"Expected `shift` to be a finite number but got {shift!r}.")
    check_choice("assignment", assignment, ("tanh", "sigmoid", "discrete"))


class GAIRAT(AttackedObjective):
    r"""Adversarial cross entropy whose samples count more the sooner the attack breaks them.

    .. math:: \frac1B \sum_i \omega_i\, \mathrm{CE}(f(x'_i), y_i), \qquad
              \omega_i \propto \tfrac12 \big(1 + \tanh(\Lambda + 5\,(1 - 2\kappa_i / K))\big), \quad
              \sum_i \omega_i = B

    with :math:`\kappa_i` the number of the :math:`K` iterates of PGD (start included, end not) that the model still
    gets right. They are counted in the attack's own passes. Before ``start_epoch`` it is plain adversarial training.

    The robustness that it shows under PGD is not there under stronger attacks: it falls below plain adversarial
    training under AutoAttack. Train with it to compare, and judge it with
    :class:`~lightning_robust.attacks.AutoAttack`.

    Cost: with 10 attack steps 10 forwards and input-backwards for the attack, then 1 forward and backward.

    Args:
        attack: finds the attacked images, in one run over the whole batch; when ``None`` the authors'
            ``PGD(eps=0.031, step_size=0.007, steps=10)``.
        start_epoch: first epoch, counted from 0, with weights; 59 of 120 in the authors' code (29 of 100 for
            ResNet-18, with ``--begin_epoch 30``). The epochs come from the training loop (``epoch_starts``).
        shift: the constant :math:`\Lambda` of the weights.
        assignment: ``"tanh"``, ``"sigmoid"`` or ``"discrete"``; see :func:`gairat_weights`.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``; an iterate with probabilities as target is right when
        their largest is predicted.

    Raises:
        ValueError: an argument out of range, or an attack with several restarts or ``early_stop``.

    References:
        Zhang et al., Geometry-aware Instance-reweighted Adversarial Training, arXiv 2010.01736. The same numbers as
        their code for any shift that does not underflow there; with several processes the weights have mean 1 in each
        process' batch.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = GAIRAT(attack=PGD(eps=0.1, steps=4), start_epoch=0)
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> prepared.extra["kappa"].shape, round(float(prepared.extra["weights"].mean()), 3)
        (torch.Size([2]), 1.0)
    """

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        start_epoch: int = 59,
        shift: float = -1.0,
        assignment: Assignment = "tanh",
    ) -> None:
        super().__init__(PGD(eps=0.031, step_size=0.007, steps=10) if attack is None else attack)
        check_one_run("GAIRAT", self.attack)
        check_integer("start_epoch", start_epoch, 0)
        _check_assignment(shift, assignment)
        self.start_epoch = start_epoch
        self.shift = shift
        self.assignment: Assignment = assignment
        self._epoch = 0

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        check_one_run("GAIRAT", self.current_attack)
        self._epoch = epoch

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        if self._epoch < self.start_epoch:
            return super().prepare(model, x, y, generator=generator)
        ascent = Ascent(model)
        x_adv = self.current_attack(ascent, x, y, generator=generator)
        right = ascent.logits().argmax(2) == labels_of(y)
        kappa = right.sum(0).to(full_precision(x).dtype)
        weights = gairat_weights(kappa, len(right), shift=self.shift, assignment=self.assignment)
        return Prepared(x, y, x_adv, {"kappa": kappa, "weights": weights})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        adv = model(prepared.x_adv)
        samples = cross_entropy(adv, prepared.y, reduction="none")
        logs = {"adversarial": samples.detach().mean()}
        if "weights" in prepared.extra:
            samples = samples * prepared.extra["weights"].to(samples)
        return ObjectiveOutput(samples.mean(), adv, logs, samples)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, start_epoch={self.start_epoch}, shift={self.shift}, "
            f"assignment={self.assignment!r}"
        )
