# SPDX-License-Identifier: Apache-2.0
"""What a robustness evaluation shows in the terminal, and the files it leaves."""

import time
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import RenderableType

from lightning_robust.callbacks._calibration_files import matplotlib_is_installed, send_figure
from lightning_robust.callbacks._terminal import MIN_ROWS, Terminal, rich_progress
from lightning_robust.evaluation import RobustnessEvaluator, RobustnessReport, report_view, robustness_figure
from lightning_robust.evaluation.progress import progress_view

__all__ = ["EvaluationDisplay", "RobustDisplay", "write_report"]

RobustDisplay = Literal["auto", "line", "off"]

_PANEL_EVERY_S, _LINE_EVERY_S = 0.5, 10.0


class EvaluationDisplay:
    """Progress below Lightning's rich bar or as a plain line from time to time, and the report at the end.

    Args:
        trainer: The running Trainer; only its process of global rank zero shows anything.
        display: ``"auto"``, ``"line"`` for plain lines only, or ``"off"``.
    """

    def __init__(self, trainer: L.Trainer, display: RobustDisplay) -> None:
        self._trainer = trainer
        self._display = display if trainer.is_global_zero else "off"
        self._live = Terminal("panel")
        self._lines = Terminal("line")
        self._shown = time.monotonic()

    def __call__(self, evaluator: RobustnessEvaluator) -> None:
        """Show how far an evaluator is, if it is time.

        Args:
            evaluator: The evaluator.
        """
        if self._display == "off":
            return
        now, live = time.monotonic(), self._has_panel()
        if now - self._shown < (_PANEL_EVERY_S if live else _LINE_EVERY_S):
            return
        view = progress_view(evaluator)
        if view is None:
            return
        self._shown = now
        (self._live if live else self._lines).show(self._trainer, [view])
        bar = self._trainer.progress_bar_callback
        if live and isinstance(bar, RichProgressBar):
            bar.refresh()

    def report(self, report: RobustnessReport) -> None:
        """Show the report.

        Args:
            report: The report.
        """
        self._live.forget()
        if self._display != "off":
            Terminal("print" if self._display == "auto" else "line").show(self._trainer, [_ReportView(report)])

    def forget(self) -> None:
        """Show no progress any more."""
        self._live.forget()

    def _has_panel(self) -> bool:
        """Whether there is a bar, and room below it."""
        progress = rich_progress(self._trainer)
        if self._display != "auto" or progress is None:
            return False
        console = progress.console
        return bool(console.is_terminal and not console.is_dumb_terminal and console.height >= MIN_ROWS)


class _ReportView:
    def __init__(self, report: RobustnessReport) -> None:
        self._report = report

    def panel(self, width: int, *, unicode: bool = True) -> RenderableType | None:
        return report_view(self._report)

    def line(self, *, unicode: bool = True) -> str:
        report = self._report
        return (
            f"{report.model}: clean {report.clean_accuracy:.2%}, robust {report.robust_accuracy:.2%} of "
            f"{report.samples} samples, {len(report.warnings)} of {len(report.checks)} sanity checks warn"
        )


def write_report(trainer: L.Trainer, report: RobustnessReport, folder: Path | None, name: str) -> None:
    """Write a report as JSON and PNG and hand the figure to the loggers; a full disk is warned about.

    Args:
        trainer: The Trainer.
        report: The report.
        folder: Where to; nowhere if ``None``.
        name: Name of the files, without ending, and of the figure.
    """
    figure = robustness_figure(report) if matplotlib_is_installed() else None
    if figure is not None:
        send_figure(trainer.loggers, name, figure, trainer.global_step)
    if folder is None:
        return
    try:
        path = report.save(folder / f"{name.replace('/', '_')}.json")
        if figure is not None:
            figure.savefig(path.with_suffix(".png"), format="png", dpi=120)
    except OSError as error:
        rank_zero_warn(f"The robustness report could not be written to {folder}: {error!r}")
