# SPDX-License-Identifier: Apache-2.0
"""Adversarial attacks: images within a budget at which a model errs.

``x_adv = attack(model, x, y)``; budgets are in pixel units. Stands on torch alone.
"""

from lightning_robust.attacks.adapters import from_autoattack, from_foolbox, from_torchattacks
from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.autoattack import AutoAttack
from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.beta import BETA
from lightning_robust.attacks.draws import Draws, GeneratorDraws, SampleDraws
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.foreign import ForeignAttack
from lightning_robust.attacks.margin_decomposition import MD, gradient_imbalance
from lightning_robust.attacks.mixture import AttackMixture
from lightning_robust.attacks.momentum import MIM
from lightning_robust.attacks.multi_targeted import MultiTargeted
from lightning_robust.attacks.norms import L1, L2, Linf, Norm
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.pma import PMA, PMAPlus
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.scheduled import ScheduledAttack
from lightning_robust.attacks.sequence import AttackSequence
from lightning_robust.attacks.space import InputSpace
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.threat_union import ThreatUnion

__all__ = [
    "APGD",
    "BETA",
    "FAB",
    "FGSM",
    "L1",
    "L2",
    "MD",
    "MIM",
    "PGD",
    "PMA",
    "Attack",
    "AttackMixture",
    "AttackSequence",
    "AutoAttack",
    "Draws",
    "ForeignAttack",
    "GeneratorDraws",
    "InputSpace",
    "Linf",
    "MultiTargeted",
    "Norm",
    "PMAPlus",
    "Problem",
    "SampleDraws",
    "ScheduledAttack",
    "Square",
    "ThreatUnion",
    "from_autoattack",
    "from_foolbox",
    "from_torchattacks",
    "gradient_imbalance",
]
