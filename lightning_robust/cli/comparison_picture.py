# SPDX-License-Identifier: Apache-2.0
"""A comparison as a picture; needs matplotlib, and is imported only where a picture is wanted."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_robust.cli.comparison_report import statistics
from lightning_robust.cli.quantities import QUANTITIES

__all__ = ["draw_comparison"]

# Told apart by colour-blind readers and in grey print.
COLOURS = ("#3B6FB6", "#E4572E", "#2E933C", "#8E5EA2", "#C99700", "#22303C", "#5DA9C7", "#B0508A")
COLUMNS = 4


def draw_comparison(summary: dict[str, Any], path: Path) -> None:
    """Write one small panel per quantity: a point per seed, and a line at the mean.

    Args:
        summary: Summary of a comparison.
        path: PNG file to write.
    """
    block = summary["comparison"]
    names, values = block["quantities"], block["values"]
    found = statistics(values, names)
    columns = min(len(names), COLUMNS)
    lines = -(-len(names) // columns)
    width = max(2.6, 0.5 * len(values))
    figure = Figure(figsize=(width * columns, 2.5 * lines + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{summary['recipe']}: one point per seed, line at the mean", fontsize=11)
    axes = iter(figure.subplots(lines, columns, squeeze=False).flat)
    for name in names:
        _panel(next(axes), name, values, {arm: each[name]["mean"] for arm, each in found.items()})
    for unused in axes:
        unused.set_axis_off()
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, name: str, values: Any, means: dict[str, float | None]) -> None:
    quantity = QUANTITIES[name]
    for position, (arm, seeds) in enumerate(values.items()):
        colour = COLOURS[position % len(COLOURS)]
        known = [each[name] * quantity.factor for each in seeds.values() if each.get(name) is not None]
        # next to each other, so that equal values do not hide behind one another
        shifts = [0.3 * (index / max(len(known) - 1, 1) - 0.5) for index in range(len(known))]
        axes.plot([position + shift for shift in shifts], known, "o", color=colour, markersize=4, alpha=0.8)
        mean = means[arm]
        if mean is not None:
            axes.hlines(mean * quantity.factor, position - 0.3, position + 0.3, color=colour, linewidth=2)
    axes.set_xticks(range(len(values)), list(values), fontsize=8, rotation=30 if len(values) > 4 else 0)
    axes.set_xlim(-0.6, len(values) - 0.4)
    arrow = {"higher": " (higher is better)", "lower": " (lower is better)"}.get(quantity.better, "")
    axes.set_title(quantity.label + arrow, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
