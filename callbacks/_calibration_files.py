# SPDX-License-Identifier: Apache-2.0
"""Bin tables and reliability figures in files and experiment loggers."""

import csv
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_robust.calibration import reliability_rows
from lightning_robust.metrics import ReliabilityTable

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.figure import Figure

__all__ = ["matplotlib_is_installed", "output_folder", "send_figure", "write_files"]


def output_folder(trainer: L.Trainer, dirpath: str | None, name: str = "calibration") -> Path | None:
    """Where files go: ``dirpath``, else a folder in the log folder; None if that is nowhere sensible.

    A Trainer without a logger and without ``default_root_dir`` names the working directory: nothing is written there.
    Must be called in all processes (``trainer.log_dir`` is agreed upon among them).

    Args:
        trainer: The Trainer.
        dirpath: The user's choice.
        name: Name of the folder in the log folder.
    """
    log_dir = trainer.log_dir
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if dirpath is not None:
        return Path(dirpath)
    if log_dir is None or "://" in str(log_dir) or Path(log_dir).resolve() == Path.cwd():
        return None
    return Path(log_dir) / name


def matplotlib_is_installed() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def write_files(stem: Path, table: ReliabilityTable, figure: "Figure | None") -> None:
    """Write ``stem.csv`` with the bins and ``stem.png``; a full disk is warned about and does not stop a training.

    Args:
        stem: Destination without the ending; missing folders are made.
        table: Bin table.
        figure: A matplotlib figure, if one was drawn.
    """
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(stem.with_suffix(".csv")) as path, path.open("w", newline="", encoding="utf-8") as file:
            rows = reliability_rows(table)
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        if figure is not None:
            with _replacing(stem.with_suffix(".png")) as path:
                figure.savefig(path, format="png")
    except OSError as error:
        rank_zero_warn(f"The reliability files {stem}.* could not be written: {error!r}")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A neighbour of ``path`` that takes its place when complete, so that nobody reads half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def send_figure(loggers: Sequence[Logger], name: str, figure: "Figure", step: int) -> None:
    """Hand a figure to every logger that takes one; a logger that fails is warned about and does not stop a training.

    Lightning has no common call for figures, so the loggers are told apart by what they offer: ``log_image`` (W&B),
    ``experiment.add_figure`` (TensorBoard), ``experiment.log_figure`` with a ``run_id`` (MLflow).

    Args:
        loggers: The loggers of a Trainer.
        name: Name of the figure, for example ``"val/reliability"``.
        figure: A matplotlib figure.
        step: Global step.
    """
    for logger in loggers:
        try:
            _send(logger, name, figure, step)
        except Exception as error:
            rank_zero_warn(f"{type(logger).__name__} did not take the figure {name!r}: {error!r}")


def _send(logger: Any, name: str, figure: "Figure", step: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(name, [figure], step=step)
    elif hasattr(logger.experiment, "add_figure"):
        logger.experiment.add_figure(name, figure, global_step=step)
    elif hasattr(logger, "run_id") and hasattr(logger.experiment, "log_figure"):
        # no step in this call: the file name carries it
        logger.experiment.log_figure(logger.run_id, figure, f"{name}_{step:08d}.png")
