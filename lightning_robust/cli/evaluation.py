# SPDX-License-Identifier: Apache-2.0
"""``lightning-robust eval``: attack a trained model on its test set and report what withstood."""

import json
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from lightning_robust.callbacks import RobustEvaluation
from lightning_robust.cli.errors import CommandError, UsageError
from lightning_robust.cli.eval_arguments import EvalArguments, parse_eval
from lightning_robust.cli.eval_model import EvaluatedModel, EvaluationCLI, built_evaluation
from lightning_robust.cli.evaluations import REPORT
from lightning_robust.cli.folders import claim_run_folder, write_json, write_text
from lightning_robust.cli.launch import forget_plan, is_first_process, receive_plan, share_plan
from lightning_robust.cli.quiet import hush
from lightning_robust.cli.report import INSTALL_PLOT
from lightning_robust.cli.targets import Target, find_target
from lightning_robust.data import ImageDataModule
from lightning_robust.evaluation import RobustnessReport, print_report

__all__ = ["evaluate_command"]

REQUEST, STATE = "eval.json", "state"


def evaluate_command(words: Sequence[str]) -> int:
    """Understand, build, attack, report; returns the exit code.

    Args:
        words: The arguments of ``eval``.

    Raises:
        CommandError: If something is refused or fails.
    """
    hush()
    arguments = parse_eval(words)
    folder = None
    if arguments.resume is not None:
        folder = arguments.resume.resolve()
        words = [*_request(folder), *arguments.changes]
        if (folder / REPORT).is_file():
            return _show_finished(folder, arguments)
        devices = arguments.devices
        arguments = replace(parse_eval(words), plot=arguments.plot)
        arguments = arguments if devices is None else replace(arguments, devices=devices)
    try:
        return _evaluate(arguments, list(words), folder)
    finally:
        forget_plan()


def _evaluate(arguments: EvalArguments, words: list[str], folder: Path | None) -> int:
    target = find_target(arguments.target)
    cli = built_evaluation(target, arguments)
    _callback(cli, arguments, None)  # whatever it refuses is refused before anything is written
    root = (folder or arguments.out or target.parent).resolve()
    first = is_first_process()
    if first:
        folder = folder or _claimed(arguments, target)
        write_json(folder / REQUEST, {"words": _from_anywhere(words, arguments), "target": target.name})
        share_plan({"folder": str(folder)}, root)
        console = Console()
        console.print(f"Evaluation folder: {folder}", style="bold", soft_wrap=True, highlight=False, markup=False)
    else:
        folder = Path(receive_plan(root)["folder"])
    callback = _callback(cli, arguments, folder)
    _attack(cli, callback, arguments, folder)
    assert callback.report is not None
    return _conclude(replace(callback.report, model=target.name), folder, arguments.plot) if first else 0


def _claimed(arguments: EvalArguments, target: Target) -> Path:
    if arguments.out is None:
        return claim_run_folder(target.parent.resolve().parent, target.parent.name)
    folder = arguments.out.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise CommandError(f"{folder} cannot be created: {error.strerror}; choose another one with --out.") from error
    if taken:
        onwards = f"Continue with: lightning-robust eval --resume {folder}" if (folder / REQUEST).is_file() else ""
        raise UsageError(f"{folder} is not empty; choose another folder with --out.", onwards)
    return folder


def _callback(cli: EvaluationCLI, arguments: EvalArguments, folder: Path | None) -> RobustEvaluation:
    try:
        return RobustEvaluation(
            cli.config_init.evaluation.attack,
            seed=arguments.seed,
            max_samples=arguments.samples,
            craft_dtype=cast("Any", arguments.craft_dtype),
            checks=cast("Any", arguments.checks),
            state_dir=None if folder is None else folder / STATE,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _attack(cli: EvaluationCLI, callback: RobustEvaluation, arguments: EvalArguments, folder: Path) -> None:
    trainer = cli.trainer
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    step, loader = (
        ("test_step", "test_dataloader") if arguments.split == "test" else ("validation_step", "val_dataloader")
    )
    module = cli.model if is_overridden(step, cli.model, L.LightningModule) else EvaluatedModel(cli.model)
    source, base = (cli.model, L.LightningModule) if cli.datamodule is None else (cli.datamodule, L.LightningDataModule)
    if not is_overridden(loader, source, base):
        raise UsageError(
            f"{type(source).__name__} has no {loader}, so there is nothing to attack; try --split or --data."
        )
    if arguments.samples is not None and isinstance(cli.datamodule, ImageDataModule):
        # these modules hand out samples in turn, so that the first batches of each process are enough
        batches = -(-arguments.samples // (trainer.world_size * cli.datamodule.batch_size))
        trainer.limit_test_batches = trainer.limit_val_batches = batches
    loop = trainer.test if arguments.split == "test" else trainer.validate
    loaders = getattr(source, loader)() if cli.datamodule is None else None
    try:
        loop(module, dataloaders=loaders, datamodule=cli.datamodule, verbose=False)
    except BaseException as error:
        # Lightning turns Ctrl-C into SystemExit after an orderly shutdown.
        raise _explained(error, folder) from error


def _explained(error: BaseException, folder: Path) -> CommandError:
    onwards = f"Continue with: lightning-robust eval --resume {folder}"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return CommandError("The evaluation was stopped.", onwards)
    trace = folder / "error.txt"
    if is_first_process():
        write_text(trace, "".join(traceback.format_exception(error)))
    text = [line for line in str(error).splitlines() if line.strip()][:6] or [type(error).__name__]
    if isinstance(error, ValueError | TypeError):
        return CommandError(*text)
    kind = type(error).__name__
    return CommandError(
        f"The evaluation failed: {kind}: {text[0]}", *text[1:], f"The whole traceback is in {trace}", onwards
    )


def _conclude(report: RobustnessReport, folder: Path, plot: bool) -> int:
    lines = {"Report": report.save(folder / REPORT)}
    if plot:
        lines["Picture"] = _picture(report, folder / "report.png")
    console = Console()
    for what, path in lines.items():
        console.print(f"{what + ':':<10}{path}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _picture(report: RobustnessReport, path: Path) -> Path:
    try:
        from lightning_robust.evaluation import robustness_figure

        robustness_figure(report).savefig(path, format="png", dpi=120)
    except ModuleNotFoundError as error:
        raise UsageError(f"Wrote {path.parent / REPORT}, but the picture needs matplotlib.", INSTALL_PLOT) from error
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _request(folder: Path) -> list[str]:
    path = folder / REQUEST
    if not path.is_file():
        raise UsageError(f"{folder} is no folder of an evaluation: it has no {REQUEST}.")
    try:
        words: list[str] = json.loads(path.read_text(encoding="utf-8"))["words"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    return words


def _show_finished(folder: Path, arguments: EvalArguments) -> int:
    report = RobustnessReport.load(folder / REPORT)
    console = Console()
    console.print(f"{folder} is complete.", soft_wrap=True, highlight=False, markup=False)
    print_report(report, console)
    return _conclude(report, folder, arguments.plot)


def _from_anywhere(words: Sequence[str], arguments: EvalArguments) -> list[str]:
    """The words with the target by its full path, so that they mean the same in another working folder."""
    path = Path(arguments.target)
    return [str(path.resolve()) if word == arguments.target and path.exists() else word for word in words]
