# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust run``: the baseline if there is one, the run itself, and the comparison."""

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.compare import resume_comparison, start_comparison
from lightning_robust.cli.comparison import Comparison
from lightning_robust.cli.errors import CommandError, UsageError
from lightning_robust.cli.folders import CONFIG, SUMMARY, read_summary, write_json
from lightning_robust.cli.jobs import Job, Plan, baseline_job, main_job, make_plan, words_of
from lightning_robust.cli.launch import forget_plan, is_first_process, receive_plan, share_plan
from lightning_robust.cli.measure import measure, measure_saved
from lightning_robust.cli.quiet import hush
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
    baseline = baseline_job(job)
    first = is_first_process()
    if first:
        plan = make_plan(job, baseline, arguments.out.resolve(), fresh=arguments.fresh)
        share_plan(vars(plan), arguments.out)
    else:
        plan = Plan(**receive_plan(arguments.out))
    folder = Path(plan.folder)
    summary: dict[str, Any] = {}
    if first:
        summary = start_summary(job.name, job.parse(), folder, baseline=plan.baseline or None)
        _say(f"Run folder: {folder}")
    if baseline is not None and plan.train_baseline:
        _train_baseline(baseline, Path(plan.baseline), first)
    elif baseline is not None and first:
        _say(f"Baseline {baseline.name}: reusing {plan.baseline}, a finished run with the identical configuration.")
    cli = job.parse(words_of(folder, plan.baseline))
    if first and plan.baseline:
        _say(f"Training {job.name}")
    train(cli, folder, summary)
    return _conclude(cli, folder, summary) if first else 0


def _train_baseline(job: Job, folder: Path, first: bool) -> None:
    summary: dict[str, Any] = {}
    if first:
        _say(f"Training the baseline {job.name} in {folder}")
        summary = start_summary(job.name, job.parse(), folder)
    cli = job.parse(words_of(folder, None))
    train(cli, folder, summary)
    if first:
        summary.update(status="complete", evaluation=measure(cli, folder))
        write_json(folder / SUMMARY, summary)


def _resume(arguments: Arguments) -> int:
    folder = Path(str(arguments.resume)).resolve()
    summary = read_summary(folder)
    if "comparison" in summary:
        return resume_comparison(folder, arguments)
    again = f"lightning-robust run {folder / CONFIG}"
    if summary.get("status") == "complete":
        raise UsageError(f"{folder} is complete; train it anew with: {again}")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise UsageError(f"{folder} has no checkpoint to continue from; start again with: {again}")
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    job = Job(str(summary.get("recipe")), config, list(arguments.changes))
    cli = job.parse(words_of(folder, summary.get("baseline")))
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
        onwards = f"lightning-robust run --resume {folder}"
        raise CommandError(f"The baseline {folder} is not complete; continue it with: {onwards}")
    settings = cli.evaluation_settings()
    if {key: (summary["evaluation"] or {}).get(key) for key in settings} != settings:
        # The baseline was measured with another attack than this recipe asks for.
        summary["evaluation"] = measure_saved(folder, cli)
    return {**summary, "folder": str(folder)}


def _say(text: str) -> None:
    Console().print(text, style="bold", soft_wrap=True, highlight=False, markup=False)
