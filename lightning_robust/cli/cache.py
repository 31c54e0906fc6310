# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust cache``: ask a teacher about the training set of a recipe, once, and store what it says."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_robust.callbacks import cache_teacher
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.cache_arguments import CacheArguments, parse_cache
from lightning_robust.cli.errors import CommandError, UsageError, did_you_mean
from lightning_robust.cli.folders import CONFIG
from lightning_robust.cli.launch import is_first_process
from lightning_robust.cli.quiet import hush
from lightning_robust.cli.recipes import load_recipe
from lightning_robust.cli.targets import find_target
from lightning_robust.distillation import TeacherCache, TeacherSource

__all__ = ["cache_command"]

_KEPT = ("seed_everything", "model", "data", "threads")


def cache_command(words: Sequence[str]) -> int:
    """Understand, build, ask, write; returns the exit code.

    Args:
        words: The arguments of ``cache``.

    Raises:
        CommandError: If something is refused or fails.
    """
    hush()
    arguments = parse_cache(words)
    cli = _built(arguments)
    if cli.datamodule is None:
        raise UsageError(f"{arguments.recipe} has no `data` of its own, so there is nothing to ask a teacher about.")
    try:
        teacher = TeacherSource(_source(arguments.teacher), **_options(arguments))
        cache = cache_teacher(teacher, cli.datamodule, arguments.out, trainer=cli.trainer, **arguments.options)
    except (ValueError, TypeError, OSError) as error:
        raise CommandError(*[line for line in str(error).splitlines() if line.strip()][:6]) from error
    if is_first_process():
        _print(cache, arguments.out)
    return 0


def _built(arguments: CacheArguments) -> RecipeCLI:
    name = Path(arguments.recipe)
    config = load_recipe(str(name / CONFIG) if (name / CONFIG).is_file() else arguments.recipe).config()
    trainer = {
        "accelerator": (config.get("trainer") or {}).get("accelerator", "auto"),
        "devices": arguments.devices,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    kept = {key: config[key] for key in _KEPT if key in config}
    cli = RecipeCLI({**kept, "trainer": trainer}, arguments.changes)
    cli.build()
    return cli


def _source(text: str) -> str:
    if not Path(text).is_dir():
        return text
    weights = find_target(text).weights
    assert weights is not None, "a run folder has weights, or is refused"
    return str(weights)


def _options(arguments: CacheArguments) -> dict[str, Any]:
    known = [name for name in inspect.signature(TeacherSource).parameters if name != "source"]
    for name in arguments.teacher_options:
        if name not in known:
            raise UsageError(
                f"A teacher has no option `{name}`; there are: {', '.join(known)}.", did_you_mean(name, known)
            )
    return arguments.teacher_options


def _print(cache: TeacherCache, out: Path) -> None:
    told = cache.described
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    classes = f"{told.num_classes}" if told.top_k is None else f"{told.top_k} of {told.num_classes}"
    rows = f"{told.rows:,} samples" if told.data["view"] == "fixed" else f"{told.rows:,} seeded views"
    lines = {
        "Cache": str(out.resolve()),
        "Holds": f"{rows}, {classes} classes, {told.dtype}, {size:.1f} MB",
        "Teacher": f"{told.teacher['source']} (fingerprint {told.teacher['fingerprint']})",
        "In recipes": f"teacher: {{class_path: TeacherCache, init_args: {{path: {out.resolve()}}}}}",
    }
    console = Console()
    for what, text in lines.items():
        console.print(f"{what + ':':<12}{text}", soft_wrap=True, highlight=False, markup=False)
