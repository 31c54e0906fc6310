"""The table "which method works in which setting of the Trainer": every cell is one or more tests."""

import json
from pathlib import Path
from typing import Any

#: Settings in the order of the table's columns; a test names its column with the fixture `cell`.
COLUMNS = (
    "fp32",
    "accumulate",
    "clip",
    "bf16-mixed",
    "16-mixed",
    "compile",
    "resume",
    "DDP",
    "other modules",
    "exceptions",
)


def cells(reports: list[Any]) -> dict[str, dict[str, list[Any]]]:
    """Outcome of every cell: passed if all of its tests passed, and their number."""
    table: dict[str, dict[str, list[Any]]] = {}
    for report in reports:
        named = [value for key, value in getattr(report, "user_properties", ()) if key == "cell"]
        for row, column in named if getattr(report, "when", "") == "call" else ():
            passed, count = table.setdefault(row, {}).get(column, [True, 0])
            table[row][column] = [passed and report.outcome == "passed", count + 1]
    return table


def write(path: Path, reports: list[Any]) -> None:
    table = cells(reports)
    rows = {row: {name: table[row][name] for name in COLUMNS if name in table[row]} for row in sorted(table)}
    lines = [f"  {json.dumps(row)}: {json.dumps(columns)}" for row, columns in rows.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
