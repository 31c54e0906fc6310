# SPDX-License-Identifier: Apache-2.0
"""Train one configured run in its own folder."""

import inspect
import pickle
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_robust import __version__
from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import CommandError
from lightning_robust.cli.folders import CHECKPOINTS, CONFIG, SUMMARY, write_json, write_text
from lightning_robust.cli.launch import is_first_process
from lightning_robust.cli.records import BEST, LAST, RESUMABLE, RunLogger, TrainingClock, run_checkpoints
from lightning_robust.training import StepPipeline

__all__ = [
    "best_weights",
    "last_weights",
    "latest_checkpoint",
    "load_checkpoint",
    "refuse_other_classes",
    "start_summary",
    "train",
]


def start_summary(recipe: str, cli: RecipeCLI, folder: Path, **more: Any) -> dict[str, Any]:
    """Write the configuration and the first summary of a run into its folder, and return the summary.

    Args:
        recipe: Name of the recipe.
        cli: The parsed recipe, its words in braces as they are.
        folder: The run folder.
        **more: Further entries.
    """
    summary = {
        "recipe": recipe,
        "status": "waiting",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "lightning_robust": __version__,
        "monitor": cli.config.monitor,
        "fingerprint": cli.fingerprint(),
        **more,
    }
    write_text(folder / CONFIG, cli.text())
    write_json(folder / SUMMARY, summary)
    return summary


def train(
    cli: RecipeCLI,
    folder: Path,
    summary: dict[str, Any],
    *,
    checkpoint: Path | None = None,
    whole: Path | None = None,
    brief: bool = False,
) -> None:
    """Build and fit; `summary` gets what was found and is written by the first process.

    Args:
        cli: The parsed recipe.
        folder: The run folder, which exists.
        summary: The run's summary so far.
        checkpoint: Training state to continue from.
        whole: Folder that a message tells to continue, if this training is a part of something.
        brief: Leave out the summary of the model, which an earlier training has printed.

    Raises:
        CommandError: If something cannot be built, or training stops with an error.
    """
    first = is_first_process()
    clock = TrainingClock()
    step = 0 if checkpoint is None else _steps(checkpoint)
    _build(cli, folder, clock, step, brief)
    if checkpoint is not None:
        refuse_other_classes(cli.model, checkpoint)
    summary["status"] = "running"
    if first:
        write_json(folder / SUMMARY, summary)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, **_without_code(checkpoint))
    except BaseException as error:
        # Lightning turns Ctrl-C into SystemExit after an orderly shutdown.
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        summary["status"] = "stopped" if stopped else "failed"
        if first:
            write_json(folder / SUMMARY, summary)
        raise _explain(error, folder, stopped, whole) from error
    summary.update(_found(cli, clock))
    if first:
        write_json(folder / SUMMARY, summary)


def _build(cli: RecipeCLI, folder: Path, clock: TrainingClock, step: int, brief: bool) -> None:
    options = cli.config.trainer
    callbacks: list[L.Callback] = [clock]
    if options.enable_checkpointing is not False and not options.fast_dev_run and not options.barebones:
        callbacks += run_checkpoints(folder, cli.config.monitor, cli.config.monitor_mode)
    more: dict[str, Any] = {"enable_model_summary": False} if brief else {}
    root = options.default_root_dir or folder
    cli.build(*callbacks, loggers=[RunLogger(folder, keep_below=step)], default_root_dir=root, **more)


def _found(cli: RecipeCLI, clock: TrainingClock) -> dict[str, Any]:
    trainer, model = cli.trainer, cli.model
    best = next((item for item in trainer.checkpoint_callbacks if getattr(item, "monitor", None)), None)
    score = getattr(best, "best_model_score", None)
    return {
        "status": "trained",
        "seconds": clock.seconds,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "passes": StepPipeline(trainer, model).passes(),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "monitor": cli.config.monitor,
        "best": None if score is None else float(score),
        "processes": trainer.world_size,
    }


def _explain(error: BaseException, folder: Path, stopped: bool, whole: Path | None) -> CommandError:
    has_state = whole is not None or latest_checkpoint(folder) is not None
    onwards = f"Continue with: lightning-robust run --resume {whole or folder}" if has_state else ""
    if stopped:
        return CommandError("Training was stopped.", onwards)
    trace = folder / "error.txt"
    if is_first_process():
        write_text(trace, "".join(traceback.format_exception(error)))
    text = [line for line in str(error).splitlines() if line.strip()][:6] or [type(error).__name__]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return CommandError(f"Training failed: {kind}{text[0]}", *text[1:], f"The whole traceback is in {trace}", onwards)


def latest_checkpoint(folder: Path) -> Path | None:
    """The training state of a run with the most steps; ``None`` if there is none.

    Args:
        folder: The run folder.
    """
    states = [path for name in RESUMABLE if (path := folder / CHECKPOINTS / name).is_file()]
    return max(states, key=_steps, default=None)


def best_weights(folder: Path) -> Path:
    """Where a run keeps the weights of its best epoch."""
    return folder / CHECKPOINTS / BEST


def last_weights(folder: Path) -> Path:
    """Where a run keeps the state at the end of its last epoch."""
    return folder / CHECKPOINTS / LAST


def _steps(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint)["global_step"])


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint of a run folder; nothing in it is executed.

    Args:
        checkpoint: A file that an earlier run wrote.

    Raises:
        CommandError: If it holds more than tensors and plain values.
    """
    try:
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CommandError(
            f"{checkpoint} holds objects beside tensors and plain values, which could run code, so it is not loaded.",
            "Keep them out of save_hyperparameters and out of the state of callbacks and module.",
        ) from error
    return content


def _without_code(checkpoint: Path | None) -> dict[str, Any]:
    known = "weights_only" in inspect.signature(L.Trainer.fit).parameters  # since Lightning 2.6
    return {"weights_only": True} if checkpoint is not None and known else {}


def refuse_other_classes(model: L.LightningModule, checkpoint: Path) -> None:
    """Refuse a checkpoint of a model of another shape.

    Args:
        model: The model as it is configured.
        checkpoint: The checkpoint.

    Raises:
        CommandError: If they do not fit.
    """
    content = load_checkpoint(checkpoint)
    now, then = getattr(model, "num_classes", None), content.get("hyper_parameters", {}).get("num_classes")
    if now is not None and then is not None and now != then:
        raise CommandError(f"{checkpoint} was trained for {then} classes but the configuration says {now}.")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, value in content["state_dict"].items():
        if shapes.get(name, tuple(value.shape)) != tuple(value.shape):
            raise CommandError(
                f"{checkpoint} does not fit the configuration: `{name}` was {list(value.shape)} and is now "
                f"{list(shapes[name])}."
            )
