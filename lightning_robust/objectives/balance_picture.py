# SPDX-License-Identifier: Apache-2.0
"""How the balances of a multi-teacher objective moved during training, as a picture."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an optional dependency, and nothing that a config builds
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["balance_figure"]

# Told apart by colour-blind readers and in grey print.
_COLOURS, _INK, _GRID = {"clean": "#3B6FB6", "robust": "#C44E52"}, "#22303C", "#D9DEE4"
_PANELS = {
    "weight": "weight of each loss",
    "temperature": "temperature of each teacher",
    "loss": "loss before its weight",
    "entropy": "entropy of each teacher (nats)",
}

Rows = Iterable[Mapping[str, object]]


def balance_figure(metrics: str | Path | Rows, *, prefix: str = "train/mtard_", title: str | None = None) -> "Figure":
    """Draw weights, temperatures, losses and entropies of :class:`MTARD` over the epochs, from what a run has logged.

    Panels of which nothing was logged are left out, as those of the temperatures without ``temperature_balance``.
    The figure is not registered with pyplot: nothing has to be closed, no window opens.

    Args:
        metrics: ``metrics.csv`` of a run (of Lightning's ``CSVLogger``), the folder that holds it, or its rows.
        prefix: what the names of the metrics have in front.
        title: title of the figure.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: matplotlib is missing: ``pip install "lightning-robust[plot]"``.
        ValueError: there are no such metrics.

    Example:
        >>> rows = [{"epoch": 0, "train/mtard_clean_weight": 0.5}, {"epoch": 1, "train/mtard_clean_weight": 0.48}]
        >>> balance_figure(rows).savefig("balance.png")  # doctest: +SKIP
    """
    lines = _lines(list(_rows(metrics)), prefix)
    if not lines:
        raise ValueError(
            f"Expected metrics like {prefix}clean_weight but there are none; train with MTARD and a logger."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'A picture of the balances needs matplotlib; install it with: pip install "lightning-robust[plot]"'
        ) from error
    height = (len(lines) + 1) // 2
    figure = Figure(figsize=(9 if len(lines) > 1 else 5, 3 * height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(height, min(len(lines), 2), squeeze=False, sharex=True).ravel()
    for axes, (quantity, curves) in zip(panels, lines.items(), strict=False):
        _panel(axes, quantity, curves)
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    if title is not None:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def _rows(metrics: str | Path | Rows) -> Rows:
    if not isinstance(metrics, str | Path):
        return metrics
    path = Path(metrics)
    path = path / "metrics.csv" if path.is_dir() else path
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _lines(rows: list[Mapping[str, object]], prefix: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points (epoch, value) by quantity and teacher, without those that nothing is known of."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for quantity in _PANELS:
        for kind in _COLOURS:
            name = f"{prefix}{kind}_{quantity}"
            points = [
                (float(str(row.get("epoch", place))), float(str(row[name])))
                for place, row in enumerate(rows)
                if row.get(name) not in (None, "")
            ]
            if points:
                lines.setdefault(quantity, {})[kind] = points
    return lines


def _panel(axes: "Axes", quantity: str, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for kind, points in curves.items():
        epochs, values = zip(*points, strict=True)
        marker = "o" if len(points) < 20 else ""  # a run of one epoch is a point
        axes.plot(epochs, values, color=_COLOURS[kind], marker=marker, markersize=3, linewidth=1.5)
    for kind, height in zip(curves, _apart([points[-1][1] for points in curves.values()], axes), strict=True):
        axes.annotate(
            kind,
            (1.02, height),
            xycoords=("axes fraction", "data"),
            color=_COLOURS[kind],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
    axes.set_title(_PANELS[quantity], fontsize=9, color=_INK, loc="left")
    axes.set_xlabel("epoch", fontsize=8)
    axes.tick_params(labelsize=8, length=0, labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _apart(heights: list[float], axes: "Axes") -> list[float]:
    """Where to write the names of two curves that may end at the same height."""
    low, high = axes.get_ylim()
    least = 0.09 * (high - low)
    if len(heights) == 2 and abs(heights[0] - heights[1]) < least:
        middle, sign = sum(heights) / 2, 1 if heights[0] >= heights[1] else -1
        return [middle + sign * least / 2, middle - sign * least / 2]
    return heights
