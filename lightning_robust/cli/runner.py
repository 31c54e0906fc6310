# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust run``: the baseline if there is one, the run itself, and the comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import CommandError, UsageError
from lightning_robust.cli.folders import CONFIG, SUMMARY, claim_run_folder, read_summary, run_folders, write_json
from lightning_robust.cli.launch import forget_plan, is_first_process, receive_plan, share_plan
from lightning_robust.cli.measure import measure, measure_saved
from lightning_robust.cli.quiet import hush
from lightning_robust.cli.recipes import load_recipe
from lightning_robust.cli.report import INSTALL_PLOT, comparison_table, write_picture
from lightning_robust.cli.substitute import BASELINE, RUN, fill, shared_changes, uses
from lightning_robust.cli.train import best_weights, latest_checkpoint, start_summary, train

__all__ = ["run"]


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


def run(arguments: Arguments) -> int:
    """Train, evaluate, compare; returns the exit code.

    Args:
        arguments: What the user asked for.

    Raises:
        CommandError: If something is refused or fails.
    """
    hush()
    try:
        return _resume(arguments) if arguments.resume is not None else _start(arguments)
    finally:
        forget_plan()


def _start(arguments: Arguments) -> int:
    recipe = load_recipe(arguments.recipe)
    config = recipe.config()
    if arguments.baseline is not None:
        config["baseline"] = None if arguments.baseline == "none" else arguments.baseline
    baseline = config.get("baseline")
    first = is_first_process()
    if first:
        plan = _plan(arguments, recipe.name, config)
        share_plan(vars(plan), arguments.out)
    else:
        plan = Plan(**receive_plan(arguments.out))
    folder = Path(plan.folder)
    words = {RUN: str(folder), BASELINE: str(best_weights(Path(plan.baseline)))}
    cli = RecipeCLI(fill(config, words), fill(list(arguments.changes), words))
    summary: dict[str, Any] = {}
    if first:
        summary = start_summary(recipe.name, cli, folder, baseline=plan.baseline or None)
        _say(f"Run folder: {folder}")
    if plan.train_baseline:
        _train_baseline(str(baseline), arguments, Path(plan.baseline), first)
    if first and plan.baseline:
        _say(f"Training {recipe.name}")
    train(cli, folder, summary)
    return _conclude(cli, folder, summary) if first else 0


def _plan(arguments: Arguments, name: str, config: dict[str, Any]) -> Plan:
    baseline = config.get("baseline")
    if baseline is None:
        if uses(BASELINE, [config, list(arguments.changes)]):
            raise UsageError(f"`{name}` uses {BASELINE}, so it needs a baseline; name one with --baseline RECIPE.")
        # Everything that can be refused is refused before a folder is made.
        RecipeCLI(config, arguments.changes).rehearse()
        return Plan(str(claim_run_folder(arguments.out.resolve(), name)))
    root = arguments.out.resolve()
    parsed = RecipeCLI(*_baseline_recipe(str(baseline), arguments))
    fingerprint = parsed.fingerprint()
    parsed.rehearse()
    RecipeCLI(config, arguments.changes).rehearse()
    reused = None if arguments.fresh else _finished(root / _recipe_name(str(baseline)), fingerprint)
    if reused is not None:
        _say(f"Baseline {baseline}: reusing {reused}, a finished run with the identical configuration.")
    baseline_folder = reused or claim_run_folder(root, _recipe_name(str(baseline)))
    return Plan(str(claim_run_folder(root, name)), str(baseline_folder), reused is None)


def _recipe_name(baseline: str) -> str:
    return load_recipe(baseline).name


def _baseline_recipe(baseline: str, arguments: Arguments) -> tuple[dict[str, Any], list[str]]:
    config = {**load_recipe(baseline).config(), "baseline": None}
    changes = shared_changes(arguments.changes)
    if uses(BASELINE, [config, changes]):
        raise UsageError(f"{baseline} needs a baseline itself, so it cannot be one.")
    return config, changes


def _finished(parent: Path, fingerprint: str) -> Path | None:
    for folder in reversed(run_folders(parent)):
        if (folder / SUMMARY).is_file() and best_weights(folder).is_file():
            summary = read_summary(folder)
            if summary.get("status") == "complete" and summary.get("fingerprint") == fingerprint:
                return folder
    return None


def _train_baseline(baseline: str, arguments: Arguments, folder: Path, first: bool) -> None:
    config, changes = _baseline_recipe(baseline, arguments)
    fingerprint = RecipeCLI(config, changes).fingerprint()
    cli = RecipeCLI(fill(config, {RUN: str(folder)}), fill(changes, {RUN: str(folder)}))
    summary: dict[str, Any] = {}
    if first:
        name = _recipe_name(baseline)
        _say(f"Training the baseline {name} in {folder}")
        summary = start_summary(name, cli, folder, fingerprint=fingerprint)
    train(cli, folder, summary)
    if first:
        summary.update(status="complete", evaluation=measure(cli, folder))
        write_json(folder / SUMMARY, summary)


def _resume(arguments: Arguments) -> int:
    folder = Path(str(arguments.resume)).resolve()
    summary = read_summary(folder)
    if summary.get("status") == "complete":
        raise UsageError(f"{folder} is complete; train it anew with: lightning-robust run {folder / CONFIG}")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise UsageError(
            f"{folder} has no checkpoint to continue from; start again: lightning-robust run {folder / CONFIG}"
        )
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    cli = RecipeCLI(config, arguments.changes)
    first = is_first_process()
    if first:
        _say(f"Continuing {folder} from {checkpoint.name}")
    train(cli, folder, summary, checkpoint=checkpoint)
    return _conclude(cli, folder, summary) if first else 0


def _conclude(cli: RecipeCLI, folder: Path, summary: dict[str, Any]) -> int:
    summary.update(status="complete", evaluation=measure(cli, folder))
    rows = [{**summary, "folder": str(folder)}]
    if summary.get("baseline"):
        rows.insert(0, _baseline_row(cli, Path(summary["baseline"])))
        summary["compared_with"] = rows[0]
    write_json(folder / SUMMARY, summary)
    console = Console()
    console.print(comparison_table(rows))
    picture = write_picture(rows, folder / "comparison.png") or f"needs matplotlib: {INSTALL_PLOT}"
    for what, path in (("Run", folder), ("Baseline", summary.get("baseline")), ("Picture", picture)):
        if path:
            console.print(f"{what + ':':<10}{path}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _baseline_row(cli: RecipeCLI, folder: Path) -> dict[str, Any]:
    summary = read_summary(folder)
    if summary.get("status") != "complete":
        raise CommandError(
            f"The baseline {folder} is not complete; continue it with: lightning-robust run --resume {folder}"
        )
    settings = cli.evaluation_settings()
    if {key: summary["evaluation"].get(key) for key in settings} != settings:
        # The baseline was measured with another attack than this recipe asks for.
        summary["evaluation"] = measure_saved(folder, cli)
    return {**summary, "folder": str(folder)}


def _say(text: str) -> None:
    Console().print(text, style="bold", soft_wrap=True, highlight=False, markup=False)
