# SPDX-License-Identifier: Apache-2.0
"""A robustness report as a picture."""

import math
from typing import TYPE_CHECKING

from lightning_robust.evaluation.report import RobustnessReport

if TYPE_CHECKING:  # an optional dependency, and nothing that a config builds
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["robustness_figure"]

# Told apart by colour-blind readers and in grey print.
_CLEAN, _ATTACKED, _FAINT, _INK = "#3B6FB6", "#C44E52", "#D9DEE4", "#22303C"

_MOST_CLASSES = 50


def robustness_figure(report: RobustnessReport) -> "Figure":
    """Draw accuracy after each stage of each attack, and clean and robust accuracy per class.

    The figure is not registered with pyplot: nothing has to be closed, no window opens.

    Args:
        report: The report.

    Raises:
        ModuleNotFoundError: If matplotlib is missing: ``pip install "lightning-robust[plot]"``.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.evaluation import evaluate_robustness
        >>> batch = torch.rand(8, 4), torch.randint(3, (8,))
        >>> report = evaluate_robustness(torch.nn.Linear(4, 3), [batch], PGD(eps=0.1, steps=2))
        >>> robustness_figure(report).savefig("robustness.png")  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    stages, classes = figure.subplots(1, 2)
    _stages(stages, report)
    _classes(classes, report)
    figure.suptitle(f"{report.model}: {report.samples} samples, union {report.robust_accuracy:.1%}", fontsize=11)
    return figure


def _stages(axes: "Axes", report: RobustnessReport) -> None:
    rows = [("clean", report.clean_accuracy, report.clean_standard_error, _CLEAN)]
    for attack in report.attacks:
        last = len(attack.stages) - 1
        for number, stage in enumerate(attack.stages):
            name = attack.name if stage.name == attack.name else f"{attack.name}/{stage.name}"
            error = attack.standard_error if number == last else math.nan  # no bar
            rows.append((name, stage.robust_accuracy, error, _ATTACKED))
    names, heights, errors, colours = zip(*rows, strict=True)
    bars = axes.barh(range(len(rows)), heights, xerr=errors, color=colours, ecolor=_INK, capsize=2)
    axes.bar_label(bars, labels=[f"{height:.1%}" for height in heights], fontsize=8, padding=3)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_title("accuracy after each stage (bar: standard error)", fontsize=9)
    _plain(axes)


def _classes(axes: "Axes", report: RobustnessReport) -> None:
    shown = sorted(report.classes, key=lambda each: each.robust_accuracy)[:_MOST_CLASSES]
    places = range(len(shown))
    axes.bar(places, [each.clean_accuracy for each in shown], color=_FAINT, label="clean")
    axes.bar(places, [each.robust_accuracy for each in shown], width=0.5, color=_ATTACKED, label="robust")
    axes.set_xticks(places, [str(each.label) for each in shown], fontsize=8, rotation=90 if len(shown) > 20 else 0)
    axes.set_ylim(0, 1.15)  # room for the legend
    cut = "" if len(shown) == len(report.classes) else f", the {len(shown)} weakest of {len(report.classes)}"
    axes.set_title(f"per class, weakest first{cut}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    _plain(axes)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
