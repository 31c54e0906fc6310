# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its folder while it trains: metrics, checkpoints, and the time that training took."""

import csv
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lightning_robust.cli.folders import CHECKPOINTS, METRICS

__all__ = ["BEST", "LAST", "RESUMABLE", "RunLogger", "TrainingClock", "run_checkpoints"]

BEST, LAST = "best.ckpt", "last.ckpt"
#: Whole training states; the one with the most steps is continued.
RESUMABLE = (LAST, "recent.ckpt")
_INTERVAL = timedelta(seconds=60)


def run_checkpoints(folder: Path, monitor: str, mode: str) -> list[ModelCheckpoint]:
    """Checkpoints of a run: the best epoch, the last epoch, and one a minute for runs that are killed in mid-epoch.

    Args:
        folder: The run folder.
        monitor: Metric that decides which epoch is best.
        mode: ``"max"`` or ``"min"``.
    """
    common: dict[str, Any] = {
        "dirpath": folder / CHECKPOINTS,
        "save_top_k": 1,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    return [
        ModelCheckpoint(filename="best", monitor=monitor, mode=mode, save_weights_only=True, **common),
        ModelCheckpoint(filename="recent", train_time_interval=_INTERVAL, **common),
        ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common),
    ]


class TrainingClock(Callback):
    """Seconds spent in training steps and the hooks around them, without validation, over all resumptions.

    Example:
        >>> TrainingClock().seconds
        0.0
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None  # None while the clock stands still

    def _start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._start()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return {"seconds": self.seconds + running}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` into the run folder, and goes on with it after a resumption.

    Args:
        folder: The run folder.
        keep_below: Keep the rows of an existing file up to this step, exclusive; none by default.
    """

    def __init__(self, folder: Path, *, keep_below: int = 0) -> None:
        super().__init__(folder, name="", version="")
        self._folder = folder
        self._keep_below = keep_below

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            kept = self._earlier_rows()
            (self._folder / METRICS).unlink(missing_ok=True)
            with warnings.catch_warnings():
                # The folder is ours and holds the configuration already; nothing of value is deleted.
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                self._experiment = ExperimentWriter(log_dir=self.log_dir)
            self._experiment.metrics.extend(kept)
        return self._experiment  # type: ignore[return-value]

    def _earlier_rows(self) -> list[dict[str, Any]]:
        path = self._folder / METRICS
        if self._keep_below == 0 or not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        # Steps after the checkpoint are trained, and logged, once more.
        return [
            {key: value for key, value in row.items() if value} for row in rows if int(row["step"]) < self._keep_below
        ]
