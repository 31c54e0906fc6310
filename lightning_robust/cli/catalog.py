# SPDX-License-Identifier: Apache-2.0
"""The classes that a recipe can name by their short name.

jsonargparse accepts a short name only of a class whose module was imported, so everything is imported here, once.
"""

import importlib
import inspect

__all__ = ["ROOMS", "class_names", "constructor_parameters", "find_class", "import_rooms", "room_classes"]

ROOMS = (
    "lightning_robust.callbacks",
    "lightning_robust.models",
    "lightning_robust.data",
    "lightning_robust.objectives",
    "lightning_robust.losses",
    "lightning_robust.mixing",
    "lightning_robust.regularization",
    "lightning_robust.attacks",
    "lightning_robust.sharpness",
    "lightning_robust.optimizers",
    "lightning_robust.distillation",
)
FOREIGN = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim", "torch.optim.lr_scheduler")


def import_rooms() -> None:
    """Import every room, so that its classes are known by their short names."""
    for room in ROOMS:
        importlib.import_module(room)


def room_classes(room: str) -> dict[str, type]:
    """The public classes of a module, by name."""
    module = importlib.import_module(room)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {name: item for name, item in found.items() if inspect.isclass(item)}


def class_names() -> set[str]:
    """Short names of all classes that a recipe may well mean."""
    return {name for room in (*ROOMS, *FOREIGN) for name in room_classes(room)}


def find_class(name: str) -> type | None:
    """The class of a short name or a full path; ``None`` when there is none."""
    module, _, short = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), short, None)
        except ImportError:
            return None
        return found if inspect.isclass(found) else None
    for room in (*ROOMS, *FOREIGN):
        if short in (classes := room_classes(room)):
            return classes[short]
    return None


def constructor_parameters(item: type) -> list[inspect.Parameter]:
    """The named parameters of a constructor; ``**kwargs`` stands for those of the base classes, as it does in a recipe.

    Args:
        item: The class.
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in item.__mro__[:-1]:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        for entry in parameters:
            if entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL):
                found.setdefault(entry.name, entry)
        if not any(entry.kind is entry.VAR_KEYWORD for entry in parameters):
            break
    return list(found.values())
