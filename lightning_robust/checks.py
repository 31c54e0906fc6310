# SPDX-License-Identifier: Apache-2.0
"""One sentence for every refused argument: name, expectation, what was given."""

import math
from collections.abc import Collection

__all__ = ["check_choice", "check_in_range", "check_integer", "check_kind", "check_non_negative", "check_positive"]


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above zero."""
    if not (_is_number(value) and value > 0):
        raise ValueError(f"Expected `{name}` to be a finite number > 0 but got {value!r}.")


def check_non_negative(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number that is zero or above."""
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"Expected `{name}` to be a finite number >= 0 but got {value!r}.")


def check_in_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``."""
    if not (_is_number(value) and low <= value <= high):
        raise ValueError(f"Expected `{name}` to be in [{low}, {high}] but got {value!r}.")


def check_integer(name: str, value: int, low: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"Expected `{name}` to be an integer >= {low} but got {value!r}.")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected `{name}` to be one of {listed} but got {value!r}.")


def check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    """Raise ``TypeError`` unless ``value`` is an object of ``kind``; ``remedy`` says what to use instead."""
    if not isinstance(value, kind):
        given = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(f"Expected `{name}` to be a {kind.__name__} but got {given}; {remedy}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
