# SPDX-License-Identifier: Apache-2.0
"""Split the arguments of ``run`` and ``check`` into the front's own and those that change values of the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_robust.cli.errors import UsageError, did_you_mean

__all__ = ["Arguments", "parse_check", "parse_run"]

OWN = {"--out", "--resume", "--baseline"}
OWN_FLAGS = {"--fresh"}


@dataclass(frozen=True)
class Arguments:
    """What the user asked of ``run`` or ``check``.

    Args:
        recipe: Name or path of the recipe; empty with `resume`.
        changes: Options that change values of the recipe, as they were given.
        out: Folder that holds the run folders.
        resume: Run folder to continue.
        baseline: Recipe to compare with instead of the recipe's own; ``none`` for no comparison.
        fresh: Train baseline and teachers again even when identical runs exist.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    out: Path = Path("runs")
    resume: Path | None = None
    baseline: str | None = None
    fresh: bool = False


def parse_check(words: Sequence[str]) -> Arguments:
    """Understand the arguments of ``check``.

    Raises:
        UsageError: If the recipe is missing or an option has no value.
    """
    return _parse("check", words, own={"--baseline"}, flags=set())


def parse_run(words: Sequence[str]) -> Arguments:
    """Understand the arguments of ``run``.

    Raises:
        UsageError: If the recipe is missing or an option has no value.
    """
    arguments = _parse("run", words, own=OWN, flags=OWN_FLAGS)
    if arguments.resume is not None and (arguments.recipe or arguments.baseline or arguments.fresh):
        raise UsageError(
            "`--resume RUN_FOLDER` continues a run as it was: give no recipe, --baseline or --fresh with it."
        )
    return arguments


def _parse(command: str, words: Sequence[str], own: set[str], flags: set[str]) -> Arguments:
    values: dict[str, str] = {}
    recipes: list[str] = []
    changes: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if name in flags:
            values[name] = "yes"
        elif name in own:
            if not has_value and not rest:
                raise UsageError(f"{name} needs a value.")
            values[name] = value if has_value else rest.pop(0)
        elif name in {"-c", "--config"}:
            raise UsageError(f"{name} is not an option: give the file as the recipe.")
        elif word.startswith("--"):
            changes.append(word)
            # What follows an option is its value, even when it looks like a negative number or a list.
            if not has_value and rest and not rest[0].startswith("--"):
                changes.append(rest.pop(0))
            elif "." not in name and (hint := did_you_mean(name, own | flags)):
                raise UsageError(f"There is no option {name}.", hint)
        else:
            recipes.append(word)
    if len(recipes) > 1:
        raise UsageError(f"`{command}` takes one recipe, got {', '.join(recipes)}.")
    if not recipes and "--resume" not in values:
        raise UsageError(
            f"Which recipe? For example: lightning-robust {command} digits-robust", "All: lightning-robust list"
        )
    return Arguments(
        recipe=recipes[0] if recipes else "",
        changes=tuple(changes),
        out=Path(values.get("--out", "runs")),
        resume=Path(values["--resume"]) if "--resume" in values else None,
        baseline=values.get("--baseline"),
        fresh="--fresh" in values,
    )
