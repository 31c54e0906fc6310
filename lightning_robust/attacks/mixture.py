# SPDX-License-Identifier: Apache-2.0
"""Training against several attacks at once."""

from random import Random
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack, AttackLoss
from lightning_robust.attacks.climb import choose
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.sequence import Ensemble, check_members, flat_stages
from lightning_robust.checks import check_choice

__all__ = ["AttackMixture", "Strategy"]

Strategy = Literal["random", "max"]


class AttackMixture(Ensemble):
    r"""One of several attacks per batch, or the worst of all of them per sample: training against several norms.

    .. math:: \text{random: } x'_B = A_k(x_B), \; k \sim U\{1..n\}, \qquad
              \text{max: } x'_i = A_{k_i}(x_i), \; k_i = \arg\max_k \ell\big(f(A_k(x_i)), y_i\big)

    The third strategy of the literature, the average loss over all attacks, is not the choice of an attack: average the
    losses in an objective. Evaluate with :class:`~lightning_robust.attacks.ThreatUnion`, whatever was trained.

    Cost: ``"random"``: that of one attack; ``"max"``: that of all, and one forward for each.

    Args:
        attacks: the attacks by name; all with the same mode and image space.
        strategy: ``"random"``: one attack, drawn anew for each batch (and each process); ``"max"``: per sample the
            point of highest loss.
        loss: what ``"max"`` compares; the attacks keep their own losses.

    Shape:
        ``x`` is ``[B, ...]``, ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: no attack, or attacks that differ in mode or image space.

    References:
        Tramer and Boneh, Adversarial Training and Robustness for Multiple Perturbations, arXiv 1904.13000; Madaan et
        al., Learning to Generate Noise for Multi-Attack Robustness, arXiv 2006.12135 (one norm per batch).

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> norms = {"linf": PGD(eps=8 / 255), "l2": PGD(eps=0.5, norm="l2")}
        >>> AttackMixture(attacks=norms).passes, AttackMixture(attacks=norms, strategy="max").passes
        (10.0, 21.0)
    """

    def __init__(self, *, attacks: dict[str, Attack], strategy: Strategy = "random", loss: AttackLoss = "ce") -> None:
        first = check_members(attacks)
        check_choice("strategy", strategy, ("random", "max"))
        super().__init__(
            eps=max(each.eps for each in attacks.values()),
            loss=loss,
            targeted=first.targeted,
            mode=first.mode,
            mean=first.mean,
            std=first.std,
            bounds=first.bounds,
            seed=first.seed,
        )
        self.attacks, self.strategy = dict(attacks), strategy

    @override
    def stages(self, num_classes: int) -> dict[str, Attack]:
        return flat_stages(self.attacks, num_classes)

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        if self.strategy == "random":
            attack = self._drawn(problem)
            return attack.solve(attack.adopt(problem), start)
        best, x_adv = None, problem.x
        for attack in self.attacks.values():
            found = attack.solve(attack.adopt(problem), start)
            value, _ = problem.judge(found)
            if best is None:
                best, x_adv = value, found
            else:
                better = value > best
                x_adv = choose(better, found, x_adv)
                best = torch.where(better, value, best)
        return x_adv

    @override
    def at(self, epoch: int, max_epochs: int) -> Attack:
        return self.replaced(attacks={name: each.at(epoch, max_epochs) for name, each in self.attacks.items()})

    @property
    @override
    def run_passes(self) -> float:
        costs = [each.passes for each in self.attacks.values()]
        return sum(costs) / len(costs) if self.strategy == "random" else sum(costs) + 0.5 * len(costs)

    def _drawn(self, problem: Problem) -> Attack:
        # the state of the generator is known to the host, where a number drawn on the device would have to be awaited
        chosen = Random(problem.draws.fingerprint()).choice(list(self.attacks.values()))
        problem.draws.uniform(problem.x.flatten(1)[:, :1])  # moves on even if the attack draws nothing
        return chosen
