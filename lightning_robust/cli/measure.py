# SPDX-License-Identifier: Apache-2.0
"""Evaluate what a run has trained, with the attack that its recipe names."""

from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_robust.cli.builder import RecipeCLI
from lightning_robust.cli.errors import CommandError
from lightning_robust.cli.folders import CONFIG
from lightning_robust.cli.substitute import RUN, fill
from lightning_robust.cli.train import best_weights, load_checkpoint
from lightning_robust.data import ImageDataModule
from lightning_robust.evaluation import evaluate
from lightning_robust.training import BatchAdapter, LogitsFunction

__all__ = ["loader_of", "measure", "measure_saved"]


def measure(cli: RecipeCLI, folder: Path) -> dict[str, Any] | None:
    """Evaluate the best weights of a run on its test split, with the temperature fitted on its validation split.

    Args:
        cli: The run, built.
        folder: Its folder.

    Returns:
        The numbers, or ``None`` when there is no test data.
    """
    weights = best_weights(folder)
    if weights.is_file():
        cli.model.load_state_dict(load_checkpoint(weights)["state_dict"])
    test, validation = loader_of(cli, "test"), loader_of(cli, "val")
    if test is None:
        return None
    settings = cli.evaluation_settings()
    device = cli.trainer.strategy.root_device
    cli.model.to(device)
    label = f"Evaluating {folder.parent.name}" + (f" with {settings['attack']}" if settings["attack"] else "")
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(label, total=len(getattr(test, "dataset", ())) or None)
            result = evaluate(
                LogitsFunction(cli.model),
                test,
                validation=validation,
                attack=cli.config_init.evaluation.attack,
                max_attacked=settings["max_attacked"],
                device=device,
                unpack=BatchAdapter().unpack,
                progress=lambda samples: progress.advance(task, samples),
            )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CommandError(f"{folder} is trained but cannot be evaluated: {error}") from error
    return {**result.to_dict(), **settings}


def measure_saved(folder: Path, like: RecipeCLI) -> dict[str, Any] | None:
    """Evaluate a finished run of the disk with the attack of another run.

    Args:
        folder: Folder of the finished run.
        like: The run whose evaluation is taken over, built.
    """
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    wanted = yaml.safe_load(like.text())
    saved = RecipeCLI({**fill(config, {RUN: str(folder)}), "evaluation": wanted["evaluation"]})
    saved.rehearse()
    return measure(saved, folder)


def loader_of(cli: RecipeCLI, split: str, data: L.LightningDataModule | None = None) -> Any:
    """The batches of a split in this process alone; ``None`` when there are none.

    Args:
        cli: The run, built.
        split: ``"train"`` (without augmentation and in order, where the data module can), ``"val"`` or ``"test"``.
        data: Another data module than the run's.
    """
    name = f"{split}_dataloader"
    data = cli.datamodule if data is None else data
    source, base = (cli.model, L.LightningModule) if data is None else (data, L.LightningDataModule)
    if not is_overridden(name, source, base):
        return None
    if isinstance(source, L.LightningDataModule):
        # A data module that still knows the Trainer of several processes would give each its share only.
        source.trainer = None
        source.prepare_data()
        source.setup("test" if split == "test" else "fit")
        if split == "train" and isinstance(source, ImageDataModule):
            return source.clean_train_loader()
    return getattr(source, name)()
