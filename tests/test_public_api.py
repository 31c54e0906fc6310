"""Promises about every public name: it is listed, documented down to its last argument, and on its floor."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import docstring_parser
import pytest

from support.package import module_names

MODULES = module_names()
ROOMS = [
    name
    for name in MODULES
    if name.count(".") == 1 and name not in ("lightning_robust.checks", "lightning_robust.guards")
]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# A room may import from its own floor and from those below it.
FLOORS = [
    {
        "checks",
        "guards",
        "schedules",
        "losses",
        "mixing",
        "regularization",
        "attacks",
        "sharpness",
        "optimizers",
        "metrics",
        "calibration",
    },
    {"objectives", "distillation", "evaluation"},
    {"models", "data", "training"},
    {"callbacks"},
    {"recipes", "cli"},
]
WITHOUT_LIGHTNING = sorted(FLOORS[0] - {"checks", "guards", "schedules"})


def listed_objects(modules: list[str]) -> list[Any]:
    """Every class and function that an `__all__` of these modules names, once, under the module that defines it."""
    found = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # reported by the test below, for this module only
        for public in getattr(module, "__all__", []):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return [pytest.param(value, id=key) for key, value in sorted(found.items()) if key.startswith("lightning_robust.")]


@pytest.mark.parametrize("name", MODULES)
def test_module_has_docstring_and_lists_its_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing, f"{name}.__all__ names what does not exist: {missing}"
    assert len(set(module.__all__)) == len(module.__all__)


def test_first_line_names_the_licence(repository: Path) -> None:
    sources = [
        path for room in ("lightning_robust", "callbacks", "recipes") for path in (repository / room).rglob("*.py")
    ]
    without = [
        str(path) for path in sources if not path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ]
    assert sources
    assert not without


@pytest.mark.parametrize("thing", listed_objects(MODULES))
def test_everything_listed_has_a_docstring(thing: Any) -> None:
    assert vars(thing)["__doc__"] if inspect.isclass(thing) else thing.__doc__


@pytest.mark.parametrize("thing", listed_objects(ROOMS))
def test_every_argument_is_documented(thing: Any) -> None:
    if "Attributes:" in (thing.__doc__ or "") and "Args:" not in thing.__doc__:
        return  # handed to users, not made by them
    documented = {parameter.arg_name for parameter in docstring_parser.parse(inspect.getdoc(thing) or "").params}
    undocumented = [name for name in argument_names(thing) if name not in documented]
    assert not undocumented, f"arguments without a line in the docstring: {undocumented}"


@pytest.mark.parametrize("thing", [case for case in listed_objects(ROOMS) if inspect.isclass(case.values[0])])
def test_every_public_method_is_documented(thing: type) -> None:
    undocumented = [
        name
        for name, member in vars(thing).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
        # an override says nothing new: inspect finds the text of the method that it overrides
        if not inspect.getdoc(getattr(thing, name))
    ]
    assert not undocumented, f"methods without a docstring: {undocumented}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    if name == "lightning_robust":
        return
    room = name.split(".")[1]
    floor = floor_of(room)
    module = importlib.import_module(name)
    upward = {other for other in imported_rooms(module) if floor_of(other) > floor}
    assert not upward, f"{name} imports from above its floor: {sorted(upward)}"


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_imports_without_lightning(room: str) -> None:
    code = (
        f"import sys, lightning_robust.{room}\n"
        "heavy = sorted({'lightning', 'pytorch_lightning', 'timm', 'sklearn'} & set(sys.modules))\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def argument_names(thing: Any) -> list[str]:
    if inspect.isclass(thing) and issubclass(thing, (BaseException, str)):
        return []
    parameters = inspect.signature(thing).parameters.values()
    return [each.name for each in parameters if each.kind not in VARIADIC and not each.name.startswith("_")]


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported_rooms(module: ModuleType) -> set[str]:
    # Import statements inside of functions are left out: they run when a module is used, not when it is imported.
    statements = ast.parse(Path(str(module.__file__)).read_text()).body
    names = [statement.module or "" for statement in statements if isinstance(statement, ast.ImportFrom)]
    names += [alias.name for statement in statements if isinstance(statement, ast.Import) for alias in statement.names]
    inside = [name.split(".") for name in names if name.startswith("lightning_robust.")]
    return {parts[1] for parts in inside}
