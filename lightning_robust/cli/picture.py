# SPDX-License-Identifier: Apache-2.0
"""The comparison as a picture; needs matplotlib, and is imported only where a picture is wanted."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_robust.cli.folders import METRICS

__all__ = ["draw"]

# Told apart by colour-blind readers and in grey print.
CLEAN, ATTACKED, OVER, UNDER, INK = "#3B6FB6", "#C44E52", "#E4572E", "#E9B44C", "#22303C"


def draw(rows: Sequence[dict[str, Any]], path: Path, *, attack: str | None) -> None:
    """Write bars of accuracy, the course of training, and one reliability diagram per run.

    Args:
        rows: Summaries of evaluated runs, with `name` and, where the course is wanted, `folder`.
        path: PNG file to write.
        attack: The attack, for the legend.
    """
    metric, courses = _courses(rows)
    panels = 1 + bool(courses) + len(rows)
    columns = min(panels, 4)
    lines = -(-panels // columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(lines, columns, squeeze=False).flat)
    _bars(next(axes), rows, attack)
    if courses:
        _curves(next(axes), metric, courses)
    for row in rows:
        _reliability(next(axes), row)
    for unused in axes:
        unused.set_axis_off()
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], attack: str | None) -> None:
    width = 0.38
    series = [("accuracy", "clean", CLEAN, -width / 2)]
    if attack is not None:
        series.append(("robust_accuracy", "under attack", ATTACKED, width / 2))
    for key, label, colour, shift in series:
        heights = [row["evaluation"].get(key) or 0.0 for row in rows]
        bars = axes.bar([index + shift for index in range(len(rows))], heights, width, color=colour, label=label)
        axes.bar_label(bars, labels=[f"{height:.1%}" for height in heights], fontsize=8, padding=1)
    axes.set_xticks(range(len(rows)), [_wrap(row["name"]) for row in rows], fontsize=8)
    axes.set_ylim(0, 1.24)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_title("Test accuracy", fontsize=10)
    axes.legend(loc="upper center", ncols=2, fontsize=8, frameon=False)
    _plain(axes)


def _curves(axes: Axes, metric: str, courses: Sequence[tuple[str, list[float], list[float]]]) -> None:
    for name, steps, values in courses:
        axes.plot(steps, values, label=name, linewidth=1.5)
    axes.set_title(f"{metric} while training", fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _reliability(axes: Axes, row: dict[str, Any]) -> None:
    found = row["evaluation"]
    bins = list(zip(found["bin_counts"], found["bin_accuracy"], found["bin_confidence"], strict=True))
    width = 1 / len(bins)
    most = max(found["bin_counts"])
    for index, (count, accuracy, confidence) in enumerate(bins):
        if not count:
            continue
        common = {"width": width, "align": "edge", "linewidth": 0, "alpha": 0.35 + 0.65 * (count / most) ** 0.5}
        low, high = sorted((accuracy, confidence))
        axes.bar(index * width, low, color=CLEAN, **common)
        axes.bar(index * width, high - low, bottom=low, color=OVER if confidence > accuracy else UNDER, **common)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_title(f"{row['name']}: ECE {found['ece']:.3f}, NLL {found['nll']:.3f}", fontsize=10)
    axes.set_xlabel("confidence (red: over-, yellow: under-confident, pale: few)", fontsize=8)
    axes.set_ylabel("accuracy", fontsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _wrap(name: str) -> str:
    return name.replace("-", "-\n", 1) if len(name) > 12 else name


def _courses(rows: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[str, list[float], list[float]]]]:
    """The metric that most runs have logged, of those that decided their best epoch, and its course in each run."""
    logged = {index: _metrics(row) for index, row in enumerate(rows)}
    candidates = [row["monitor"] for row in reversed(rows) if row.get("monitor")] + ["val/acc"]
    found = {}
    for metric in candidates:
        found[metric] = [
            (rows[index]["name"], *map(list, zip(*points, strict=True)))
            for index, lines in logged.items()
            if (points := [(float(line["step"]), float(line[metric])) for line in lines if line.get(metric)])
        ]
    metric = max(candidates, key=lambda candidate: len(found[candidate]))
    return metric, found[metric]


def _metrics(row: dict[str, Any]) -> list[dict[str, str]]:
    path = Path(row["folder"]) / METRICS if row.get("folder") else None
    if path is None or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
