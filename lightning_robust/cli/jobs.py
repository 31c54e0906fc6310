# SPDX-License-Identifier: Apache-2.0
"""What is to be trained, and where: a run, the baseline that it names, and their folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.folders import SUMMARY, claim_run_folder, read_summary, run_folders
from lightning_robust.cli.recipes import load_recipe
from lightning_robust.cli.substitute import BASELINE, RUN, fill, shared_changes, uses
from lightning_robust.cli.train import best_weights

__all__ = ["Job", "Plan", "baseline_job", "main_job", "make_plan", "words_of"]


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


@dataclass(frozen=True)
class Plan:
    """What all processes of a run must agree on.

    Args:
        folder: Folder of the run.
        baseline: Folder of the baseline; empty without one.
        train_baseline: Whether the baseline has to be trained first.
    """

    folder: str
    baseline: str = ""
    train_baseline: bool = False


def words_of(folder: str | Path, baseline: str | Path | None) -> dict[str, str]:
    """What the words in braces stand for in a run.

    Args:
        folder: Folder of the run.
        baseline: Folder of its baseline, if it has one.
    """
    words = {RUN: str(folder)}
    return {**words, BASELINE: str(best_weights(Path(baseline)))} if baseline else words


def main_job(arguments: Arguments) -> Job:
    """The training that the user asked for.

    Args:
        arguments: What the user asked for.

    Raises:
        UsageError: If the recipe needs a baseline and has none.
    """
    recipe = load_recipe(arguments.recipe)
    config = recipe.config()
    if arguments.baseline is not None:
        config["baseline"] = None if arguments.baseline == "none" else arguments.baseline
    changes = list(arguments.changes)
    if config.get("baseline") is None and uses(BASELINE, [config, changes]):
        raise UsageError(f"`{recipe.name}` uses {BASELINE}, so it needs a baseline; name one with --baseline RECIPE.")
    return Job(recipe.name, config, changes)


def baseline_job(job: Job) -> Job | None:
    """The training of the baseline of another one, with the options that both share.

    Args:
        job: The training with a baseline.

    Raises:
        UsageError: If the baseline needs a baseline itself.
    """
    if job.config.get("baseline") is None:
        return None
    recipe = load_recipe(str(job.config["baseline"]))
    config, changes = {**recipe.config(), "baseline": None}, shared_changes(job.changes)
    if uses(BASELINE, [config, changes]):
        raise UsageError(f"{recipe.name} needs a baseline itself, so it cannot be one.")
    return Job(recipe.name, config, changes)


def make_plan(job: Job, baseline: Job | None, root: Path, *, fresh: bool) -> Plan:
    """Refuse what can be refused, then claim the folders.

    Args:
        job: The run.
        baseline: Its baseline.
        root: Folder that holds the run folders.
        fresh: Train the baseline even when an identical finished run exists.

    Raises:
        CommandError: If something is refused, or a folder cannot be created.
    """
    # A mistake in the recipe must not show only after the baseline has been trained.
    main = job.parse()
    main.rehearse()
    if main.config.evaluation.transfer is not None:
        raise UsageError("`evaluation.transfer` is measured in a comparison only, a recipe with a `compare` part.")
    if baseline is None:
        return Plan(str(claim_run_folder(root, job.name)))
    parsed = baseline.parse()
    parsed.rehearse()
    reused = None if fresh else _finished(root / baseline.name, parsed.fingerprint())
    folder = reused or claim_run_folder(root, baseline.name)
    return Plan(str(claim_run_folder(root, job.name)), str(folder), reused is None)


def _finished(parent: Path, fingerprint: str) -> Path | None:
    for folder in reversed(run_folders(parent)):
        if (folder / SUMMARY).is_file() and best_weights(folder).is_file():
            summary = read_summary(folder)
            if summary.get("status") == "complete" and summary.get("fingerprint") == fingerprint:
                return folder
    return None
