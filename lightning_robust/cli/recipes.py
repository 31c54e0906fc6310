# SPDX-License-Identifier: Apache-2.0
"""Find, list and read recipes: YAML files that come with the library, or the user's own."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_robust.cli.errors import UsageError, did_you_mean
from lightning_robust.cli.folders import CONFIG, SUMMARY, read_summary

__all__ = ["Recipe", "bundled_recipes", "copy_recipe", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read.

    Args:
        name: Name of the recipe: what `list` shows, or the stem of the file.
        text: The YAML text.
        source: Where it came from, for messages.
    """

    name: str
    text: str
    source: str

    @property
    def summary(self) -> str:
        """What the recipe shows: its first comment line."""
        return self._comment(0)

    @property
    def cost(self) -> str:
        """What it costs: its second comment line."""
        return self._comment(1)

    def _comment(self, index: int) -> str:
        head = self.text.splitlines()[: index + 1]
        if len(head) <= index or not head[index].startswith("#"):
            return ""
        return head[index].lstrip("# ").strip()

    def config(self) -> dict[str, Any]:
        """Parse the text into a new dictionary.

        Raises:
            UsageError: If the text is not YAML, or is not a mapping.
        """
        try:
            parsed = yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or "it cannot be read"
            raise UsageError(f"{self.source}{where} is not valid YAML: {problem}.") from error
        if not isinstance(parsed, dict):
            raise UsageError(
                f"{self.source} is not a recipe: expected a mapping with keys such as `model` and `data`.",
                "See one with: lightning-robust show digits-robust",
            )
        return parsed


def bundled_recipes() -> dict[str, Recipe]:
    """All recipes that come with the library, by name in alphabetical order."""
    found = {}
    for entry in files("lightning_robust.recipes").iterdir():
        if entry.name.endswith(".yaml"):
            name = entry.name.removesuffix(".yaml")
            found[name] = Recipe(name, entry.read_text(encoding="utf-8"), f"recipe {name}")
    return dict(sorted(found.items()))


def load_recipe(name: str) -> Recipe:
    """Read a bundled recipe by name, or a file by path.

    A name of the library wins over a file of the same name in the working folder; write ``./name`` to mean the file.

    Raises:
        UsageError: If there is neither, or the file cannot be read.
    """
    bundled = bundled_recipes()
    if name in bundled:
        return bundled[name]
    path = Path(name)
    if path.is_file():
        try:
            return Recipe(_name(path), path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}.") from error
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder, expected a recipe.", f"Continue a run with: lightning-robust run --resume {path}"
        )
    raise UsageError(
        f"There is no recipe and no file called {name!r}.",
        did_you_mean(name, [*bundled, *map(str, Path().glob("*.yaml"))]),
        "All recipes: lightning-robust list",
    )


def _name(path: Path) -> str:
    # The saved configuration of a run is called config.yaml, whatever the recipe was.
    if path.name == CONFIG and (path.parent / SUMMARY).is_file():
        return str(read_summary(path.parent).get("recipe", path.stem))
    return path.stem


def copy_recipe(name: str, target: Path, *, force: bool = False) -> Path:
    """Write the text of a recipe to a file, and return the file's path.

    Args:
        name: Recipe to copy.
        target: File to write; a folder gets a file named after the recipe.
        force: Overwrite an existing file.

    Raises:
        UsageError: If the file exists and `force` is off, or it cannot be written.
    """
    recipe = load_recipe(name)
    if target.is_dir():
        target = target / f"{recipe.name}.yaml"
    if target.exists() and not force:
        raise UsageError(f"{target} exists already; add --force to overwrite it.")
    try:
        target.write_text(recipe.text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}.") from error
    return target
