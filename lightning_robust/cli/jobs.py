# SPDX-License-Identifier: Apache-2.0
"""What is to be trained: a recipe with the options of the command line that apply to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import TEACHERS, RecipeCLI
from lightning_robust.cli.errors import UsageError, did_you_mean
from lightning_robust.cli.recipes import load_recipe
from lightning_robust.cli.substitute import BASELINE, RUN, fill, take_option, teacher_words, uses, word_of

__all__ = ["Job", "main_job"]

_SHAPE = f"Write it as {TEACHERS}: {{NAME: RECIPE}}; {{NAME}} in braces then stands for its best checkpoint."


@dataclass(frozen=True)
class Job:
    """One training: a recipe, and the options of the command line that apply to it.

    Args:
        name: Name of the recipe.
        config: The recipe.
        changes: Options of the command line.
    """

    name: str
    config: dict[str, Any]
    changes: list[str]

    def parse(self, words: Mapping[str, str] | None = None) -> RecipeCLI:
        """The configuration, with the words in braces replaced.

        Args:
            words: Replacement of each word; words that are missing stay as they are.
        """
        return RecipeCLI(fill(self.config, words or {}), fill(self.changes, words or {}))


def main_job(arguments: Arguments) -> Job:
    """The training that the user asked for.

    Args:
        arguments: What the user asked for.

    Raises:
        UsageError: If the recipe uses an earlier run that it does not name.
    """
    recipe = load_recipe(arguments.recipe)
    config = recipe.config()
    if arguments.baseline is not None:
        config["baseline"] = None if arguments.baseline == "none" else arguments.baseline
    chosen, changes = take_option(arguments.changes, f"--{TEACHERS}")
    if config.get(TEACHERS) is not None or chosen:
        config[TEACHERS] = _teachers(config.get(TEACHERS) or {}, chosen)
    if config.get("baseline") is None and uses(BASELINE, [config, changes]):
        raise UsageError(f"`{recipe.name}` uses {BASELINE}, so it needs a baseline; name one with --baseline RECIPE.")
    known = [BASELINE, RUN, *(word_of(name) for name in config.get(TEACHERS) or {})]
    for word in teacher_words([config.get("methods"), config.get("model"), config.get("compare")]):
        if word not in known:
            add = f"Name a teacher with: --{TEACHERS}.{word.strip('{}')} RECIPE"
            raise UsageError(f"`{recipe.name}` uses {word}, which stands for nothing.", did_you_mean(word, known), add)
    return Job(recipe.name, config, changes)


def _teachers(given: Any, chosen: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The recipe of each teacher, with those that the command line names."""
    if not isinstance(given, dict):
        raise UsageError(f"`{TEACHERS}` must map names of your choice to recipes.", _SHAPE)
    for option, value in chosen:
        name = option.removeprefix(f"--{TEACHERS}").removeprefix(".")
        if not name:
            raise UsageError(f"{option}: change one teacher at a time, --{TEACHERS}.NAME RECIPE.")
        given = {**given, name: value}
    for name, value in given.items():
        if not isinstance(name, str) or not name.isidentifier() or word_of(name) in (BASELINE, RUN):
            raise UsageError(f"`{name}` cannot be the name of a teacher: use letters, digits and _ only.", _SHAPE)
        if not isinstance(value, str):
            raise UsageError(f"`{TEACHERS}.{name}` must be the name of a recipe but is {value}.", _SHAPE)
    return dict(given)
