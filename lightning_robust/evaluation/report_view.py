# SPDX-License-Identifier: Apache-2.0
"""A robustness report in the terminal."""

from collections.abc import Iterator
from datetime import timedelta

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_robust.evaluation.report import AttackReport, RobustnessReport

__all__ = ["print_report", "report_view"]


def print_report(report: RobustnessReport, console: Console | None = None) -> None:
    """Print a report.

    Args:
        report: The report.
        console: Where to; standard output when not given.
    """
    (Console() if console is None else console).print(report_view(report), highlight=False)


def report_view(report: RobustnessReport) -> RenderableType:
    """A table of attacks and their stages, what is worth knowing about the run, and the checks that warn.

    Args:
        report: The report.
    """
    return Group(_attacks(report), *(Text(line) for line in _notes(report)), *_checks(report))


def _attacks(report: RobustnessReport) -> Table:
    table = Table(
        title=f"{report.model}: {report.samples} samples, {report.num_classes} classes",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("attack", style="cyan", overflow="fold")
    for heading in ("accuracy", "8-bit", "attacked", "broken", "fwd / bwd", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("clean", _percent(report.clean_accuracy, report.clean_standard_error))
    for attack in report.attacks:
        _add_attack(table, attack, report.samples)
    if len(report.attacks) > 1:
        table.add_section()
        accuracy = _percent(report.robust_accuracy, report.standard_error)
        table.add_row("union", accuracy, _short(report.robust_accuracy_8bit))
    return table


def _add_attack(table: Table, attack: AttackReport, samples: int) -> None:
    budgets = [f"{norm} {_eps(eps)}" for norm, eps in zip(attack.norm.split("+"), attack.eps, strict=True)]
    stages = attack.stages
    name = attack.name if attack.exact else f"{attack.name} (and all above)"
    table.add_row(
        f"{name} ({', '.join(budgets)})",
        _percent(attack.robust_accuracy, attack.standard_error),
        _short(attack.robust_accuracy_8bit),
        str(stages[0].entered),
        str(sum(stage.broken for stage in stages)),
        _passes(sum(stage.forwards for stage in stages), sum(stage.backwards for stage in stages)),
        _time(sum(stage.seconds for stage in stages)),
    )
    if len(stages) == 1:
        return
    for stage in stages:
        table.add_row(
            f"  {stage.name}",
            f"{stage.robust_accuracy:.2%}      ",
            "",
            str(stage.entered),
            str(stage.broken),
            _passes(stage.forwards, stage.backwards),
            _time(stage.seconds),
            style="dim",
        )


def _notes(report: RobustnessReport) -> Iterator[str]:
    yield (
        f"worst class {report.worst_class}: {report.worst_class_accuracy:.2%}; "
        f"accuracies with their standard error over {report.samples} samples"
    )
    seed = "of each attack" if report.seed is None else str(report.seed)
    crafted = f", crafted in {report.craft_dtype} and verified in float32" if report.craft_dtype else ""
    processes = f"{report.processes} process{'es' if report.processes > 1 else ''}"
    yield f"{_time(report.seconds + report.earlier_seconds)}, {processes}, seed {seed}{crafted}"
    inputs = report.inputs
    normalised = "" if inputs["mean"] is None else f", normalised with mean {inputs['mean']} and std {inputs['std']}"
    yield f"images {inputs['shape']} {inputs['dtype']}, pixels in {inputs['bounds']}{normalised}"
    for attack in report.attacks:
        for deviation in attack.deviations:
            yield f"{attack.name}: {deviation}"
        rejected = sum(stage.rejected for stage in attack.stages)
        if rejected:
            yield f"{attack.name}: {rejected} misclassified points were outside the budget or the bounds; not counted"
        lost = sum(stage.lost for stage in attack.stages)
        if lost:
            yield f"{attack.name}: {lost} points fooled the model in {report.craft_dtype} only; not counted"


def _checks(report: RobustnessReport) -> Iterator[RenderableType]:
    if not report.checks:
        return
    warnings = report.warnings
    yield Text(f"sanity checks: {len(report.checks) - len(warnings)} ok, {len(warnings)} warn")
    for check in warnings:
        yield Text(f"  warn {check.name}: {check.message}", style="yellow")


def _percent(share: float, error: float) -> str:
    return f"{share:.2%} ±{100 * error:.2f}"


def _short(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _passes(forwards: int, backwards: int) -> str:
    return f"{_count(forwards)} / {_count(backwards)}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(number)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _eps(eps: float) -> str:
    """Budgets of images are known as fractions of 255."""
    levels = eps * 255
    return f"{round(levels)}/255" if eps and abs(levels - round(levels)) < 1e-6 and eps < 1 else f"{eps:g}"
