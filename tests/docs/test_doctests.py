"""Every example in every docstring runs and prints what it says."""

import dataclasses
import doctest
import importlib
import inspect

import pytest

from support.package import module_names

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", module_names())
def test_examples_of_module(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=FLAGS, report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} lines failed (printed above)"


def test_every_public_class_shows_an_example() -> None:
    rooms = [importlib.import_module(name) for name in module_names() if name.count(".") == 1]
    public = {name: getattr(room, name) for room in rooms for name in room.__all__}
    classes = {name: thing for name, thing in public.items() if inspect.isclass(thing)}
    bases = {base for thing in classes.values() for base in thing.__mro__[1:]}
    shown = [name for name, thing in classes.items() if thing not in bases and not is_exempt(thing)]
    assert sorted(name for name in shown if ">>>" not in (classes[name].__doc__ or "")) == []


def is_exempt(thing: type) -> bool:
    """Errors, enumerations, records, protocols and what a running fit hands out have nothing to show by themselves."""
    if (
        issubclass(thing, (BaseException, str, tuple))
        or dataclasses.is_dataclass(thing)
        or getattr(thing, "_is_protocol", False)
    ):
        return True
    return inspect.isabstract(thing) or thing.__name__ in {"QuietGate", "StepContext", "StepPipeline"}
