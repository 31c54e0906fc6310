# SPDX-License-Identifier: Apache-2.0
"""A reliability diagram made of terminal characters, with the numbers beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_utilities.core.rank_zero import rank_zero_warn
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from lightning_robust.metrics import ReliabilityTable, TopLabelReliability

__all__ = ["SCORES", "CalibrationView", "calibration_scores", "reduced_table"]

#: What is logged and shown of a bin table.
SCORES = ("ece", "mce", "confidence_gap", "nll", "brier")

_HEIGHT = 6  # rows of the diagram, eight levels each
_AXIS = 6  # columns of the vertical axis
_NUMBERS = 24  # columns of the numbers, two spaces before them included
_TOLERANCE = 0.05  # a gap below this counts as calibrated
_SPARSE = 0.01  # bins with a smaller share of the samples are dim
_SHORT = {"confidence_gap": "gap"}
_LAYOUTS = ((2, 1), (2, 0), (1, 1), (1, 0))  # characters per bin and between bins, widest first


def calibration_scores(table: ReliabilityTable) -> dict[str, float]:
    """The `SCORES` of a bin table.

    Args:
        table: Bin table, best on the CPU: every number is read.
    """
    values = (table.error("l1"), table.error("max"), table.confidence_gap, table.nll, table.brier)
    return {name: value.item() for name, value in zip(SCORES, values, strict=True)}


def reduced_table(metric: TopLabelReliability, where: str) -> ReliabilityTable | None:
    """The bins of all processes on the CPU, or None if they are spoilt; the one place that waits for the device.

    Args:
        metric: What was counted in this process.
        where: What the warning about spoilt bins calls it.
    """
    with metric.sync_context():
        rows, _ = metric.refused()
        if rows:
            rank_zero_warn(
                f"{rows} rows of the logits of {where} contain NaN or +inf; their calibration is logged as NaN."
            )
            return None
        return ReliabilityTable(*(column.cpu() for column in metric.table()))


@dataclass(frozen=True)
class _Glyphs:
    levels: str  # nine fillings of one character, from empty to full
    marker: str
    corner: str
    side: str
    base: str
    up: str
    down: str
    box: box.Box


_UNICODE = _Glyphs(" ▁▂▃▄▅▆▇█", "─", "└", "│", "─", "▲", "▼", box.ROUNDED)
_ASCII = _Glyphs(" ..::==##", "-", "+", "|", "-", "^", "v", box.ASCII)


@dataclass(frozen=True)
class CalibrationView:
    """What is shown of one bin table: plain numbers only, so that any thread may draw it.

    Args:
        title: What was measured, for example ``"val · epoch 3"``.
        counts: Samples per bin.
        accuracy: Accuracy per bin, NaN where empty.
        confidence: Mean confidence per bin, NaN where empty.
        scores: Name and value of the numbers beside the diagram.
        history: Earlier values of the first score and the current one, oldest first.
    """

    title: str
    counts: tuple[int, ...]
    accuracy: tuple[float, ...]
    confidence: tuple[float, ...]
    scores: tuple[tuple[str, float], ...]
    history: tuple[float, ...]

    @classmethod
    def of(
        cls, table: ReliabilityTable, *, title: str, scores: dict[str, float], history: Sequence[float]
    ) -> "CalibrationView":
        """Read a bin table.

        Args:
            table: Bin table on the CPU.
            title: What was measured.
            scores: Its `calibration_scores`.
            history: Earlier values of the first score and the current one.
        """

        def plain(column: Tensor) -> tuple[float, ...]:
            return tuple(column.reshape(-1).tolist())

        shown = {_SHORT.get(name, name): value for name, value in scores.items()}
        shown |= {"acc": table.overall_accuracy.item(), "conf": table.mean_confidence.item()}
        counts = tuple(int(count) for count in plain(table.counts))
        return cls(title, counts, plain(table.accuracy), plain(table.confidence), tuple(shown.items()), tuple(history))

    @property
    def total(self) -> int:
        """Number of samples."""
        return sum(self.counts)

    def line(self, *, unicode: bool = True) -> str:
        """Everything in one line, for log files and narrow terminals."""
        glyphs = _UNICODE if unicode else _ASCII
        scores = "  ".join(f"{name} {_number(name, value)}" for name, value in self.scores)
        title = self.title if unicode else self.title.replace("·", "-")
        return f"{title}  {scores}  n {self.total}  |{_spark(self.counts, glyphs.levels)}|"

    def panel(self, width: int, *, unicode: bool = True) -> Panel | None:
        """The diagram with its numbers, or None if ``width`` columns are too few for it."""
        available = width - _AXIS - _NUMBERS - 4  # two borders with a space each
        layout = next((pair for pair in _LAYOUTS if sum(pair) * len(self.counts) <= available), None)
        if layout is None:
            return None
        glyphs = _UNICODE if unicode else _ASCII
        left, right = self._diagram(*layout, glyphs), self._numbers(glyphs)
        lines = [Text.assemble(a, "  ", b) for a, b in zip(left, right, strict=True)]
        separator = "·" if unicode else "-"
        title = f"calibration {separator} {self.title.replace('·', separator)} {separator} n {self.total:,}"
        return Panel(
            Group(*lines),
            box=glyphs.box,
            expand=False,
            title=title,
            title_align="left",
            subtitle="[red]over[/]-confident  [yellow]under[/]-confident  [green]calibrated[/]  [dim]few samples[/]",
            subtitle_align="left",
        )

    def _diagram(self, cell: int, gap: int, glyphs: _Glyphs) -> list[Text]:
        width = (cell + gap) * len(self.counts)
        lines = []
        for row in reversed(range(_HEIGHT)):
            label = {_HEIGHT - 1: "1.0", _HEIGHT // 2 - 1: "0.5"}.get(row, "")
            line = Text(f"{label:>4} ", style="dim", no_wrap=True)
            line.append(glyphs.side, style="dim")
            for index in range(len(self.counts)):
                line.append(*self._cell(index, row, cell, glyphs))
                line.append(" " * gap)
            lines.append(line)
        lines.append(Text(f"{'':5}{glyphs.corner}{glyphs.base * width}", style="dim", no_wrap=True))
        density = Text(f"{'n':>4}  ", style="dim", no_wrap=True)
        for level in _spark(self.counts, glyphs.levels):
            density.append(level * cell, style="blue")
            density.append(" " * gap)
        lines.append(density)
        middle = "confidence".center(width - 2) if width >= 14 else " " * (width - 2)
        lines.append(Text(f"{'':6}0{middle}1", style="dim", no_wrap=True))
        return lines

    def _cell(self, index: int, row: int, cell: int, glyphs: _Glyphs) -> tuple[str, str]:
        if not self.counts[index]:
            return " " * cell, ""
        accuracy, confidence = self.accuracy[index], self.confidence[index]
        gap = confidence - accuracy
        colour = "green" if abs(gap) <= _TOLERANCE else "red" if gap > 0 else "yellow"
        weight = "dim" if self.counts[index] < _SPARSE * self.total else "bold"
        level = min(max(round(accuracy * _HEIGHT * 8) - 8 * row, 0), 8)
        marked = row == min(int(confidence * _HEIGHT), _HEIGHT - 1) and level in (0, 8)
        if marked:
            return glyphs.marker * cell, f"{weight} {colour}" if level == 0 else f"black on {colour}"
        return glyphs.levels[level] * cell, f"{weight if level else 'not bold'} {colour}"

    def _numbers(self, glyphs: _Glyphs) -> list[Text]:
        lines = []
        for name, value in self.scores:
            line = Text(f"{name:>7} ", style="dim", no_wrap=True)
            style = "bold" if name == self.scores[0][0] else ""
            line.append(f"{_number(name, value):>8}", style=f"not dim {style}")
            if name == "gap":
                over = value > 0
                line.append(" over" if over else " under", style="not dim red" if over else "not dim yellow")
            lines.append(line)
        if len(self.history) > 1 and self.history[-1] != self.history[-2]:
            worse = self.history[-1] > self.history[-2]
            lines[0].append(
                f" {glyphs.up if worse else glyphs.down}", style="not dim red" if worse else "not dim green"
            )
        if len(self.history) > 1:
            lines += [Text("")] * (_HEIGHT + 1 - len(lines))
            lines.append(Text(f"    {self.scores[0][0]} by epoch", style="dim", no_wrap=True))
            lines.append(Text(f"    {_spark(self.history[6 - _NUMBERS :], glyphs.levels)}", style="cyan", no_wrap=True))
        return lines + [Text("")] * (_HEIGHT + 3 - len(lines))


def _number(name: str, value: float) -> str:
    return f"{value:+.4f}" if name == "gap" else f"{value:.4f}"


def _spark(values: Sequence[float], levels: str) -> str:
    """One character per value, relative to the largest; what is not empty is seen."""
    known = [value for value in values if math.isfinite(value)]
    top = max(known, default=0.0)
    return "".join(
        levels[max(1, round(8 * value / top))] if math.isfinite(value) and value > 0 else levels[0] for value in values
    )
