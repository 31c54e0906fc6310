# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``cache``: its own, those of the teacher, and those that change values of the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.options import integer, read_options

__all__ = ["CacheArguments", "parse_cache"]

_COUNTS = ("top_k", "batch_size", "num_workers", "devices")
_VALUES = ("teacher", "out", "view", "dtype", *_COUNTS)
_FLAGS = ("overwrite",)
_PASSED_ON = ("data", "model", "trainer", "threads", "seed_everything")


@dataclass(frozen=True)
class CacheArguments:
    """What the user asked of ``cache``.

    Args:
        recipe: Name or path of the recipe, or run folder, whose data the teacher is asked about.
        teacher: Run folder, file or timm name of the teacher.
        out: Folder of the cache.
        teacher_options: Options of the teacher, as ``TeacherSource`` takes them.
        options: Options of ``cache_teacher``.
        devices: Number of processes.
        changes: Options for data and Trainer, as a recipe takes them.
    """

    recipe: str
    teacher: str
    out: Path
    teacher_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    changes: tuple[str, ...] = ()


def parse_cache(words: Sequence[str]) -> CacheArguments:
    """Understand the arguments of ``cache``.

    Args:
        words: What follows the name of the command.

    Raises:
        UsageError: If something is missing, unknown or no number.
    """
    shown = [*_PASSED_ON, "teacher.", "data.", "trainer."]
    passed_on = [*_PASSED_ON, "teacher"]
    found = read_options(words, values=_VALUES, flags=_FLAGS, passed_on=passed_on, shown=shown)
    teacher: dict[str, Any] = {}
    changes: list[str] = []
    for name, value in found.passed_on:
        if name.startswith("teacher."):
            teacher[name.removeprefix("teacher.")] = _plain(name, value)
        else:
            changes += [f"--{name}", value]
    return _understood(found.plain, changes, found.values, teacher)


def _understood(
    recipes: list[str], changes: list[str], values: dict[str, str], teacher: dict[str, Any]
) -> CacheArguments:
    example = "lightning-robust cache cifar100-kd --teacher teacher.ckpt --out caches/teacher"
    if len(recipes) != 1:
        what = "Which recipe's data?" if not recipes else f"`cache` takes one recipe, got {', '.join(recipes)}."
        raise UsageError(f"{what} For example: {example}")
    for name in ("teacher", "out"):
        if name not in values:
            raise UsageError(f"--{name} is missing. For example: {example}")
    options: dict[str, Any] = {name: values[name] for name in ("view", "dtype") if name in values}
    counts = {name: integer(values, name, 0 if name == "num_workers" else 1) for name in _COUNTS}
    options |= {name: count for name, count in counts.items() if count is not None}
    devices = options.pop("devices", 1)
    return CacheArguments(
        recipe=recipes[0],
        teacher=values["teacher"],
        out=Path(values["out"]),
        teacher_options=teacher,
        options={**options, "overwrite": "overwrite" in values},
        devices=devices,
        changes=tuple(changes),
    )


def _plain(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"The value of --{name} cannot be read: {text}") from error
