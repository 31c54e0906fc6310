# SPDX-License-Identifier: Apache-2.0
"""Understand the `compare` part of a recipe, and the options of the command line that change it."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from lightning_robust.cli.builder import COMPARE, TEACHERS
from lightning_robust.cli.errors import UsageError, did_you_mean
from lightning_robust.cli.quantities import DEFAULT, QUANTITIES

__all__ = ["PREFIX", "SHAPE", "Arm", "change", "checked", "quantities_of", "seeds_of"]

KEYS = ("seeds", "arms", "quantities")
COMMON = ("seed_everything", "baseline", TEACHERS, COMPARE)
PREFIX = f"--{COMPARE}"
SHAPE = "Write it as compare: {seeds: [0, 1, 2], arms: {NAME: {what differs from the recipe}}}."
_NAME = re.compile(r"[A-Za-z0-9][\w+-]*")


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Args:
        overrides: Values that replace those of the recipe.
        changes: Options of the command line for this arm alone.
    """

    overrides: dict[str, Any]
    changes: list[str] = field(default_factory=list)


def checked(block: Any) -> dict[str, Any]:
    """A copy of the part; refused if it has the wrong shape."""
    if not isinstance(block, dict):
        raise UsageError(f"`{COMPARE}` must be a mapping.", SHAPE)
    for key in block:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS)
            raise UsageError(f"`{COMPARE}` has no key `{key}`.", hint or f"Its keys: {', '.join(KEYS)}.")
    arms = block.get("arms")
    if not isinstance(arms, dict):
        raise UsageError(f"`{COMPARE}.arms` must map names of your choice to what differs from the recipe.", SHAPE)
    for name, value in arms.items():
        _check_arm(name, value)
    return {**block, "arms": dict(arms)}


def _check_arm(name: Any, value: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"`{name}` cannot be the name of an arm: use letters, digits and + - _ only.")
    if not isinstance(value, dict | None):
        raise UsageError(f"`{COMPARE}.arms.{name}` must be a mapping of what differs from the recipe ({{}}: nothing).")
    if wrong := next((key for key in COMMON if key in (value or {})), None):
        raise UsageError(f"`{COMPARE}.arms.{name}` cannot change `{wrong}`: it is common to all arms.")


def change(block: dict[str, Any], arms: dict[str, Arm], option: str, value: str) -> None:
    """Change the part and its arms as an option of the command line says."""
    parts = option.removeprefix("--").split(".")
    if len(parts) < 2 or parts[1] not in KEYS:
        known = [f"{PREFIX}.{key}" for key in KEYS]
        hint = did_you_mean(option, known, 1) or f"There are: {', '.join(known)}."
        raise UsageError(f"There is no option `{option}`.", hint)
    if parts[1] != "arms":
        if len(parts) > 2:
            raise UsageError(f"There is no option `{option}`.", f"Did you mean `{PREFIX}.{parts[1]}`?")
        block[parts[1]] = _value(value)
        return
    if len(parts) == 2:
        raise UsageError(f"{option}: change one arm at a time, {PREFIX}.arms.NAME.any.option VALUE.")
    name, rest = parts[2], ".".join(parts[3:])
    if not rest and value == "null" and name in arms:
        del arms[name]
    elif not rest and value != "null":
        overrides = _value(value)
        _check_arm(name, overrides)
        arms[name] = Arm(overrides or {})
    elif name not in arms:
        hint = did_you_mean(name, arms) or f"It has: {', '.join(arms)}."
        add = f"Add one with: {PREFIX}.arms.{name} {{}}"
        raise UsageError(f"{option}: there is no arm called `{name}`.", hint, add)
    elif rest.partition(".")[0] in COMMON:
        raise UsageError(f"{option}: `{rest}` is common to all arms.")
    else:
        arms[name].changes.append(f"--{rest}={value}")


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{text} cannot be understood.") from error


def seeds_of(given: Any) -> list[int]:
    """The seeds, however they were written."""
    values = [_value(part) for part in given.split(",")] if isinstance(given, str) else given
    values = [values] if isinstance(values, int) else values
    if not isinstance(values, list) or not values or not all(type(seed) is int and seed >= 0 for seed in values):
        raise UsageError(f"Expected `{COMPARE}.seeds` to be integers >= 0, for example [0, 1, 2], but got {given}.")
    if len(set(values)) < len(values):
        raise UsageError(f"Expected different `{COMPARE}.seeds` but got {given}.")
    return values


def quantities_of(given: Any) -> list[str]:
    """The names of the quantities, however they were written; the usual ones by default."""
    if given is None:
        return list(DEFAULT)
    values = given.split(",") if isinstance(given, str) else given
    if not isinstance(values, list) or not values:
        raise UsageError(f"Expected `{COMPARE}.quantities` to be a list of names but got {given}.")
    for name in values:
        if name not in QUANTITIES:
            hint = did_you_mean(str(name), QUANTITIES) or f"There are: {', '.join(QUANTITIES)}."
            raise UsageError(f"`{COMPARE}.quantities`: there is no quantity `{name}`.", hint)
    return [str(name) for name in dict.fromkeys(values)]
