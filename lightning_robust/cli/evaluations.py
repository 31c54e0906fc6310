# SPDX-License-Identifier: Apache-2.0
"""The evaluations that ``eval`` has left in run folders, as a table; needs no torch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_robust.cli.folders import run_folders
from lightning_robust.cli.tables import new_table

__all__ = ["EVALUATIONS", "REPORT", "evaluations_table"]

EVALUATIONS = "eval"  # folder within a run folder
REPORT = "report.json"


def evaluations_table(runs: Sequence[tuple[str, Path]]) -> Table | None:
    """One row per finished evaluation; ``None`` if there is none.

    Args:
        runs: Name and folder of each run.
    """
    table = new_table("Robustness evaluations")
    table.add_column("evaluation", style="cyan", no_wrap=True)
    table.add_column("attack")
    for heading in ("samples", "clean\nacc.", "robust\nacc.", "warnings"):
        table.add_column(heading, justify="right")
    for name, found in _reports(runs):
        table.add_row(name, *_cells(found))
    return table if table.row_count else None


def _reports(runs: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, folder in runs:
        for evaluation in run_folders(folder / EVALUATIONS):
            path = evaluation / REPORT
            if path.is_file():  # else it was killed
                yield f"{name}/{EVALUATIONS}/{evaluation.name}", json.loads(path.read_text(encoding="utf-8"))


def _cells(found: dict[str, Any]) -> list[str]:
    return [
        ", ".join(_attack(each) for each in found["attacks"]),
        str(found["samples"]),
        f"{found['clean_accuracy']:.1%}",
        f"{found['robust_accuracy']:.1%}",
        str(sum(check["status"] == "warn" for check in found["checks"])),
    ]


def _attack(found: dict[str, Any]) -> str:
    budgets = zip(found["norm"].split("+"), found["eps"], strict=True)
    return f"{found['name']} ({', '.join(f'{norm} {eps:.4g}' for norm, eps in budgets)})"
