# SPDX-License-Identifier: Apache-2.0
"""Words in braces that a recipe may use as a value, and the options that a baseline shares."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["BASELINE", "RUN", "fill", "shared_changes", "uses"]

BASELINE = "{baseline}"  # checkpoint with the best weights of the baseline
RUN = "{run}"  # the run folder

#: What makes the difference between a run and its baseline, so it is not handed on.
_PARTS = ("objective", "criterion")
_OWN = ("methods", "baseline", *(f"model.{prefix}{part}" for prefix in ("", "init_args.") for part in _PARTS))

T = TypeVar("T")


def fill(value: T, words: Mapping[str, str]) -> T:
    """A copy of a nested structure of dictionaries, lists and strings with every word replaced.

    Args:
        value: The structure.
        words: Replacement of each word.

    Example:
        >>> fill({"teacher": "{baseline}", "steps": [1, 2]}, {"{baseline}": "runs/1/best.ckpt"})
        {'teacher': 'runs/1/best.ckpt', 'steps': [1, 2]}
    """
    filled: Any = value
    if isinstance(value, dict):
        filled = {key: fill(item, words) for key, item in value.items()}
    elif isinstance(value, list):
        filled = [fill(item, words) for item in value]
    elif isinstance(value, str):
        for word, replacement in words.items():
            filled = filled.replace(word, replacement)
    return filled  # type: ignore[no-any-return]


def uses(word: str, value: Any) -> bool:
    """Whether a word stands anywhere in a nested structure."""
    return bool(fill(value, {word: ""}) != value)


def shared_changes(changes: Sequence[str]) -> list[str]:
    """The options of the command line that apply to the baseline too: all but those of the methods and the objective.

    The same data, backbone, optimizer, length and hardware on both sides is what makes the comparison fair.

    Args:
        changes: Options as they were given.

    Example:
        >>> shared_changes(["--methods.sam.rho", "0.1", "--trainer.max_epochs=3", "--seed_everything", "1"])
        ['--trainer.max_epochs=3', '--seed_everything', '1']
    """
    shared: list[str] = []
    keep = True
    for word in changes:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
            keep = not any(name == own or name.startswith(f"{own}.") for own in _OWN)
        if keep:
            shared.append(word)
    return shared
