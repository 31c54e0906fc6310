# SPDX-License-Identifier: Apache-2.0
"""Adversarial attacks: images within a budget at which a model errs.

``x_adv = attack(model, x, y)``; budgets are in pixel units. Stands on torch alone.
"""

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.momentum import MIM
from lightning_robust.attacks.norms import L2, Linf, Norm
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.space import InputSpace

__all__ = ["FGSM", "L2", "MIM", "PGD", "Attack", "InputSpace", "Linf", "Norm", "Problem"]
