# SPDX-License-Identifier: Apache-2.0
"""Words in braces that a recipe may use as a value, and the options that earlier runs share."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lightning_robust.cli.errors import UsageError

__all__ = [
    "BASELINE",
    "RUN",
    "fill",
    "shared_changes",
    "take_option",
    "teacher_changes",
    "teacher_words",
    "uses",
    "word_of",
]

BASELINE = "{baseline}"  # checkpoint with the best weights of the baseline
RUN = "{run}"  # the run folder

#: What makes the difference between a run and its baseline, so it is not handed on.
_PARTS = ("objective", "criterion")
_OWN = ("methods", "baseline", *(f"model.{prefix}{part}" for prefix in ("", "init_args.") for part in _PARTS))

#: A teacher has its own network and its own length of training as well.
_OWN_OF_STUDENT = (*_OWN, "model", "monitor", "monitor_mode", "trainer.max_epochs", "trainer.max_steps", "compare")
_WORD = re.compile(r"\{[A-Za-z_]\w*\}")

T = TypeVar("T")


def word_of(name: str) -> str:
    """The word in braces that stands for the best checkpoint of an earlier run.

    Args:
        name: What the recipe calls it.
    """
    return f"{{{name}}}"


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


def teacher_words(value: Any, key: str = "") -> list[str]:
    """The words in braces that stand where a teacher is expected: under `teacher`, `robust_teacher`, `source`.

    Args:
        value: A nested structure.
        key: The key that it stands under.

    Example:
        >>> teacher_words({"clean_teacher": "{clean}", "robust_teacher": {"source": "{robust}"}, "filename": "{epoch}"})
        ['{clean}', '{robust}']
    """
    if isinstance(value, dict):
        return [word for name, item in value.items() for word in teacher_words(item, str(name))]
    if isinstance(value, list):
        return [word for item in value for word in teacher_words(item, key)]
    expected = key == "source" or key.endswith("teacher")
    return [value] if expected and isinstance(value, str) and _WORD.fullmatch(value) else []


def shared_changes(changes: Sequence[str]) -> list[str]:
    """The options of the command line that apply to the baseline too: all but those of the methods and the objective.

    The same data, backbone, optimizer, length and hardware on both sides is what makes the comparison fair.

    Args:
        changes: Options as they were given.

    Example:
        >>> shared_changes(["--methods.sam.rho", "0.1", "--trainer.max_epochs=3", "--seed_everything", "1"])
        ['--trainer.max_epochs=3', '--seed_everything', '1']
    """
    return _without(changes, _OWN)


def teacher_changes(changes: Sequence[str]) -> list[str]:
    """The options of the command line that apply to teachers too: those of data, hardware and seed.

    Args:
        changes: Options as they were given.

    Example:
        >>> teacher_changes(["--model.backbone", "resnet18", "--trainer.max_epochs=3", "--data.batch_size", "32"])
        ['--data.batch_size', '32']
    """
    return _without(changes, _OWN_OF_STUDENT)


def _without(changes: Sequence[str], own: Sequence[str]) -> list[str]:
    shared: list[str] = []
    keep = True
    for word in changes:
        if word.startswith("--"):
            keep = not _is_below(word.partition("=")[0], own)
        if keep:
            shared.append(word)
    return shared


def _is_below(option: str, names: Sequence[str]) -> bool:
    given = option.removeprefix("--")
    return any(given == name or given.startswith(f"{name}.") for name in names)


def take_option(changes: Sequence[str], prefix: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Split the options below a name, with their values, from all others.

    Args:
        changes: Options as they were given.
        prefix: The name, with its dashes.

    Raises:
        UsageError: If one of them has no value.

    Example:
        >>> take_option(["--teachers.clean", "mine.yaml", "--threads=2"], "--teachers")
        ([('--teachers.clean', 'mine.yaml')], ['--threads=2'])
    """
    taken: list[tuple[str, str]] = []
    rest: list[str] = []
    words = list(changes)
    while words:
        word = words.pop(0)
        option, has_value, value = word.partition("=")
        if not _is_below(option, [prefix.removeprefix("--")]):
            rest.append(word)
        elif has_value:
            taken.append((option, value))
        elif words and not words[0].startswith("--"):
            taken.append((option, words.pop(0)))
        else:
            raise UsageError(f"{option} needs a value.")
    return taken, rest
