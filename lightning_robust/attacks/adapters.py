# SPDX-License-Identifier: Apache-2.0
"""Attacks of torchattacks, foolbox and the official AutoAttack as attacks of this library.

None of these libraries is needed unless its adapter is used.
"""

import copy
import importlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.foreign import AttackedModel, ForeignAttack

__all__ = ["from_autoattack", "from_foolbox", "from_torchattacks"]

_NORMS: dict[Any, Literal["linf", "l2", "l1"]] = {
    "Linf": "linf",
    "L2": "l2",
    "L1": "l1",
    "linf": "linf",
    "l2": "l2",
    "l1": "l1",
    float("inf"): "linf",
    2: "l2",
    1: "l1",
}


def from_torchattacks(attack: Any, **settings: Any) -> ForeignAttack:
    """An attack of torchattacks.

    A copy of it attacks the model of each call, on the device of the images, with its modes and settings; one that was
    set to ``targeted(label)`` becomes ``targeted``.

    Args:
        attack: an attack object, built with any model.
        **settings: arguments of :class:`ForeignAttack`. ``eps`` is read from the object (in units of [0, 1], as the
            library has it), ``norm`` from the object or its name; ``mean`` and ``std`` replace its own normalisation.

    Raises:
        ValueError: it has a normalisation of its own, or no radius is known.

    Example:
        >>> attack = from_torchattacks(torchattacks.PGD(net, eps=8 / 255))  # doctest: +SKIP
        >>> x_adv = attack(net, x, y)  # doctest: +SKIP
    """
    if getattr(attack, "normalization_used", None) is not None:
        raise ValueError(
            "The attack of torchattacks has a normalisation of its own (set_normalization_used); leave it out and give "
            "`mean` and `std` to from_torchattacks."
        )
    found = _NORMS.get(getattr(attack, "norm", None), "l2" if "L2" in type(attack).__name__ else "linf")
    targeted = getattr(attack, "attack_mode", "default") == "targeted(label)"
    return _adapted(_TorchAttacks(attack), attack, "eps", {"norm": found, "targeted": targeted, **settings})


def from_foolbox(attack: Any, *, eps: float, **settings: Any) -> ForeignAttack:
    """An attack of foolbox.

    Args:
        attack: an attack object.
        eps: radius of the budget in pixel units; attacks that look for the nearest adversarial point are cut there.
        **settings: arguments of :class:`ForeignAttack`; ``norm`` is read from the distance of the attack.

    Raises:
        ValueError: no norm is known.

    Example:
        >>> attack = from_foolbox(foolbox.attacks.LinfPGD(), eps=8 / 255)  # doctest: +SKIP
        >>> x_adv = attack(net, x, y)  # doctest: +SKIP
    """
    norm = settings.pop("norm", None) or _NORMS.get(getattr(getattr(attack, "distance", None), "p", None))
    if norm is None:
        raise ValueError(f"No norm is known of the foolbox attack {attack!r}; give `norm`.")
    low, high = settings.get("bounds", (0.0, 1.0))
    perturb = _Foolbox(attack, eps / (high - low), settings.get("targeted", False))
    return _adapted(perturb, attack, "", {"norm": norm, "eps": eps, **settings})


def from_autoattack(attack: Any, **settings: Any) -> ForeignAttack:
    """The official AutoAttack.

    A copy of it attacks the model of each call, with fewer targets where the model has fewer classes, a seed drawn from
    this attack's generator if it has none, and a count of its own for its check for dynamic defences.

    Args:
        attack: an ``AutoAttack`` object, built with any model; of several batches each is one evaluation.
        **settings: arguments of :class:`ForeignAttack`; ``eps`` and ``norm`` are read from the object.

    Raises:
        ValueError: when called, a model of fewer than four classes, for which the DLR losses are not defined.

    Example:
        >>> attack = from_autoattack(autoattack.AutoAttack(net, eps=8 / 255, device="cpu"))  # doctest: +SKIP
        >>> x_adv = attack(net, x, y)  # doctest: +SKIP
    """
    found = _NORMS.get(getattr(attack, "norm", None), "linf")
    return _adapted(_AutoAttack(attack), attack, "epsilon", {"norm": found, "cost": 1900.0, **settings})


@dataclass(frozen=True)
class _TorchAttacks:
    attack: Any

    def __call__(self, model: AttackedModel, x: Tensor, y: Tensor) -> Tensor:
        twin = _for_model(self.attack, model)
        # its own setter would keep every value it is given for ever
        for each in (twin, *getattr(twin, "_attacks", {}).values()):
            vars(each)["device"] = x.device
        adversarial: Tensor = twin(x, y)
        return adversarial


@dataclass(frozen=True)
class _Foolbox:
    attack: Any
    eps: float
    targeted: bool

    def __call__(self, model: AttackedModel, x: Tensor, y: Tensor) -> Tensor:
        foolbox = importlib.import_module("foolbox")
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        criteria = foolbox.criteria
        goal = criteria.TargetedMisclassification(y) if self.targeted else criteria.Misclassification(y)
        _, clipped, _ = self.attack(wrapped, x, goal, epsilons=self.eps)
        adversarial: Tensor = clipped
        return adversarial


@dataclass(frozen=True)
class _AutoAttack:
    attack: Any

    def __call__(self, model: AttackedModel, x: Tensor, y: Tensor) -> Tensor:
        twin = _for_model(self.attack, model)
        classes = model.num_classes
        if classes < 4 and any(name in twin.attacks_to_run for name in ("apgd-t", "apgd-dlr")):
            raise ValueError(
                f"The official AutoAttack needs at least four classes for its DLR losses but the model has {classes}; "
                "use AutoAttack of this library."
            )
        for part in (twin.apgd_targeted, twin.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        if twin.seed is None:
            twin.seed = int(torch.randint(2**31, ()))  # else it takes the time
        for each in (twin, twin.apgd, twin.apgd_targeted, twin.fab, twin.square):
            each.device = x.device
        return self._run(twin, x, y)

    def _run(self, twin: Any, x: Tensor, y: Tensor) -> Tensor:
        checks = sys.modules.get(type(twin).__module__.rpartition(".")[0] + ".checks")
        counts = getattr(checks, "funcs", {})
        counts.update(dict.fromkeys(counts, 0))  # else one dynamic model makes all later ones suspicious
        tracer = sys.gettrace()
        try:
            adversarial: Tensor = twin.run_standard_evaluation(x, y, bs=len(x))
        finally:
            sys.settrace(tracer)
        return adversarial


def _for_model(attack: Any, model: AttackedModel) -> Any:
    """A copy in which the attacked model stands wherever the attack's own stood."""
    return copy.deepcopy(attack, {id(attack.model): model})


def _adapted(perturb: Any, attack: Any, radius: str, settings: dict[str, Any]) -> ForeignAttack:
    if "eps" not in settings:
        own = getattr(attack, radius, None)
        if own is None:
            raise ValueError(
                f"No radius is known of {type(attack).__name__}; give `eps`, and `norm` if it is not linf."
            )
        low, high = settings.get("bounds", (0.0, 1.0))
        settings["eps"] = float(own) * (high - low)
    defaults = {"name": type(attack).__name__, "cost": float(max(getattr(attack, "steps", None) or 1, 1))}
    return ForeignAttack(perturb, **{**defaults, **settings})
