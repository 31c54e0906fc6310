# SPDX-License-Identifier: Apache-2.0
"""Run folders: where one is, who owns it, and what is written into it."""

import json
import os
import re
from pathlib import Path
from typing import Any

from lightning_robust.cli.errors import CommandError, UsageError

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "METRICS",
    "SUMMARY",
    "claim_run_folder",
    "read_summary",
    "run_folders",
    "write_json",
    "write_text",
]

CONFIG = "config.yaml"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"


def claim_run_folder(root: Path, recipe: str) -> Path:
    """Create the next free ``root/recipe/<n>`` and return it; two processes never get the same one.

    Raises:
        CommandError: If the folder cannot be created.
    """
    parent = root / recipe
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in run_folders(parent)), default=0) + 1
        while True:
            try:
                # mkdir fails when the folder exists, which makes it the lock between two commands started at once.
                (parent / str(number)).mkdir()
            except FileExistsError:
                number += 1
            else:
                return parent / str(number)
    except OSError as error:
        raise CommandError(
            f"The run folder cannot be created in {parent}: {error.strerror}; choose another place with --out."
        ) from error


def run_folders(parent: Path) -> list[Path]:
    """The numbered folders in ``parent``, oldest first."""
    if not parent.is_dir():
        return []
    numbered = [path for path in parent.iterdir() if path.is_dir() and re.fullmatch(r"[1-9]\d*", path.name)]
    return sorted(numbered, key=lambda path: int(path.name))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON, atomically; numbers that JSON does not know (NaN) become null."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:  # infinite or not a number
        return None
    return value


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the ``summary.json`` of a run folder.

    Raises:
        UsageError: If the folder is no run folder, or its summary cannot be understood.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {SUMMARY}.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    if not isinstance(summary, dict):
        raise UsageError(f"{path} is not the summary of a run.")
    return summary
