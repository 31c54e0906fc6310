# SPDX-License-Identifier: Apache-2.0
"""The diagram of characters."""

import io
import math

import pytest
import torch
from rich.console import Console

from lightning_robust.callbacks._calibration_view import CalibrationView, calibration_scores
from lightning_robust.metrics import TopLabelReliability, reliability_table


def view(confidence, correct, n_bins=10, history=(0.2,)):
    table = reliability_table(torch.tensor(confidence), torch.tensor(correct), n_bins=n_bins)
    return CalibrationView.of(table, title="val · epoch 3", scores=calibration_scores(table), history=history)


def drawn(panel, width=100, colour=None):
    console = Console(file=io.StringIO(), width=width, force_terminal=colour is not None, color_system=colour)
    console.print(panel)
    return console.file.getvalue().splitlines()


def column(lines, index, cell=3, axis=8):
    """The characters of one bin from top to bottom; two for the border and six for the axis come first."""
    return [line[axis + index * cell] for line in lines[1:7]]


def test_bars_are_the_accuracy_and_dashes_the_confidence():
    lines = drawn(view([0.95] * 4, [1, 1, 0, 0]).panel(100))
    assert column(lines, 9) == ["─", " ", " ", "█", "█", "█"]  # over-confident: 0.5 right at confidence 0.95
    assert column(lines, 3) == [" "] * 6  # an empty bin
    lines = drawn(view([0.45] * 4, [1, 1, 1, 1]).panel(100))
    assert column(lines, 4) == ["█", "█", "█", "─", "█", "█"]  # under-confident: the dash is inside the bar
    assert "calibration · val · epoch 3 · n 4" in lines[0]
    assert "+" not in "".join(lines)
    assert "under" in "".join(lines)


@pytest.mark.parametrize(
    ("confidence", "correct", "colour"), [(0.95, [1, 0], "31"), (0.45, [1, 1], "33"), (0.5, [1, 0], "32")]
)
def test_colours_are_the_sign_of_the_gap(confidence, correct, colour):
    panel = view([confidence] * 2, correct).panel(100)
    row = next(line for line in drawn(panel, colour="standard")[2:] if "█" in line)
    assert f";{colour}m" in row


def test_ascii_uses_ascii_only():
    shown = view([0.95, 0.45, 0.7], [1, 0, 1], history=(0.1, 0.3, 0.2))
    text = "\n".join(drawn(shown.panel(100, unicode=False))) + shown.line(unicode=False)
    assert text.isascii()
    assert "#" in text


@pytest.mark.parametrize("width", [120, 100, 76, 70, 60, 48])
@pytest.mark.parametrize("n_bins", [1, 10, 15, 30])
def test_never_wider_than_asked(width, n_bins):
    panel = view([0.95, 0.45, 0.7], [1, 0, 1], n_bins=n_bins, history=(0.1,) * 60).panel(width)
    if panel is not None:
        lines = drawn(panel, width=300)
        assert max(map(len, lines)) <= width
        assert len(lines) == 11


def test_too_narrow_is_none():
    assert view([0.9], [1], n_bins=15).panel(40) is None


def test_history():
    rising = "\n".join(drawn(view([0.9], [1], history=(0.1, 0.2)).panel(100)))
    assert "ece by epoch" in rising
    assert "▲" in rising
    assert "▄█" in rising
    assert "▼" in "\n".join(drawn(view([0.9], [1], history=(0.2, 0.1)).panel(100)))
    assert "by epoch" not in "\n".join(drawn(view([0.9], [1]).panel(100)))
    assert "█ " in "\n".join(drawn(view([0.9], [1], history=(0.2, math.nan, 0.1)).panel(100)))


def test_line():
    line = view([0.9, 0.9], [1, 0]).line()
    assert line.startswith("val · epoch 3  ece 0.4000  mce 0.4000  gap +0.4000  nll nan")
    assert line.endswith("n 2  |        █ |")


def test_nothing_measured():
    metric = TopLabelReliability()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    table = metric.compute()
    shown = CalibrationView.of(table, title="val", scores=calibration_scores(table), history=())
    assert "nan" in shown.line()
    assert shown.panel(100) is not None
