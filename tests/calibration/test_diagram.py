# SPDX-License-Identifier: Apache-2.0
"""Reliability rows and figures."""

import math
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from lightning_robust.calibration import reliability_figure, reliability_rows
from lightning_robust.metrics import TopLabelReliability, reliability_table


@pytest.fixture
def table():
    confidence = torch.tensor([0.1, 0.55, 0.6, 0.95, 0.95, 0.95])
    return reliability_table(confidence, torch.tensor([1, 0, 1, 1, 1, 0]), n_bins=4)


def test_rows(table):
    rows = reliability_rows(table)
    assert [row["bin"] for row in rows] == [0, 1, 2, 3]
    assert [(row["lower"], row["upper"]) for row in rows] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert [row["count"] for row in rows] == [1, 0, 2, 3]
    assert [row["correct"] for row in rows] == [1, 0, 1, 2]
    assert rows[0]["gap"] == pytest.approx(-0.9)
    assert math.isnan(rows[1]["accuracy"])
    assert math.isnan(rows[1]["gap"])
    assert rows[3]["gap"] == pytest.approx(0.95 - 2 / 3)
    ece = sum(row["count"] * abs(row["gap"]) for row in rows if row["count"]) / 6
    assert ece == pytest.approx(table.error("l1").item())


def test_rows_of_one_bin():
    metric = TopLabelReliability(n_bins=1)
    metric.update(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    (row,) = reliability_rows(metric.compute())  # torchmetrics squeezes the single entry to a scalar
    assert row["count"] == 4
    assert row["gap"] == 0.0


def bars(figure):
    return [(patch.get_y(), patch.get_height()) for patch in figure.axes[0].patches]


def test_the_figure_shows_the_numbers(table, tmp_path):
    figure = reliability_figure(table, title="val, epoch 3")
    assert figure.get_suptitle() == "val, epoch 3"
    text = figure.axes[0].texts[0].get_text()
    assert f"ECE   {table.error('l1').item():6.3f}" in text
    assert "NLL" not in text  # unknown when only confidences are
    assert "over" in text
    # two bars per non-empty bin: up to the lower of accuracy and confidence, then the gap
    assert bars(figure)[0] == (0, pytest.approx(0.1))
    assert bars(figure)[1] == (pytest.approx(0.1), pytest.approx(0.9))
    assert len(bars(figure)) == 6
    assert sum(patch.get_height() for patch in figure.axes[1].patches) == pytest.approx(100)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_figure_of_nothing(tmp_path):
    figure = reliability_figure(reliability_table(torch.zeros(0), torch.zeros(0)))
    figure.savefig(tmp_path / "empty.png")


def test_pyplot_does_not_keep_the_figure(table):
    before = plt.get_fignums()
    reliability_figure(table)
    assert plt.get_fignums() == before


def test_a_missing_matplotlib_names_the_extra(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-robust\[plot\]\""):
        reliability_figure(table)
