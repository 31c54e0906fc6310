# SPDX-License-Identifier: Apache-2.0
"""Which attacks an evaluation runs one after the other, and on which samples."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_robust.attacks import Attack
from lightning_robust.attacks.norms import NORMS
from lightning_robust.checks import check_choice
from lightning_robust.evaluation.contract import InputContract
from lightning_robust.evaluation.verdict import Budget

__all__ = [
    "Attacks",
    "Mode",
    "Stage",
    "StageInfo",
    "check_attacks",
    "described",
    "make_chains",
    "named_attacks",
    "reseeded",
]

#: One attack, or several by name.
Attacks = Attack | Mapping[str, Attack]

Mode = Literal["exact", "union"]


@dataclass(frozen=True)
class StageInfo:
    """What a report says about a stage; plain values that travel between processes.

    Args:
        attack: Name of the attack that the stage belongs to.
        name: Name of the stage within it.
        description: The stage's attack with its arguments.
        whole: The whole attack with its arguments.
        norm: Name of the norm.
        eps: Radius of the budget.
        chain: Number of the chain.
        position: Number of the stage in the chain.
        deviations: What the attack itself says it does otherwise than its name promises.
    """

    attack: str
    name: str
    description: str
    whole: str
    norm: str
    eps: float
    chain: int
    position: int
    deviations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """One attack of a chain, on the samples that those before it in the chain left robust.

    Args:
        info: What it is.
        attack: The attack.
        budget: What it is allowed.
    """

    info: StageInfo
    attack: Attack
    budget: Budget


def named_attacks(attacks: Attacks) -> dict[str, Attack]:
    """Attacks by name; one alone is named after its class.

    Args:
        attacks: One or several.

    Raises:
        ValueError: There is none.
        TypeError: Something is no attack.
    """
    if not attacks:
        raise ValueError("Expected at least one attack but got none.")
    named = {type(attacks).__name__: attacks} if isinstance(attacks, Attack) else dict(attacks)
    for name, attack in named.items():
        if not isinstance(attack, Attack):
            raise TypeError(
                f"Expected an Attack for {name!r} but got {type(attack).__name__}; see lightning_robust.attacks."
            )
    return named


def check_attacks(attacks: Mapping[str, Attack], mode: Mode) -> None:
    """Refuse what no evaluation can use, before anything runs.

    Args:
        attacks: Attacks by name.
        mode: ``"exact"`` or ``"union"``.

    Raises:
        ValueError: A targeted attack, one that changes the mode of the model, or attacks on different images.
    """
    check_choice("mode", mode, ("exact", "union"))
    InputContract.of(attacks.values())
    for name, attack in attacks.items():
        _refuse(name, attack)


def reseeded(attack: Attack, seed: int) -> Attack:
    """The same attack with another seed; an ensemble without one of its own with members that have it.

    Args:
        attack: The attack.
        seed: The seed.

    Raises:
        ValueError: The attack takes no seed.
    """
    names = inspect.signature(type(attack)).parameters
    if "seed" in names:
        return attack.replaced(seed=seed)
    changed: dict[str, Any] = {}
    for name in names:
        value = getattr(attack, name)
        if isinstance(value, Attack):
            changed[name] = reseeded(value, seed)
        elif isinstance(value, Mapping) and value and all(isinstance(each, Attack) for each in value.values()):
            changed[name] = {key: reseeded(each, seed) for key, each in value.items()}
    if not changed:
        raise ValueError(f"{attack!r} takes no seed; leave `seed` out.")
    return attack.replaced(**changed)


def make_chains(attacks: Mapping[str, Attack], mode: Mode, num_classes: int) -> list[list[Stage]]:
    """The stages of each chain: one chain per attack, or a single one through all of them.

    Args:
        attacks: Attacks by name.
        mode: ``"exact"``: every attack sees every correct sample; ``"union"``: only those that withstood the ones
            before it.
        num_classes: Number of classes of the model.
    """
    contract = InputContract.of(attacks.values())
    chains: list[list[Stage]] = [] if mode == "exact" else [[]]
    for name, attack in attacks.items():
        if mode == "exact":
            chains.append([])
        deviations = _deviations(attack, num_classes)
        for stage_name, member in attack.stages(num_classes).items():
            _refuse(f"{name}/{stage_name}", member)
            norm, eps = _budget(f"{name}/{stage_name}", member, attack)
            info = StageInfo(
                attack=name,
                name=stage_name,
                description=repr(member),
                whole=repr(attack),
                norm=norm,
                eps=eps,
                chain=len(chains) - 1,
                position=len(chains[-1]),
                deviations=deviations,
            )
            chains[-1].append(Stage(info, member, Budget(norm, eps, contract)))
    return chains


def described(chains: Sequence[Sequence[Stage]]) -> str:
    """All stages in one line, as a fingerprint names them.

    Args:
        chains: What `make_chains` returned.
    """
    stages = (stage.info for chain in chains for stage in chain)
    return " > ".join(f"{each.attack}/{each.name}: {each.description}" for each in stages)


def _refuse(name: str, attack: Attack) -> None:
    if attack.targeted:
        raise ValueError(
            f"The attack {name!r} is targeted, and a sample counts as robust or not whatever it is taken for; use "
            "targeted=False (losses that steer to classes are chosen by the attack)."
        )
    if attack.mode != "eval":
        raise ValueError(
            f"The attack {name!r} has mode={attack.mode!r}, which attacks another function than the evaluated one and "
            "may move BatchNorm statistics; use mode='eval'."
        )


def _budget(name: str, stage: Attack, whole: Attack) -> tuple[str, float]:
    norm: Any = getattr(stage, "norm", None) or getattr(whole, "norm", None)
    if not isinstance(norm, str) or norm not in NORMS:
        raise ValueError(
            f"The attack {name!r} does not say in which norm its budget is, so its points cannot be verified; give it "
            f"an attribute `norm`, one of {', '.join(map(repr, NORMS))}."
        )
    return norm, float(stage.eps)


def _deviations(attack: Attack, num_classes: int) -> list[str]:
    says: Any = getattr(attack, "deviations", None)
    found: Sequence[str] = says(num_classes) if callable(says) else ()
    return list(found)
