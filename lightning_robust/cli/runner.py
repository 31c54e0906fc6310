# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust run``: the baseline and the teachers if there are any, the run itself, and the comparison."""

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import TEACHERS, RecipeCLI
from lightning_robust.cli.compare import resume_comparison, start_comparison
from lightning_robust.cli.comparison import Comparison
from lightning_robust.cli.earlier import (
    claim_earlier,
    earlier_of,
    earlier_runs,
    finished_runs,
    stood_in,
    train_earlier,
    words_of,
)
from lightning_robust.cli.errors import CommandError, UsageError
from lightning_robust.cli.folders import CONFIG, SUMMARY, claim_run_folder, read_summary, write_json
from lightning_robust.cli.jobs import Job, main_job
from lightning_robust.cli.launch import forget_plan, is_first_process, receive_plan, share_plan
from lightning_robust.cli.measure import measure, measure_saved
from lightning_robust.cli.quiet import hush
from lightning_robust.cli.rehearsal import rehearse
from lightning_robust.cli.report import INSTALL_PLOT, comparison_table, write_picture
from lightning_robust.cli.train import latest_checkpoint, start_summary, train

__all__ = ["run"]


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
    job = main_job(arguments)
    if (comparison := Comparison.of(job)) is not None:
        return start_comparison(comparison, arguments)
    first = is_first_process()
    summary: dict[str, Any] = {}
    if first:
        folder, earlier = _claim(job, arguments.out.resolve(), fresh=arguments.fresh)
        share_plan({"folder": str(folder), "earlier": earlier}, arguments.out)
        places: dict[str, Any] = dict(earlier)
        baseline = places.pop("baseline", None)
        summary = start_summary(job.name, job.parse(), folder, baseline=baseline, **{TEACHERS: places})
        _say(f"Run folder: {folder}")
    else:
        plan = receive_plan(arguments.out)
        folder, earlier = Path(plan["folder"]), plan["earlier"]
    train_earlier(earlier, folder)
    cli = job.parse(words_of(folder, earlier))
    if first and earlier:
        _say(f"Training {job.name}")
    train(cli, folder, summary)
    return _conclude(cli, folder, summary) if first else 0


def _claim(job: Job, root: Path, *, fresh: bool) -> tuple[Path, dict[str, str]]:
    """Refuse what can be refused, then claim the folders: of the run, and of what it stands on."""
    earlier = earlier_runs(job)
    found = finished_runs(earlier, root, fresh=fresh)
    # A mistake in the recipe must not show only after the earlier runs have been trained.
    with stood_in(earlier, found, [job.config, job.changes]) as words:
        main = job.parse(words)
        rehearse(main)
    if main.config.evaluation.transfer is not None:
        raise UsageError("`evaluation.transfer` is measured in a comparison only, a recipe with a `compare` part.")
    places = claim_earlier(earlier, found, root)
    return claim_run_folder(root, job.name), places


def _resume(arguments: Arguments) -> int:
    folder = Path(str(arguments.resume)).resolve()
    summary = read_summary(folder)
    if "comparison" in summary:
        return resume_comparison(folder, arguments)
    again = f"lightning-robust run {folder / CONFIG}"
    if summary.get("status") == "complete":
        raise UsageError(f"{folder} is complete; train it anew with: {again}")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None and summary.get("status") != "waiting":
        raise UsageError(f"{folder} has no checkpoint to continue from; start again with: {again}")
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    job = Job(str(summary.get("recipe")), config, list(arguments.changes))
    earlier = earlier_of(summary)
    train_earlier(earlier, folder)
    cli = job.parse(words_of(folder, earlier))
    first = is_first_process()
    if first:
        _say(f"Continuing {folder} from {checkpoint.name}" if checkpoint else f"Training {job.name}")
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
        onwards = f"lightning-robust run --resume {folder}"
        raise CommandError(f"The baseline {folder} is not complete; continue it with: {onwards}")
    settings = cli.evaluation_settings()
    if {key: (summary["evaluation"] or {}).get(key) for key in settings} != settings:
        # The baseline was measured with another attack than this recipe asks for.
        summary["evaluation"] = measure_saved(folder, cli)
    return {**summary, "folder": str(folder)}


def _say(text: str) -> None:
    Console().print(text, style="bold", soft_wrap=True, highlight=False, markup=False)
