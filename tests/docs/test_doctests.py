"""Every example in every docstring runs and prints what it says."""

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
    without = []
    for name in module_names():
        module = importlib.import_module(name)
        for public in module.__all__:
            thing = getattr(module, public)
            if inspect.isclass(thing) and thing.__module__ == name and not is_exempt(thing):
                if ">>>" not in (thing.__doc__ or ""):
                    without.append(f"{name}.{public}")
    assert not without


def is_exempt(thing: type) -> bool:
    """Errors, enumerations and bases that cannot be used as they are have nothing to show."""
    return issubclass(thing, (BaseException, str)) or inspect.isabstract(thing)
