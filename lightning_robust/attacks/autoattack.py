# SPDX-License-Identifier: Apache-2.0
"""The standard ensemble for evaluating robustness."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.base import Attack, AttackLoss
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.multi_targeted import MultiTargeted
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.sequence import Ensemble, solve_in_order
from lightning_robust.attacks.square import Square
from lightning_robust.checks import check_choice, check_integer

__all__ = ["AutoAttack", "AutoAttackVersion"]

AutoAttackVersion = Literal["standard", "plus", "rand", "fast"]

_ORDER: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
}


class AutoAttack(Ensemble):
    r"""AutoAttack: APGD on the cross entropy, targeted APGD, targeted FAB and Square, each on what the others left.

    ========  ==========================================================================================
    version   in this order
    ========  ==========================================================================================
    standard  APGD-CE; APGD-T, 9 targets; FAB-T, 9 targets; Square. In l1 APGD-CE has 5 restarts, APGD-T 5 targets, and
              both start with larger budgets.
    plus      APGD-CE and APGD-DLR with 5 restarts each; FAB, 5 restarts; Square; APGD-T; FAB-T.
    rand      APGD-CE and APGD-DLR on gradients averaged over 20 passes: for models that are random.
    fast      the first two of standard: nearly its result in a fraction of its time, but never to be called AutoAttack.
    ========  ==========================================================================================

    Works for any number of classes from 2 on. There are at most ``K - 1`` targets; where the loss of APGD needs more
    classes than there are (DLR 3, targeted DLR 4) it is the logit margin. :meth:`deviations` says what differs from the
    published setting, and belongs in every report.

    Cost: of a sample that withstands the standard version with 10 classes about 1,900 forwards and input-backwards and
    6,000 forwards; "fast" about 1,000 of the former. "plus" runs untargeted FAB, ``K - 1`` input-backwards per step.

    Args:
        version: which attacks.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: radius of the budget in pixel units.
        steps: steps of APGD and FAB; 100 is the published number.
        queries: queries of Square; 5000 is the published number.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the first attack; each of the others has the next one.

    Shape:
        ``x`` is ``[B, C, H, W]``, ``y`` is ``[B]``.

    Raises:
        ValueError: an argument out of range.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks, arXiv 2003.01690; l1: Croce and Hein, Mind the Box, arXiv 2103.01208. Their code stops for fewer than
        10 classes, draws one stream of random numbers per batch, and returns the clean image where all attacks failed.

    Example:
        >>> attack = AutoAttack(norm="l2", eps=0.5)
        >>> list(attack.stages(num_classes=10))
        ['apgd-ce', 'apgd-t', 'fab-t', 'square']
        >>> attack.deviations(num_classes=10)
        []
        >>> attack.deviations(num_classes=5)
        ['apgd-t and fab-t: 4 targets in place of 9, all there are with 5 classes.']
    """

    chooses_targets: ClassVar[bool] = True

    def __init__(
        self,
        *,
        version: AutoAttackVersion = "standard",
        norm: Literal["linf", "l2", "l1"] = "linf",
        eps: float = 8 / 255,
        steps: int = 100,
        queries: int = 5000,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        check_choice("version", version, tuple(_ORDER))
        check_choice("norm", norm, ("linf", "l2", "l1"))
        check_integer("steps", steps, 1)
        check_integer("queries", queries, 1)
        super().__init__(eps=eps, mean=mean, std=std, bounds=bounds, seed=seed)
        self.version, self.norm, self.steps, self.queries = version, norm, steps, queries

    @override
    def stages(self, num_classes: int) -> dict[str, Attack]:
        check_integer("num_classes", num_classes, 2)
        return {
            name: self._member(name, num_classes, self.seed + number)
            for number, name in enumerate(_ORDER[self.version])
        }

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            # one image is enough to see how many classes there are
            num_classes = problem.logits(problem.x[:1]).shape[1]
        torch.clear_autocast_cache()  # what it holds now has no graph
        return solve_in_order(self.stages(num_classes).values(), problem, start)

    @property
    @override
    def run_passes(self) -> float:
        # of a sample that withstands all; the clean prediction and the check after each attack are lone forwards
        return sum(each.passes + 0.5 for each in self.stages(10).values()) + 0.5

    def deviations(self, num_classes: int) -> list[str]:
        """How this differs from the published setting, one sentence each.

        Args:
            num_classes: number of classes of the attacked model.
        """
        check_integer("num_classes", num_classes, 2)
        names = _ORDER[self.version]
        found = []
        if self.version == "fast":
            found.append("Only APGD-CE and APGD-T run; the standard version goes on with FAB-T and Square.")
        for argument, published, kinds in (("steps", 100, "af"), ("queries", 5000, "s")):
            value = getattr(self, argument)
            if value != published and any(name[0] in kinds for name in names):
                found.append(f"{argument} {value} in place of {published}.")
        return found + self._fewer_targets(num_classes) + self._other_losses(num_classes)

    def _fewer_targets(self, num_classes: int) -> list[str]:
        short: dict[int, list[str]] = {}
        for name in _ORDER[self.version]:
            if name.endswith("-t") and self._targets(name) > num_classes - 1:
                short.setdefault(self._targets(name), []).append(name)
        return [
            f"{' and '.join(sorted(names))}: {_targets_of(num_classes)} in place of {targets}, all there are with "
            f"{num_classes} classes."
            for targets, names in short.items()
        ]

    def _other_losses(self, num_classes: int) -> list[str]:
        needs = {"apgd-dlr": 3, "apgd-t": 4}
        return [
            f"{name}: the logit margin in place of the DLR loss, which needs {needs[name]} classes."
            for name in _ORDER[self.version]
            if num_classes < needs.get(name, 0)
        ]

    def _targets(self, name: str) -> int:
        return 5 if name == "apgd-t" and self._larger_first() else 9

    def _larger_first(self) -> bool:
        """Whether APGD starts with larger budgets."""
        return self.norm == "l1" and self.version in ("standard", "fast")

    def _member(self, name: str, num_classes: int, seed: int) -> Attack:
        common: dict[str, Any] = {
            "eps": self.eps,
            "norm": self.norm,
            "mean": self.mean,
            "std": self.std,
            "bounds": self.bounds,
            "seed": seed,
        }
        targets = min(self._targets(name), num_classes - 1)
        if name == "square":
            return Square(queries=self.queries, **common)
        if name == "fab":
            return FAB(steps=self.steps, restarts=5, **common)
        if name == "fab-t":
            return MultiTargeted(FAB(steps=self.steps, **common), targets=targets)
        common["largereps"] = self._larger_first()
        if name == "apgd-t":
            steered: AttackLoss = "dlr" if num_classes >= 4 else "margin"
            return MultiTargeted(APGD(loss=steered, steps=self.steps, **common), targets=targets)
        dlr: AttackLoss = "dlr" if num_classes >= 3 else "margin"
        return APGD(
            loss="ce" if name == "apgd-ce" else dlr,
            steps=self.steps,
            restarts=5 if self.version == "plus" or self._larger_first() else 1,
            eot=20 if self.version == "rand" else 1,
            **common,
        )


def _targets_of(num_classes: int) -> str:
    return "1 target" if num_classes == 2 else f"{num_classes - 1} targets"
