# SPDX-License-Identifier: Apache-2.0
"""The table of methods and the page of one of them, generated from the classes themselves."""

import inspect
import re
from typing import Any, get_args, get_type_hints

import docstring_parser
from lightning.pytorch.callbacks import Callback
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lightning_robust.attacks import Attack
from lightning_robust.cli.catalog import ROOMS, constructor_parameters, find_class, import_rooms, room_classes
from lightning_robust.cli.errors import UsageError, did_you_mean
from lightning_robust.cli.tables import new_table
from lightning_robust.distillation import DistillationLoss
from lightning_robust.losses import Criterion, LogitRegularizer
from lightning_robust.mixing import Mixer
from lightning_robust.objectives import Objective
from lightning_robust.optimizers import ExactOptimizer
from lightning_robust.regularization import WeightRegularizer
from lightning_robust.sharpness import SharpnessMethod
from lightning_robust.training import StepCallback

__all__ = ["method_help", "method_table", "methods"]

#: Base classes of what a method consists of, and what the table calls them.
KINDS: dict[type, str] = {
    Callback: "callback",
    SharpnessMethod: "sharpness",
    Attack: "attack",
    LogitRegularizer: "logit penalty",
    WeightRegularizer: "weight penalty",
    Mixer: "mixer",
    Criterion: "loss",
    DistillationLoss: "teacher term",
    Objective: "objective",
    ExactOptimizer: "optimizer",
}
_TESTING = ", logger=False, enable_checkpointing=False"  # what keeps the examples of docstrings from writing files
_MATH = {r"\lVert": "|", r"\rVert": "|", r"\,": " ", r"\max": "max", r"\bar z": "mean z", r"\cdot": "*"}


def methods() -> dict[str, tuple[str, type]]:
    """Every class that a method consists of, with its kind, by name."""
    import_rooms()
    found = {}
    for base, kind in KINDS.items():
        for room in ROOMS:
            for name, item in room_classes(room).items():
                if issubclass(item, base) and item is not base and not inspect.isabstract(item):
                    found[name] = (f"{kind}, {_stage(item)}" if base is Callback else kind, item)
    return found


def _stage(item: type) -> str:
    return str(item.stage) if issubclass(item, StepCallback) and not item.only_looks else "monitor"


def method_table() -> Table:
    """All methods: name, stage, what it does, cost, paper."""
    table = new_table(caption="Options of one: lightning-robust methods NAME")
    for heading in ("name", "kind, stage", "what it does", "cost", "paper (arXiv)"):
        table.add_column(heading, style="cyan" if heading == "name" else None, no_wrap=heading == "name")
    previous = ""
    for name, (kind, item) in methods().items():
        if previous and kind.partition(",")[0] != previous:
            table.add_section()
        previous = kind.partition(",")[0]
        table.add_row(name, kind, escape(_first_line(item)), escape(_cost(item)), ", ".join(_papers(item)))
    return table


def method_help(name: str) -> RenderableType:
    """The page of one method: what it is, its options, and how to use it.

    Args:
        name: Name of the class.

    Raises:
        UsageError: If there is no such class.
    """
    known = methods()
    item = known[name][1] if name in known else find_class(name)
    if item is None:
        raise UsageError(
            f"There is no method called {name!r}.", did_you_mean(name, known), "All: lightning-robust methods"
        )
    options = _options(item)
    table = new_table()
    for heading in ("option", "type", "default", "meaning"):
        table.add_column(heading, style="cyan" if heading == "option" else None)
    for option in options:
        table.add_row(*(escape(cell) for cell in option))
    parts: list[RenderableType] = [f"[bold]{item.__name__}[/bold]  {escape(_first_line(item))}"]
    if cost := _cost(item):
        parts.append(f"Cost: {escape(cost)}")
    if papers := _papers(item):
        parts.append("Paper: " + ", ".join(f"https://arxiv.org/abs/{paper}" for paper in papers))
    parts.append(table if options else "It has no options.")
    parts.append(escape(_usage(item)))
    return Group(*parts)


def _options(item: type) -> list[tuple[str, str, str, str]]:
    meaning = {entry.arg_name: entry.description or "" for entry in docstring_parser.parse(item.__doc__ or "").params}
    hints = _hints(item)
    rows = []
    for parameter in constructor_parameters(item):
        hint = hints.get(parameter.name, parameter.annotation)
        default = "required" if parameter.default is parameter.empty else repr(parameter.default)
        text = _plain(meaning.get(parameter.name, ""))
        choices = ", ".join(_choices(hint))
        rows.append((parameter.name, _type_name(hint), default, f"{text} Choose from {choices}." if choices else text))
    return rows


def _hints(item: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for owner in reversed(item.__mro__[:-1]):
        if "__init__" in vars(owner):
            hints.update(get_type_hints(owner.__init__))  # type: ignore[misc]
    return hints


def _type_name(hint: Any) -> str:
    text = hint.__name__ if inspect.isclass(hint) else str(hint)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def _choices(hint: Any) -> list[str]:
    """Names of the methods that fit a type."""
    bases = [part for part in (hint, *get_args(hint)) if inspect.isclass(part) and part in KINDS]
    return [name for name, (_, item) in methods().items() if any(issubclass(item, base) for base in bases)]


def _usage(item: type) -> str:
    example = re.findall(r"^\s*(?:>>>|\.\.\.) ?(.*)$", inspect.getdoc(item) or "", re.MULTILINE)
    lines = ["In Python:", *(f"  {line.replace(_TESTING, '')}" for line in example)]
    if issubclass(item, Callback):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", item.__name__).lower()
        parameters = constructor_parameters(item)
        shown = [entry for entry in parameters if entry.default is entry.empty] or parameters[:1]
        hints = _hints(item)
        values = {entry.name: _shown_value(_choices(hints.get(entry.name)), example) for entry in shown}
        changes = "".join(f" --methods.{name}.{option} {value}" for option, value in values.items())
        lines += ["", "In a recipe:", "  methods:", f"    {name}:", f"      class_path: {item.__name__}"]
        lines += ["      init_args:"] if values else []
        lines += [f"        {option}: {value}" for option, value in values.items()]
        command = f"lightning-robust run digits-standard --methods.{name} {item.__name__}{changes}"
        lines += ["", "On the command line:", f"  {command}"]
    return "\n".join(lines)


def _shown_value(choices: list[str], example: list[str]) -> str:
    """The class that the example in Python uses, so that both show the same; else the first."""
    used = [name for name in choices if re.search(rf"\b{name}\(", "\n".join(example))]
    return next(iter(used + choices), "VALUE")


def _first_line(item: type) -> str:
    return _plain((inspect.getdoc(item) or "").partition("\n\n")[0])


def _cost(item: type) -> str:
    found = re.search(r"^Cost: (.*?)(?:[;.](?:\s|$)|\n\n|\Z)", inspect.getdoc(item) or "", re.MULTILINE | re.DOTALL)
    return _plain(found[1]) if found else ""


def _papers(item: type) -> list[str]:
    return list(dict.fromkeys(re.findall(r"arXiv[: ](\d{4}\.\d{4,5})", inspect.getdoc(item) or "")))


def _plain(text: str) -> str:
    text = re.sub(r":math:`([^`]*)`", lambda found: _readable(found[1]), text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return " ".join(text.replace("``", "").replace("`", "").split())


def _readable(formula: str) -> str:
    for command, text in _MATH.items():
        formula = formula.replace(command, text)
    formula = re.sub(r"\\(?:mathrm|text)\{(\w+)\}", r"\1", formula)
    return formula.replace("\\", "").replace("{", "").replace("}", "")
