# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust check``: does a recipe work, in which order does its step run, and what does it cost?"""

from collections.abc import Sized
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lightning_robust.cli.arguments import Arguments
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.compare import rehearse_arm
from lightning_robust.cli.comparison import Comparison
from lightning_robust.cli.earlier import earlier_runs, stood_in
from lightning_robust.cli.errors import CommandError
from lightning_robust.cli.jobs import Job, main_job
from lightning_robust.cli.measured import probe_task
from lightning_robust.cli.quiet import hush, silence
from lightning_robust.cli.substitute import RUN
from lightning_robust.cli.tables import new_table
from lightning_robust.training import StepPipeline

__all__ = ["check"]


def check(arguments: Arguments) -> None:
    """Build everything, run one training batch and one validation batch, and print what was built.

    Nothing is written outside of a temporary folder. Where the recipe wants a trained teacher that does not exist yet,
    the check uses an untrained one.

    Args:
        arguments: What the user asked for.

    Raises:
        CommandError: If the recipe does not work.
    """
    hush()
    job = main_job(arguments)
    if (comparison := Comparison.of(job)) is not None:
        _check_arms(comparison)
        return
    with stood_in(*_earlier(job), [job.config, job.changes]) as words:
        cli = _first_batches(job, words)
        _print(job.name, cli)
        _print_facts(_facts(cli, StepPipeline(cli.trainer, cli.model)))


def _earlier(job: Job) -> tuple[dict[str, Job | Path], dict[str, Path]]:
    earlier = earlier_runs(job)
    return earlier, {name: run for name, run in earlier.items() if isinstance(run, Path)}


def _check_arms(comparison: Comparison) -> None:
    facts: list[tuple[str, str]] = []
    for arm in comparison.arms:
        with stood_in(*_earlier(comparison.base()), comparison.values()) as words:
            rehearse_arm(comparison, arm, words)  # what it refuses names the arm
            cli = _first_batches(comparison.job(arm, comparison.seeds[0]), words)
            _print(arm, cli)
            pipeline = StepPipeline(cli.trainer, cli.model)
            facts.append((f"cost of a step of {arm}", _cost(pipeline)))
            others = _facts(cli, pipeline)
    seeds = ", ".join(map(str, comparison.seeds))
    common = [fact for fact in others if fact[0] in ("device", "samples", "keeps the epoch with", "teachers")]
    measured = [("seeds", seeds), ("measured", ", ".join(comparison.quantities))]
    if "probe" in comparison.quantities:
        measured.append(("probe", probe_task(cli)))
    _print_facts([*facts, *common, *measured])


def _first_batches(job: Job, words: dict[str, str]) -> RecipeCLI:
    cli = job.parse(words)
    options = {"fast_dev_run": 1, "default_root_dir": words[RUN], "logger": False}
    try:
        with silence(warnings_too=False):
            cli.build(**options, enable_progress_bar=False, enable_model_summary=False)
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    except CommandError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        lines = [line for line in str(error).splitlines() if line.strip()][:6] or [type(error).__name__]
        raise CommandError(
            f"{job.name} is built, but its first batch fails: {kind}{lines[0]}",
            *lines[1:],
            "Set LIGHTNING_ROBUST_TRACEBACK=1 to see where.",
        ) from error
    return cli


def _print(name: str, cli: RecipeCLI) -> None:
    console = Console()
    pipeline = StepPipeline(cli.trainer, cli.model)
    console.print(f"{name} works. Its training step, outermost first:", style="bold", highlight=False)
    console.print(escape(pipeline.describe()), highlight=False)
    if pipeline.callbacks:
        console.print("Why in this order:", style="bold", highlight=False)
    for stage, reason in pipeline.reasons().items():
        console.print(f"{stage:<9} {reason}", highlight=False, markup=False, soft_wrap=True)


def _print_facts(facts: list[tuple[str, str]]) -> None:
    table = new_table()
    table.add_column("what", style="cyan")
    table.add_column("value")
    for what, value in facts:
        table.add_row(what, escape(value))
    Console().print(table)


def _cost(pipeline: StepPipeline) -> str:
    return f"{pipeline.passes():g} forward + backward passes (a plain step: 1)"


def _facts(cli: RecipeCLI, pipeline: StepPipeline) -> list[tuple[str, str]]:
    trainer, model = cli.trainer, cli.model
    monitors = [
        name for name, item in (cli.config_init.methods or {}).items() if item not in (None, *pipeline.callbacks)
    ]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = [
        ("cost of a step", _cost(pipeline)),
        ("watching", ", ".join(monitors) or "nothing"),
        ("trainable parameters", f"{trainable:,}"),
        ("optimizer", ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)),
        ("device", f"{trainer.num_devices} x {trainer.strategy.root_device.type}, precision {trainer.precision}"),
        ("samples", _sizes(cli)),
        ("evaluation", f"attack {cli.evaluation_settings()['attack'] or 'none'}"),
        ("keeps the epoch with", f"{cli.config.monitor_mode} {cli.config.monitor}"),
    ]
    if cli.config.baseline:
        facts.append(("compared with", cli.config.baseline))
    if cli.config.teachers:
        facts.append(("teachers", ", ".join(f"{name}: {recipe}" for name, recipe in cli.config.teachers.items())))
    return facts


def _sizes(cli: RecipeCLI) -> str:
    trainer = cli.trainer
    if cli.datamodule is not None:
        cli.datamodule.setup("test")
        loaders = {"train": trainer.train_dataloader, "validation": trainer.val_dataloaders}
        loaders["test"] = cli.datamodule.test_dataloader()
    else:
        loaders = {"train": trainer.train_dataloader, "validation": trainer.val_dataloaders}
    sized = {split: getattr(loader, "dataset", None) for split, loader in loaders.items()}
    counts = [f"{split} {len(data):,}" for split, data in sized.items() if isinstance(data, Sized)]
    return ", ".join(counts) or "unknown"
