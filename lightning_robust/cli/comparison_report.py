# SPDX-License-Identifier: Apache-2.0
"""A comparison as table, as CSV and as picture, from its summary alone; needs no torch."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.quantities import QUANTITIES
from lightning_robust.cli.tables import new_table

__all__ = ["print_comparison", "statistics", "write_comparison_numbers", "write_comparison_picture"]

Values = dict[str, dict[str, dict[str, float | None]]]  # arm, seed, quantity


def statistics(values: Values, quantities: Sequence[str]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and standard deviation (of the sample, one seed has none) of each quantity over the seeds of each arm.

    Args:
        values: Values by arm, seed and quantity.
        quantities: Which quantities.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for arm, seeds in values.items():
        found[arm] = {}
        for name in quantities:
            known = [value for each in seeds.values() if (value := each.get(name)) is not None]
            found[arm][name] = {
                "mean": fmean(known) if known else None,
                "std": stdev(known) if len(known) > 1 else None,
            }
    return found


def print_comparison(summary: dict[str, Any], console: Console) -> None:
    """Print one row per arm, mean and deviation of each quantity, and what the quantities are.

    Args:
        summary: Summary of a comparison.
        console: Where to.
    """
    console.print(_title(summary), style="bold", highlight=False)
    console.print(_table(summary))
    # below a narrow table, a caption of its width would take many lines
    console.print("\n".join(_notes(summary["comparison"])), highlight=False, markup=False, soft_wrap=True)


def _table(summary: dict[str, Any]) -> Table:
    block = summary["comparison"]
    names, values = block["quantities"], block["values"]
    table = new_table()
    table.add_column("arm", style="cyan", no_wrap=True)
    for name in names:
        table.add_column(QUANTITIES[name].heading, justify="right", no_wrap=True)
    for arm, found in statistics(values, names).items():
        if not values[arm]:
            continue
        table.add_row(arm, *(_cell(name, found[name]) for name in names))
    return table


def write_comparison_numbers(summary: dict[str, Any], path: Path) -> Path:
    """Write one line per arm and seed, then mean and deviation of each arm, and return the path.

    Args:
        summary: Summary of a comparison.
        path: CSV file to write.

    Raises:
        UsageError: If it cannot be written.
    """
    block = summary["comparison"]
    names, values = block["quantities"], block["values"]
    rows = [(arm, seed, each) for arm, seeds in values.items() for seed, each in seeds.items()]
    for arm, found in statistics(values, names).items():
        rows += [(arm, key, {name: found[name][key] for name in names}) for key in ("mean", "std")]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["arm", "seed", *names])
            writer.writerows([arm, seed, *(each.get(name) for name in names)] for arm, seed, each in rows)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def write_comparison_picture(summary: dict[str, Any], path: Path) -> Path | None:
    """Draw one panel per quantity, with a point per seed and the mean; ``None`` without matplotlib.

    Args:
        summary: Summary of a comparison.
        path: PNG file to write.

    Raises:
        UsageError: If it cannot be written.
    """
    try:
        from lightning_robust.cli.comparison_picture import draw_comparison
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    try:
        draw_comparison(summary, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _cell(name: str, found: dict[str, float | None]) -> str:
    mean = found["mean"]
    return "-" if mean is None else QUANTITIES[name].text(mean, found["std"])


def _title(summary: dict[str, Any]) -> str:
    block = summary["comparison"]
    done = sum(len(seeds) for seeds in block["values"].values())
    wanted = len(block["seeds"]) * len(block["values"])
    missing = "" if done == wanted else f"; {wanted - done} of {wanted} trainings are missing"
    return f"{summary['recipe']}: mean ± deviation over seeds {', '.join(map(str, block['seeds']))}{missing}"


def _notes(block: dict[str, Any]) -> list[str]:
    lines = ["Last epoch's weights on the test split."]
    for name in block["quantities"]:
        lines.append(f"{QUANTITIES[name].label}: {QUANTITIES[name].note}.")
    if "probe" in block["quantities"]:
        lines.append(f"The probe learns {block['probe']}.")
    return [*lines, *block.get("notes", [])]
