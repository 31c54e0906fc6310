# SPDX-License-Identifier: Apache-2.0
"""Put values into a recipe, and find out which values make one recipe of another."""

import copy
from typing import Any

__all__ = ["difference", "merged"]


def merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with some values replaced.

    Mappings are merged; a mapping that names another class than the recipe's takes its place as a whole.

    Args:
        base: The recipe.
        overrides: What replaces its values.

    Example:
        >>> merged({"trainer": {"max_epochs": 3, "devices": 1}}, {"trainer": {"max_epochs": 5}})
        {'trainer': {'max_epochs': 5, 'devices': 1}}
    """
    result = copy.deepcopy(base)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_class(old, value):
            result[key] = merged(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def difference(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What has to be merged into a recipe to get another one with the same keys, or more.

    Args:
        base: The recipe.
        other: The other one.

    Example:
        >>> difference({"trainer": {"max_epochs": 3, "devices": 1}}, {"trainer": {"max_epochs": 5, "devices": 1}})
        {'trainer': {'max_epochs': 5}}
    """
    found: dict[str, Any] = {}
    for key, value in other.items():
        old = base.get(key)
        if key in base and old == value and type(old) is type(value):
            continue
        if isinstance(old, dict) and isinstance(value, dict) and _same_class(old, value) and set(old) <= set(value):
            found[key] = difference(old, value)
        else:
            found[key] = value
    return found


def _same_class(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if "class_path" not in new:
        return True
    # a recipe may use the short name
    return str(old.get("class_path")).rpartition(".")[2] == str(new["class_path"]).rpartition(".")[2]
