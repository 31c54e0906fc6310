# SPDX-License-Identifier: Apache-2.0
"""Live calibration of any LightningModule: metrics for the loggers, a diagram for the eye."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_robust.calibration import reliability_figure
from lightning_robust.callbacks._calibration_files import (
    matplotlib_is_installed,
    output_folder,
    send_figure,
    write_files,
)
from lightning_robust.callbacks._calibration_view import SCORES, CalibrationView, calibration_scores, reduced_table
from lightning_robust.callbacks._evaluation_tap import EvaluationTap
from lightning_robust.callbacks._names import refuse_same_name
from lightning_robust.callbacks._terminal import Display, Terminal
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.metrics import ReliabilityTable, TopLabelReliability
from lightning_robust.training import BatchAdapter

__all__ = ["CalibrationMonitor"]

_HISTORY = 100  # values kept for the sparkline


class CalibrationMonitor(Callback):
    """Measures the calibration of any LightningModule while it validates and tests, without changing the module.

    After every validation (test) epoch it logs ``val/ece``, ``val/mce``, ``val/nll``, ``val/brier`` and
    ``val/confidence_gap`` (mean confidence minus accuracy: above zero is over-confident), or ``test/...``, so that
    loggers, `ModelCheckpoint(monitor="val/ece")` and `EarlyStopping` see them; with several dataloaders the names end
    in Lightning's ``/dataloader_idx_N``. It shows a reliability diagram in the terminal, writes
    ``reliability_val_0003.png`` and ``.csv`` (the bins) into ``calibration/`` of the log folder, and hands the figure
    to TensorBoard, W&B and MLflow loggers. The sanity check is not counted.

    It runs in ``on_validation_batch_end`` on the logits of the running step (captured, no second forward) and in
    ``on_validation_epoch_end``, before checkpoints are written. All processes take part in one reduction of 128
    integers per epoch; the result does not depend on the number of processes. Only process zero shows and writes.

    Cost: one softmax per batch, no wait for the device; a figure takes 0.2 s or more (``every_n_epochs``).

    A batch with NaN logits makes the epoch's values NaN and is warned about: a monitor does not stop a training.

    Args:
        n_bins: Number of confidence bins of equal width.
        closed: Which edge belongs to a bin: ``"right"`` for (lower, upper], ``"left"`` for [lower, upper).
        display: ``"panel"`` draws below the rich progress bar, ``"print"`` above it (keeps all epochs), ``"line"``
            writes one plain line per epoch, ``"off"`` nothing; ``"auto"`` is a panel in a terminal, else a line.
        save_figures: Whether to draw figures for files and loggers; needs ``pip install "lightning-robust[plot]"``,
            without it only the CSV is written.
        every_n_epochs: Epochs from one figure to the next; numbers, terminal and CSV come every epoch.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when not given.
        batch: How to read the labels from a batch; the usual forms are understood when not given.
        stages: Where to measure: ``"validate"``, ``"test"`` or both.
        dirpath: Folder for the files; ``calibration/`` in the Trainer's log folder when not given. Without a logger
            and a ``default_root_dir`` nothing is written.
        name: Tells this monitor from others and from what the module logs itself: ``val/NAME/ece``, and
            ``reliability_val_NAME_0003.png``.

    Raises:
        ValueError: At setup, if two monitors of one Trainer would write the same values.
        LogitsNotCaptured: At the first validation batch, if the step shows no logits; the message says what to name.

    Example:
        >>> monitor = CalibrationMonitor(n_bins=10, display="line")
        >>> trainer = L.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        n_bins: int = 15,
        closed: Literal["left", "right"] = "right",
        display: Display = "auto",
        save_figures: bool = True,
        every_n_epochs: int = 1,
        logits_from: str | None = None,
        batch: BatchAdapter | None = None,
        stages: Sequence[Literal["validate", "test"]] = ("validate", "test"),
        dirpath: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_integer("n_bins", n_bins, 1)
        check_choice("closed", closed, ("left", "right"))
        check_choice("display", display, ("auto", "panel", "print", "line", "off"))
        check_integer("every_n_epochs", every_n_epochs, 1)
        for stage in stages:
            check_choice("stages", stage, ("validate", "test"))
        self.n_bins = n_bins
        self.closed: Literal["left", "right"] = closed
        self.display = display
        self.save_figures = save_figures
        self.every_n_epochs = every_n_epochs
        self.logits_from = logits_from
        self.batch = batch if batch is not None else BatchAdapter()
        self.stages = tuple(stages)
        self.dirpath = None if dirpath is None else str(dirpath)
        self.name = name
        # Not in the module tree: neither its dtype, its checkpoint nor DDP concern the sums.
        self._metrics: list[TopLabelReliability] = []  # one per dataloader of the running stage, else empty
        self._tap: EvaluationTap | None = None
        self._terminal = Terminal(display)
        self._folder: Path | None = None
        self._history: dict[str, list[float]] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            name=self.name, logits_from=self.logits_from, n_bins=self.n_bins, closed=self.closed, stages=self.stages
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(values) for name, values in self._history.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = {name: list(values) for name, values in state_dict["history"].items()}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_same_name(trainer, self, lambda other: bool(set(other.stages) & set(self.stages)))
        self._folder = output_folder(trainer, self.dirpath)
        self._terminal.forget()
        if self.save_figures and not matplotlib_is_installed():
            rank_zero_info('CalibrationMonitor draws figures after pip install "lightning-robust[plot]"')

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "validate" in self.stages:
            loaders = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._begin(pl_module, "validation_step", len(loaders))

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "test" in self.stages:
            self._begin(pl_module, "test_step", len(trainer.num_test_batches))

    def _begin(self, pl_module: L.LightningModule, step: str, loaders: int) -> None:
        self._end()
        self._tap = EvaluationTap(pl_module, step, self.logits_from)
        self._tap.attach()
        metrics = (TopLabelReliability(n_bins=self.n_bins, closed=self.closed) for _ in range(loaders))
        self._metrics = [metric.to(pl_module.device) for metric in metrics]

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._tap is not None:  # also in the sanity check: missing logits and wrong labels are found early
            self._terminal.keep(trainer)
            logits = self._tap.take()
            labels = self.batch.target_of(batch)
            self._metrics[dataloader_idx].update(logits, labels.to(logits.device))

    on_test_batch_end = on_validation_batch_end

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._terminal.keep(trainer)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    on_test_end = on_validation_end

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._tap is not None:
            self._tap.detach()
            self._tap = None
        self._metrics = []

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        stage = stage if self.name is None else f"{stage}/{self.name}"
        views = []
        for index, metric in enumerate(self._metrics):
            loader = f"/dataloader_idx_{index}" if len(self._metrics) > 1 else ""
            table = reduced_table(metric, stage + loader)
            scores = dict.fromkeys(SCORES, math.nan) if table is None else calibration_scores(table)
            for name, value in scores.items():
                # equal in all processes already; sync_dist only tells Lightning that nothing is missing
                pl_module.log(f"{stage}/{name}{loader}", value, sync_dist=True, add_dataloader_idx=False)
            if table is not None and trainer.is_global_zero:
                views.append(self._view(trainer, table, stage + loader, scores))
                self._save(trainer, table, stage, loader)
        if trainer.is_global_zero:
            self._terminal.show(trainer, views)

    def _view(
        self, trainer: L.Trainer, table: ReliabilityTable, name: str, scores: dict[str, float]
    ) -> CalibrationView:
        history = [scores["ece"]]
        if trainer.state.fn == TrainerFn.FITTING:
            history = self._history[name] = [*self._history.get(name, []), scores["ece"]][-_HISTORY:]
            name = f"{name} · epoch {trainer.current_epoch}"
        return CalibrationView.of(table, title=name, scores=scores, history=history)

    def _save(self, trainer: L.Trainer, table: ReliabilityTable, stage: str, loader: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by the constructor, missing from annotations
            return
        fitting, epoch = trainer.state.fn == TrainerFn.FITTING, trainer.current_epoch
        name = f"reliability_{stage}{loader}_{epoch:04d}".replace("/", "_")
        figure = None
        if self.save_figures and matplotlib_is_installed() and not (fitting and epoch % self.every_n_epochs):
            title = f"Reliability · {stage}{loader}" + (f" · epoch {epoch}" if fitting else "")
            figure = reliability_figure(table, title=title)
            send_figure(trainer.loggers, f"{stage}/reliability{loader}", figure, trainer.global_step)
        if self._folder is not None:
            write_files(self._folder / name, table, figure)
