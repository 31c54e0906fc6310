# SPDX-License-Identifier: Apache-2.0
"""How far an evaluation is: attack, samples left, robust accuracy so far, remaining time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from torch import Tensor

from lightning_robust.evaluation.book import Book
from lightning_robust.evaluation.evaluator import RobustnessEvaluator
from lightning_robust.evaluation.queues import StageQueue

__all__ = ["ProgressView", "RobustnessProgress", "StageState", "progress_view"]


@dataclass(frozen=True)
class StageState:
    """How far a stage is.

    Args:
        name: Attack and stage.
        attacked: Samples that it has attacked.
        broken: Samples that it has broken.
        left: Samples that it will still have to attack, as far as can be foreseen.
    """

    name: str
    attacked: int
    broken: int
    left: int


@dataclass(frozen=True)
class ProgressView:
    """The state of an evaluation in one process, as a panel or as one line.

    Args:
        stages: All stages in order.
        seen: Samples that were fed.
        total: Samples that will be, if known.
        robust: Share of the seen samples that nothing has broken so far; it only falls for each of them.
        remaining: Seconds to the end, if they can be estimated.
    """

    stages: tuple[StageState, ...]
    seen: int
    total: int | None
    robust: float
    remaining: float | None

    def line(self, *, unicode: bool = True) -> str:
        """Everything in one line.

        Args:
            unicode: Whether the terminal shows more than ASCII.
        """
        dot = " · " if unicode else ", "
        working = [f"{stage.name}: {stage.attacked} attacked, {stage.left} left" for stage in self.stages if stage.left]
        return dot.join([self._summary(), *working[:2]])

    def panel(self, width: int, *, unicode: bool = True) -> Panel | None:
        """A panel with one row per stage, or ``None`` if that is too narrow.

        Args:
            width: Columns of the terminal.
            unicode: Whether the terminal shows more than ASCII.
        """
        if width < 50:
            return None
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("stage", style="cyan", no_wrap=True, overflow="ellipsis")
        for heading in ("attacked", "broken", "left"):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            table.add_row(stage.name, str(stage.attacked), str(stage.broken), str(stage.left))
        frame = box.ROUNDED if unicode else box.ASCII
        return Panel(table, title=self._summary(), title_align="left", box=frame, width=min(width, 100))

    def _summary(self) -> str:
        total = "" if self.total is None else f"/{self.total}"
        remaining = "" if self.remaining is None else f", {timedelta(seconds=round(self.remaining))} remaining"
        return f"{self.seen}{total} samples, robust so far {self.robust:.1%}{remaining}"


def progress_view(evaluator: RobustnessEvaluator) -> ProgressView | None:
    """How far an evaluator is; ``None`` before its first sample.

    Args:
        evaluator: The evaluator.
    """
    book = evaluator.book
    if book is None or not evaluator.fed:
        return None
    rows = None if len(book.ledger) == len(evaluator.fed) else book.ledger.rows_of(evaluator.fed)
    columns = book.ledger.columns(rows)
    right = columns["prediction"] == columns["label"]
    coming = 0.0 if evaluator.total is None else max(evaluator.total - len(right), 0) * float(right.double().mean())
    stages, seconds = [], 0.0
    per_pass = _seconds_per_pass(book)
    for number, chain in enumerate(book.chains):
        arriving = coming
        for queue in chain:
            state, left, kept = _stage(queue, right, columns["done"][:, number], columns["broken"][:, number], arriving)
            stages.append(state)
            seconds += left * _seconds_per_sample(queue, per_pass)
            arriving = left * kept
    known = evaluator.total is not None and per_pass is not None
    robust = right & (columns["broken"] < 0).all(1)
    return ProgressView(
        tuple(stages), len(right), evaluator.total, float(robust.double().mean()), seconds if known else None
    )


class RobustnessProgress:
    """Shows how far an evaluation is: a live panel in a terminal, else a plain line from time to time.

    Args:
        console: Where to show; standard output when not given.
        every_s: Seconds from one plain line to the next.
        clock: Tells the time.

    Example:
        >>> with RobustnessProgress(every_s=60.0) as progress:
        ...     pass  # RobustnessEvaluator(..., progress=progress)
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = Console() if console is None else console
        self.every_s = every_s
        self._clock = clock
        self._shown = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, evaluator: RobustnessEvaluator) -> None:
        """Show the state if it is time.

        Args:
            evaluator: The evaluator.
        """
        now = self._clock()
        if now - self._shown < (self.every_s if self._live is None else 0.25):
            return
        view = progress_view(evaluator)
        if view is None:
            return
        self._shown = now
        unicode = self.console.encoding.lower().startswith("utf")
        panel = view.panel(self.console.width, unicode=unicode)
        if self._live is not None:
            self._live.update(panel if panel is not None else view.line(unicode=unicode), refresh=True)
        else:
            self.console.print(view.line(unicode=unicode), soft_wrap=True, highlight=False, markup=False)


def _stage(
    queue: StageQueue, right: Tensor, done: Tensor, broken: Tensor, arriving: float
) -> tuple[StageState, float, float]:
    """The state of a stage, the samples that it has still to attack, and the share that it leaves robust."""
    position, info = queue.stage.info.position, queue.stage.info
    here = int((right & (broken == position)).sum())
    passed = int((right & (done > position)).sum())
    waiting = int((right & (broken < 0) & (done == position)).sum())
    left = waiting + arriving
    name = info.name if info.name == info.attack else f"{info.attack}/{info.name}"
    kept = passed / (here + passed) if here + passed else 1.0
    return StageState(name, here + passed, here, round(left)), left, kept


def _seconds_per_pass(book: Book) -> float | None:
    passes = sum(queue.tally.total.entered * queue.stage.attack.passes for queue in book.queues)
    return sum(queue.tally.total.seconds for queue in book.queues) / passes if passes else None


def _seconds_per_sample(queue: StageQueue, per_pass: float | None) -> float:
    tally = queue.tally.total
    if tally.entered:
        return tally.seconds / tally.entered
    return queue.stage.attack.passes * (per_pass or 0.0)
