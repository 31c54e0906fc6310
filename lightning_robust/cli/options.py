# SPDX-License-Identifier: Apache-2.0
"""Reading the options of commands that take a few of their own and pass others on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lightning_robust.cli.errors import UsageError, did_you_mean

__all__ = ["Options", "integer", "read_options"]


@dataclass
class Options:
    """What a command line says.

    Args:
        plain: Words that are no options.
        values: Values of the command's own options and flags, by name.
        passed_on: Names and values of the others, in their order.
    """

    plain: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    passed_on: list[tuple[str, str]] = field(default_factory=list)


def read_options(
    words: Sequence[str],
    *,
    values: Collection[str],
    flags: Collection[str],
    passed_on: Collection[str],
    shown: Sequence[str],
) -> Options:
    """Sort the words of a command line.

    Args:
        words: What follows the name of the command.
        values: Names of its options with a value, ``--name VALUE`` or ``--name=VALUE``.
        flags: Names of its options without one.
        passed_on: What stands before the first dot in names of options for others.
        shown: Examples of those for the message about an unknown option.

    Raises:
        UsageError: If an option is unknown or has no value.
    """
    found = Options()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            found.plain.append(word)
        elif name in flags:
            found.values[name] = "yes"
        elif name in values:
            found.values[name] = value if given else _following(rest, name)
        elif name.partition(".")[0] in passed_on:
            found.passed_on.append((name, value if given else _following(rest, name)))
        else:
            raise UsageError(f"There is no option --{name}.", did_you_mean(name, [*values, *flags, *shown]))
    return found


def integer(values: dict[str, str], name: str, low: int) -> int | None:
    """An option that is an integer of at least ``low``; ``None`` if it is not given.

    Args:
        values: Values of options by name.
        name: Name of the option.
        low: Smallest value.

    Raises:
        UsageError: If it is something else.
    """
    if name not in values:
        return None
    if not values[name].isdecimal() or int(values[name]) < low:
        raise UsageError(f"Expected --{name} to be an integer >= {low} but got {values[name]}.")
    return int(values[name])


def _following(rest: list[str], name: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"--{name} needs a value.")
    return rest.pop(0)
