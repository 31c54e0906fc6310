"""The ``compatibility`` directive: which method passed in which setting of the Trainer, as the tests recorded it.

``make compatibility`` runs the tests and writes ``docs/compatibility.json``; a test fails when that file does not know
a method.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Compatibility(SphinxDirective):
    """Table of methods and settings; a cell says how many tests stand behind it."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "compatibility.json"
        self.env.note_dependency(str(path))
        found = self.parse_text_to_nodes("\n".join(table(json.loads(path.read_text()))))
        for node in found:
            for each in node.findall(nodes.table):
                each["classes"].append("compatibility")
        return found


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = ["| " + " | ".join(["method", *columns]) + " |", "|" + " --- |" * (len(columns) + 1)]
    for row, found in cells.items():
        lines.append("| " + " | ".join([f"`{row}`", *(cell(found.get(column)) for column in columns)]) + " |")
    return lines


def cell(outcome: Any) -> str:
    if outcome is None:
        return ""
    passed, count = outcome
    return f"✓ {count}" if passed else "✗"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("compatibility", Compatibility)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
