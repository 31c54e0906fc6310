"""One small instance of every attack, and of its settings that work differently, for the rules that hold for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks import (
    APGD,
    BETA,
    FAB,
    FGSM,
    MD,
    MIM,
    PGD,
    PMA,
    Attack,
    AttackMixture,
    AttackSequence,
    AutoAttack,
    ForeignAttack,
    MultiTargeted,
    PMAPlus,
    ScheduledAttack,
    Square,
    ThreatUnion,
)
from lightning_robust.schedules import Linear

BUDGETS = {"linf": 0.05, "l2": 0.5, "l1": 3.0}
ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}


@dataclass(frozen=True)
class Case:
    """An attack that can be made with other arguments.

    ``build(budgets, **arguments)`` makes it; ``norms`` are those of which every sample uses one.
    """

    build: Callable[..., Attack]
    norms: tuple[str, ...]
    steps: int | None = 3  # None: it has no such argument
    least_steps: int = 0  # fewer are refused
    per_sample: bool = True  # a stream of random numbers per sample: the result does not depend on the batch
    keeps_wrong: bool = True  # images that are misclassified already stay as they are
    keeps_what_fools: bool = False  # looks whether its points fool, and at no points outside the budget
    draws: bool = True  # random numbers change the result
    targeted: bool = False
    towards: bool = False
    gradients: bool = True
    modes: bool = False  # has the argument `mode`
    soft: bool | None = True  # takes probabilities as targets; None: as far as all its members do

    def __call__(self, *, eps: dict[str, float] | None = None, **arguments: Any) -> Attack:
        budgets = BUDGETS if eps is None else eps
        if self.steps is not None:
            arguments.setdefault("steps", self.steps)
        return self.build({norm: budgets[norm] for norm in self.norms}, **arguments)

    def excess(self, x: Tensor, x_adv: Tensor, std: Tensor | float = 1.0, eps: dict[str, float] | None = None) -> float:
        """How much the longest perturbation is longer than its budget, as a fraction of it; negative if shorter."""
        delta = ((x_adv.double() - x.double()) * std).flatten(1)
        budgets = BUDGETS if eps is None else eps
        shares = [torch.linalg.vector_norm(delta, ORDERS[norm], dim=1) / budgets[norm] for norm in self.norms]
        return float(torch.stack(shares).amin(0).max()) - 1


def one_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack as other people write it, of radius 0.05."""
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    return (x + 0.05 * x.grad.sign()).clamp(0, 1).detach()


def _single(kind: type[Attack], fixed: dict[str, Any], norm: str, **properties: Any) -> Case:
    def build(budgets: dict[str, float], **arguments: Any) -> Attack:
        return kind(**{"eps": budgets[norm], "norm": norm, **fixed, **arguments})  # type: ignore[arg-type]

    return Case(build, (norm,), **properties)


def _multi_targeted(inner: type[APGD | FAB], norm: str, **fixed: Any) -> Case:
    def build(budgets: dict[str, float], **arguments: Any) -> Attack:
        return MultiTargeted(inner(**{"eps": budgets[norm], "norm": norm, **fixed, **arguments}), targets=3)

    return Case(build, (norm,), draws=inner is not FAB, keeps_what_fools=inner is APGD)


def _auto(version: str, norm: str) -> Case:
    def build(budgets: dict[str, float], **arguments: Any) -> Attack:
        return AutoAttack(version=version, norm=norm, eps=budgets[norm], queries=4, **arguments)  # type: ignore[arg-type]

    return Case(build, (norm,), steps=2 if version == "standard" else 1, least_steps=1, soft=None)


def _sequence(budgets: dict[str, float], **arguments: Any) -> Attack:
    (eps,) = budgets.values()
    return AttackSequence(attacks={"ce": PGD(eps=eps, **arguments), "dlr": APGD(eps=eps, loss="margin", **arguments)})


def _union(budgets: dict[str, float], **arguments: Any) -> Attack:
    return ThreatUnion(attack=APGD(**arguments), budgets=budgets)


def _mixture(strategy: str) -> Callable[..., Attack]:
    def build(budgets: dict[str, float], **arguments: Any) -> Attack:
        attacks: dict[str, Attack] = {norm: PGD(norm=norm, eps=eps, **arguments) for norm, eps in budgets.items()}  # type: ignore[arg-type]
        return AttackMixture(attacks=attacks, strategy=strategy)  # type: ignore[arg-type]

    return build


def _scheduled(budgets: dict[str, float], **arguments: Any) -> Attack:
    return ScheduledAttack(PGD(eps=budgets["linf"], **arguments), eps=Linear(start=0.0, end=budgets["linf"], epochs=5))


_MOVES = {"keeps_wrong": False, "targeted": True, "towards": True, "modes": True}
_SEARCHES = {"targeted": True, "towards": True, "keeps_what_fools": True}
_FIXED = {"draws": False}
_HARD = {"soft": False}
_ALL = tuple(BUDGETS)
_SINGLE: list[tuple[str, tuple[str, ...], type[Attack], dict[str, Any], dict[str, Any]]] = [
    ("FGSM", _ALL, FGSM, {}, {**_MOVES, **_FIXED, "steps": None}),
    ("FGSM-random", ("linf",), FGSM, {"random_start": True, "step_size": 0.0625}, {**_MOVES, "steps": None}),
    ("PGD", _ALL, PGD, {}, _MOVES),
    ("PGD-radial", ("l2",), PGD, {"random_start": "radial", "projection": "box-ball"}, _MOVES),
    ("PGD-normal", ("linf",), PGD, {"random_start": "normal"}, {**_MOVES, **_FIXED}),
    ("PGD-restarts", ("l1",), PGD, {"restarts": 2, "early_stop": True}, {**_SEARCHES, "keeps_wrong": False}),
    ("PGD-kl", ("l2",), PGD, {"loss": "kl"}, {"keeps_wrong": False, "modes": True}),
    ("MIM", _ALL, MIM, {}, {**_MOVES, **_FIXED}),
    ("APGD", _ALL, APGD, {}, {**_SEARCHES, "keeps_wrong": False}),
    ("APGD-eot", ("linf",), APGD, {"restarts": 2, "eot": 2}, {**_SEARCHES, "keeps_wrong": False}),
    ("APGD-margin", ("l2",), APGD, {"loss": "margin"}, {**_SEARCHES, **_HARD, "keeps_wrong": False}),
    ("APGD-train", ("l1",), APGD, {"early_stop": False, "best_loss": True}, _MOVES),
    (
        "APGD-largereps",
        ("l1",),
        APGD,
        {"largereps": True},
        {**_SEARCHES, "keeps_wrong": False, "keeps_what_fools": False},
    ),
    ("FAB", _ALL, FAB, {}, {**_FIXED, "towards": True}),
    ("FAB-restarts", ("l2",), FAB, {"restarts": 2}, {**_FIXED, "towards": True}),
    ("Square", _ALL, Square, {"queries": 12}, {**_SEARCHES, **_HARD, "steps": None, "gradients": False}),
    ("MD", _ALL, MD, {}, {**_SEARCHES, **_HARD}),
    ("PMA", _ALL, PMA, {}, {**_SEARCHES, **_HARD}),
    ("PMAPlus", ("linf", "l1"), PMAPlus, {"targets": 2}, {**_HARD, "keeps_what_fools": True}),
    ("BETA", _ALL, BETA, {}, {"keeps_wrong": False, "modes": True}),
    ("BETA-rmsprop", ("l2",), BETA, {"optimizer": "rmsprop"}, {"keeps_wrong": False, "modes": True}),
]

#: Every attack by name.
EVERY: dict[str, Case] = {
    **{
        f"{name}-{norm}": _single(kind, fixed, norm, **more)
        for name, norms, kind, fixed, more in _SINGLE
        for norm in norms
    },
    **{f"APGD-T-{norm}": _multi_targeted(APGD, norm, loss="dlr") for norm in BUDGETS},
    **{f"FAB-T-{norm}": _multi_targeted(FAB, norm) for norm in BUDGETS},
    **{f"AutoAttack-standard-{norm}": _auto("standard", norm) for norm in BUDGETS},
    **{f"AutoAttack-{version}": _auto(version, "linf") for version in ("plus", "rand", "fast")},
    "AttackSequence": Case(_sequence, ("linf",)),
    "ThreatUnion": Case(_union, tuple(BUDGETS), keeps_what_fools=True),
    "AttackMixture-random": Case(_mixture("random"), tuple(BUDGETS), per_sample=False, keeps_wrong=False),
    "AttackMixture-max": Case(_mixture("max"), tuple(BUDGETS), keeps_wrong=False),
    "ScheduledAttack": Case(_scheduled, ("linf",), keeps_wrong=False),
    "ForeignAttack": Case(
        lambda budgets, **arguments: ForeignAttack(one_step, eps=budgets["linf"], **arguments),
        ("linf",),
        steps=None,
        per_sample=False,
        keeps_wrong=False,
        draws=False,
        gradients=False,
    ),
}
