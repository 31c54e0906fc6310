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
    public = {getattr(room, name) for room in rooms for name in room.__all__}
    without = [thing for thing in public if inspect.isclass(thing) and not is_exempt(thing) and not has_example(thing)]
    assert not without


def has_example(thing: type) -> bool:
    return ">>>" in (thing.__doc__ or "")


def is_exempt(thing: type) -> bool:
    """Errors, enumerations, records and bases that cannot be used as they are have nothing to show."""
    return issubclass(thing, (BaseException, str)) or inspect.isabstract(thing) or dataclasses.is_dataclass(thing)
