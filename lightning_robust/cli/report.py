# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: one table, one picture, from the files of their folders alone."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_robust.cli.comparison_report import (
    print_comparison,
    write_comparison_numbers,
    write_comparison_picture,
)
from lightning_robust.cli.errors import UsageError
from lightning_robust.cli.evaluations import evaluations_table
from lightning_robust.cli.folders import read_summary
from lightning_robust.cli.tables import new_table

__all__ = ["INSTALL_PLOT", "comparison_table", "report", "write_picture"]

INSTALL_PLOT = 'pip install "lightning-robust[plot]"'

# (heading, key in the evaluation, or in the summary itself when it starts with a dot, format)
COLUMNS = (
    ("clean\nacc.", "accuracy", "{:.1%}"),
    ("attack\nacc.", "robust_accuracy", "{:.1%}"),
    ("ECE", "ece", "{:.3f}"),
    ("ECE\nscaled", "ece_scaled", "{:.3f}"),
    ("NLL", "nll", "{:.3f}"),
    ("Brier", "brier", "{:.3f}"),
    ("train\nsec.", ".seconds", "{:.1f}"),
    ("passes", ".passes", "{:g}"),
)


def report(folders: Sequence[Path], *, plot: Path | None = None) -> None:
    """Print the comparison of several runs, and draw it if asked.

    Args:
        folders: Run folders.
        plot: PNG file to write; the numbers go into a CSV file beside it.

    Raises:
        UsageError: If a folder is no finished run, or the picture cannot be drawn.
    """
    rows = []
    for folder in folders:
        row = read_summary(folder)
        if "comparison" in row:
            if len(folders) > 1:
                raise UsageError(f"{folder} is a comparison; report it alone.")
            _report_comparison(row, plot)
            return
        rows.append(
            {**row, "name": f"{row.get('recipe', folder.parent.name)}/{folder.resolve().name}", "folder": folder}
        )
    console = Console()
    console.print(comparison_table(rows))
    unfinished = [row["name"] for row in rows if not row.get("evaluation")]
    if unfinished:
        console.print(f"Not evaluated yet: {', '.join(unfinished)}.", highlight=False)
    if (evaluations := evaluations_table([(row["name"], row["folder"]) for row in rows])) is not None:
        console.print(evaluations)
    if plot is None:
        return
    _say_written(console, write_numbers(rows, plot.with_suffix(".csv")), write_picture(rows, plot))


def _report_comparison(summary: dict[str, Any], plot: Path | None) -> None:
    console = Console()
    print_comparison(summary, console)
    if plot is not None:
        _say_written(
            console,
            write_comparison_numbers(summary, plot.with_suffix(".csv")),
            write_comparison_picture(summary, plot),
        )


def _say_written(console: Console, numbers: Path, picture: Path | None) -> None:
    if picture is None:
        raise UsageError(f"Wrote {numbers}, but the picture needs matplotlib.", f"Install it with: {INSTALL_PLOT}")
    console.print(f"Wrote {picture} and {numbers}", soft_wrap=True, highlight=False)


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per run: accuracy clean and attacked, calibration, cost.

    Args:
        rows: Summaries of runs.
    """
    table = new_table(_title(rows), _caption(rows))
    table.add_column("run", style="cyan", no_wrap=True)
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        values = [_value(row, key) for _, key, _ in COLUMNS]
        cells = [
            "-" if value is None else form.format(value) for value, (_, _, form) in zip(values, COLUMNS, strict=True)
        ]
        table.add_row(_name(row), *cells)
    return table


def write_numbers(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the table as CSV and return the path.

    Args:
        rows: Summaries of runs.
        path: File to write.

    Raises:
        UsageError: If it cannot be written.
    """
    keys = [key for _, key, _ in COLUMNS]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *(key.removeprefix(".") for key in keys), "attack"])
            for row in rows:
                attack = (row.get("evaluation") or {}).get("attack")
                writer.writerow([_name(row), *(_value(row, key) for key in keys), attack])
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def write_picture(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Draw the runs side by side; ``None`` without matplotlib or without evaluated runs.

    Args:
        rows: Summaries of runs.
        path: PNG file to write.

    Raises:
        UsageError: If it cannot be written.
    """
    evaluated = [{**row, "name": _name(row)} for row in rows if row.get("evaluation")]
    if not evaluated:
        return None
    try:
        from lightning_robust.cli.picture import draw
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    try:
        draw(evaluated, path, attack=_attack(evaluated))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _name(row: dict[str, Any]) -> str:
    return str(row.get("name") or row.get("recipe", "run"))


def _value(row: dict[str, Any], key: str) -> Any:
    if key.startswith("."):
        return row.get(key[1:])
    return (row.get("evaluation") or {}).get(key)


def _attack(rows: Sequence[dict[str, Any]]) -> str | None:
    attacks = {(row.get("evaluation") or {}).get("attack") for row in rows} - {None}
    return attacks.pop() if len(attacks) == 1 else (f"{len(attacks)} different attacks" if attacks else None)


def _title(rows: Sequence[dict[str, Any]]) -> str:
    samples = sorted({row["evaluation"]["samples"] for row in rows if row.get("evaluation")})
    counted = "/".join(map(str, samples))
    attack = _attack(rows)
    return (
        f"Test split, {counted} samples" + (f"; attack {attack}" if attack else "") if samples else "No evaluation yet"
    )


def _caption(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["ECE scaled: by a temperature fitted on the validation split; passes: per training step."]
    for row in rows:
        values = row.get("evaluation") or {}
        if values.get("attacked") and values["attacked"] < values["samples"]:
            lines.append(f"{_name(row)}: attacked the first {values['attacked']} samples only.")
        if values.get("temperature_at_bound"):
            lines.append(f"{_name(row)}: the validation split does not determine a temperature (all of it is right?).")
    return "\n".join(lines)
