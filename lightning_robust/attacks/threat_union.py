# SPDX-License-Identifier: Apache-2.0
"""The worst case over several norms."""

import inspect

from typing_extensions import override

from lightning_robust.attacks.autoattack import AutoAttack
from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.sequence import AttackSequence

__all__ = ["CIFAR_BUDGETS", "ThreatUnion"]

#: The usual budgets for CIFAR-10, the order of attacking.
CIFAR_BUDGETS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}


class ThreatUnion(AttackSequence):
    r"""One attack under several norms: a sample counts as robust only if it withstands all of them.

    .. math:: \text{robust}(x, y) = \bigwedge_{p} \; \forall x' : \|x' - x\|_p \le \epsilon_p
              \Rightarrow \arg\max f(x') = y

    As an attack it returns the worst case per sample, and the norms later in the order see only samples that withstood
    the earlier ones. ``attacks`` holds one attack per norm: call (or evaluate) them on all samples for the exact robust
    accuracy under each norm.

    Cost: that of the attack, once per norm, on the samples still right.

    Args:
        attack: the attack, whose ``norm`` and ``eps`` are replaced, and whose step size is the default one of each
            norm; ``AutoAttack()`` when ``None``.
        budgets: radius by norm, in the order of attacking; when ``None`` linf 8/255, l2 0.5, l1 12, as is usual on
            CIFAR-10.

    Raises:
        ValueError: no budget, an unknown norm, or an attack without a norm.

    References:
        Tramer and Boneh, Adversarial Training and Robustness for Multiple Perturbations, arXiv 1904.13000; Maini et
        al., Adversarial Robustness Against the Union of Multiple Perturbation Models, arXiv 1909.04068.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> union = ThreatUnion(attack=PGD(steps=20), budgets={"linf": 8 / 255, "l2": 0.5})
        >>> list(union.stages(num_classes=10))
        ['linf', 'l2']
    """

    def __init__(self, *, attack: Attack | None = None, budgets: dict[str, float] | None = None) -> None:
        attack = AutoAttack() if attack is None else attack
        budgets = dict(CIFAR_BUDGETS) if budgets is None else dict(budgets)
        if not budgets:
            raise ValueError("Expected `budgets` to name at least one norm but got none.")
        arguments = inspect.signature(type(attack)).parameters
        if "norm" not in arguments:
            raise ValueError(f"Expected `attack` to have a `norm` that can be replaced but got {attack!r}.")
        # a step size belongs to one norm
        anew = {"step_size": None} if "step_size" in arguments else {}
        super().__init__(attacks={norm: attack.replaced(norm=norm, eps=eps, **anew) for norm, eps in budgets.items()})
        self.attack, self.budgets = attack, budgets

    @override
    def at(self, epoch: int, max_epochs: int) -> Attack:
        return self.replaced(attack=self.attack.at(epoch, max_epochs))
