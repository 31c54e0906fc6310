# SPDX-License-Identifier: Apache-2.0
"""From the words ``--attack``, ``--eps`` and ``--norm`` to the attack of a recipe."""

import inspect
import pydoc
from types import ModuleType
from typing import Any

from lightning_robust.attacks import Attack
from lightning_robust.attacks.norms import NORMS
from lightning_robust.cli.catalog import constructor_parameters, find_class, room_classes
from lightning_robust.cli.errors import UsageError, did_you_mean
from lightning_robust.cli.eval_arguments import EvalArguments
from lightning_robust.cli.targets import Target

__all__ = ["PRESETS", "attack_config", "attack_names"]

#: Names that stand for an attack with arguments.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("AutoAttack", {"version": "fast"}),
    "plus": ("AutoAttack", {"version": "plus"}),
    "rand": ("AutoAttack", {"version": "rand"}),
}
_SPACE = ("mean", "std", "bounds")


def attack_names() -> dict[str, str]:
    """Classes of attacks by their name in small letters."""
    classes = room_classes("lightning_robust.attacks")
    return {name.lower(): name for name, item in classes.items() if issubclass(item, Attack) and item is not Attack}


def attack_config(arguments: EvalArguments, target: Target) -> dict[str, Any]:
    """The attack as a recipe writes it; its budget is the recipe's own unless another is asked for.

    Args:
        arguments: What the user asked for.
        target: What is evaluated.

    Raises:
        UsageError: If there is no such attack, or no budget that is meant.
    """
    if arguments.norm is not None and arguments.norm not in NORMS:
        raise UsageError(f"There is no norm called {arguments.norm}; there are: {', '.join(NORMS)}.")
    own = target.attack
    if arguments.attack is None and own is None:
        raise UsageError(f"Which attack? For example: lightning-robust eval {arguments.target} --attack autoattack")
    if arguments.attack is None:
        assert own is not None
        class_path, options = own["class_path"], dict(own.get("init_args", {}))
    else:
        class_path, options = _named(arguments.attack)
        options = {**_inherited(own, class_path, arguments), **options}
    if arguments.eps is not None:
        options["eps"] = arguments.eps
    elif arguments.norm is not None and arguments.norm != options.get("norm"):
        raise UsageError(f"--norm {arguments.norm} needs the budget in this norm: give --eps, too.")
    if arguments.norm is not None:
        options["norm"] = arguments.norm
    return {"class_path": class_path, "init_args": options}


def _named(name: str) -> tuple[str, dict[str, Any]]:
    if name.lower() in PRESETS:
        class_name, options = PRESETS[name.lower()]
        return class_name, dict(options)
    if "." in name:
        _refuse_no_attack(name)
        return name, {}  # a class of the user's own, by its full path
    names = attack_names()
    if name.lower() not in names:
        known = [*names, *PRESETS]
        hint = did_you_mean(name, known) or f"There are: {', '.join(sorted(known))}."
        raise UsageError(f"There is no attack called {name}.", hint)
    return names[name.lower()], {}


def _refuse_no_attack(path: str) -> None:
    """Refuse a full path that leads to no class of an attack."""
    try:
        found = pydoc.locate(path) if all(path.split(".")) else None
    except pydoc.ErrorDuringImport as error:
        raise UsageError(
            f"The attack {path} cannot be imported: {type(error.value).__name__}: {error.value}."
        ) from error
    if found is None or isinstance(found, ModuleType):
        short = did_you_mean(path.rpartition(".")[2], list(attack_names().values()))
        hint = did_you_mean(path, _neighbours(path)) or short
        raise UsageError(
            f"There is no attack class {path}.",
            hint or "A class of your own needs its full path, for example mypackage.module.MyAttack.",
        )
    if inspect.isclass(found) and (not issubclass(found, Attack) or inspect.isabstract(found)):
        raise UsageError(f"Expected --attack to be a concrete subclass of lightning_robust.attacks.Attack, got {path}.")


def _neighbours(path: str) -> list[str]:
    """Full paths of the attacks in the module that a path names."""
    module = path.rpartition(".")[0]
    content = vars(found) if isinstance(found := pydoc.locate(module), ModuleType) else {}
    classes = {name: item for name, item in content.items() if inspect.isclass(item) and issubclass(item, Attack)}
    return [f"{module}.{name}" for name, item in classes.items() if not inspect.isabstract(item)]


def _inherited(own: dict[str, Any] | None, class_path: str, arguments: EvalArguments) -> dict[str, Any]:
    """Image space and budget of the recipe's attack, as far as the other attack has them."""
    found = find_class(class_path)
    given = (own or {}).get("init_args", {})
    if found is None:
        return {}
    wanted = _SPACE if arguments.eps is not None else (*_SPACE, "eps", "norm")
    known = {parameter.name for parameter in constructor_parameters(found)}
    return {key: given[key] for key in wanted if key in given and key in known}
