"""The ``methods`` directive: a table of public classes, read from the code at build time.

````
```{methods} lightning_robust.losses LogitRegularizer
```
````

lists what a room exports and, if a base class of the room is named, derives from it. What a class does is the first
sentence of its docstring, what it costs the paragraph that starts with ``Cost:``, where it comes from the arXiv numbers
in it; callbacks that change the training step also say in which stage they run. Bases, records, errors and enumerations
are left out.
"""

import dataclasses
import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROLE = re.compile(r":(?:\w+:)?\w+:`~?(?:[\w.]*\.)?(\w+)`")
PAPER = re.compile(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})")


class Methods(SphinxDirective):
    """Table of the classes of a module."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        room = self.arguments[0]
        rows = [row(room, name, item) for name, item in classes(*self.arguments)]
        if not rows:
            raise self.error(f"no class to show in {' '.join(self.arguments)}")
        staged = any(line["Stage"] for line in rows)
        priced = any(line["Cost"] for line in rows)
        headings = ["Class", "What it does"]
        headings += ["Stage"] * staged + ["Cost"] * priced + ["Paper"] * any(line["Paper"] for line in rows)
        lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
        lines += ["| " + " | ".join(line[heading] for heading in headings) + " |" for line in rows]
        found = self.parse_text_to_nodes("\n".join(lines))
        for node in found:
            for table in node.findall(nodes.table):
                table["classes"].append("methods")
        return found


def classes(room: str, base: str | None = None) -> list[tuple[str, type]]:
    """The classes that `room` exports, or those that derive from its class `base`."""
    module = importlib.import_module(room)
    found = [(name, getattr(module, name)) for name in module.__all__]
    kind = object if base is None else getattr(module, base)
    chosen = [(name, item) for name, item in found if inspect.isclass(item) and issubclass(item, kind)]
    return [(name, item) for name, item in chosen if item is not kind and not is_support(item)]


def is_support(item: type) -> bool:
    return inspect.isabstract(item) or dataclasses.is_dataclass(item) or issubclass(item, (BaseException, str))


def row(room: str, name: str, item: type) -> dict[str, str]:
    text = inspect.cleandoc(item.__doc__ or "")
    stage: Any = None if getattr(item, "only_looks", False) else getattr(item, "stage", None)
    papers = dict.fromkeys(PAPER.findall(text))
    return {
        "Class": f"{{py:class}}`~{room}.{name}`",
        "What it does": cell(text.partition("\n\n")[0]),
        "Stage": f"`{stage.value}`" if stage is not None else "",
        "Cost": cell(paragraph(text, "Cost:")),
        "Paper": ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers),
    }


def paragraph(text: str, start: str) -> str:
    """The paragraph that begins with `start`, without that word; nothing when there is none."""
    for block in text.split("\n\n"):
        if block.startswith(start):
            return block.removeprefix(start).strip()
    return ""


def cell(text: str) -> str:
    """A docstring's text as one Markdown table cell."""
    text = ROLE.sub(r"`\1`", text).replace("``", "`")
    text = " ".join(text.split()).replace("|", "\\|")
    return text[:1].upper() + text[1:]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("methods", Methods)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
