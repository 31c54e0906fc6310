# SPDX-License-Identifier: Apache-2.0
"""The tables of `flatness.py`, from its runs or from the file that it wrote.

python benchmarks/flatness_table.py flatness.csv
"""

import argparse
import csv
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, fields

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """What one run ended with."""

    task: str
    method: str
    rho: float
    seed: int
    passes: int
    val_accuracy: float
    val_loss: float
    test_accuracy: float
    train_accuracy: float
    wrong_learned: float
    train_loss: float
    eigenvalue: float
    relative: float
    unseen: float
    rise: float
    weight_norm: float
    products: int
    seconds: float


def chosen(outcomes: list[Outcome]) -> list[list[Outcome]]:
    """For each method the runs of its best radius: validation accuracy, and validation loss where that is equal."""
    by_setting: dict[tuple[str, float], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_setting[outcome.method, outcome.rho].append(outcome)

    def quality(runs: list[Outcome]) -> tuple[float, float]:
        return round(mean_of(runs, "val_accuracy"), 6), -mean_of(runs, "val_loss")

    methods = dict.fromkeys(outcome.method for outcome in outcomes)
    return [max((runs for (name, _), runs in by_setting.items() if name == method), key=quality) for method in methods]


def mean_of(runs: list[Outcome], name: str) -> float:
    """Mean over the seeds."""
    return statistics.mean(getattr(outcome, name) for outcome in runs)


def cell(runs: list[Outcome], name: str, form: str, scale: float = 1.0) -> str:
    """Mean and standard deviation over the seeds."""
    values = [scale * getattr(outcome, name) for outcome in runs]
    if any(value != value for value in values):
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:{form}}"


COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("test acc %", "test_accuracy", ".2f", 100.0),
    ("val acc %", "val_accuracy", ".2f", 100.0),
    ("eigenvalue", "eigenvalue", ".3g", 1.0),
    ("relative", "relative", ".3g", 1.0),
    ("unseen", "unseen", ".3g", 1.0),
    ("rise", "rise", ".3f", 1.0),
    ("train loss", "train_loss", ".3f", 1.0),
    ("learned %", "wrong_learned", ".0f", 100.0),
    ("norm", "weight_norm", ".1f", 1.0),
)


def report(console: Console, outcomes: list[Outcome]) -> None:
    """The runs of the chosen radii against SGD, and all radii."""
    best = chosen(outcomes)
    every: dict[tuple[str, float], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        every[outcome.method, outcome.rho].append(outcome)
    for title, rows in (("radius chosen on validation", best), ("every radius", list(every.values()))):
        table = Table(title=f"{outcomes[0].task}: {title}")
        for heading in ("method", "rho", "seeds", "passes", *(heading for heading, *_ in COLUMNS)):
            table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
        for runs in rows:
            first = runs[0]
            cells = [cell(runs, name, form, scale) for _, name, form, scale in COLUMNS]
            table.add_row(
                first.method, f"{first.rho:g}" if first.rho else "", str(len(runs)), str(first.passes), *cells
            )
        console.print(table)
    sgd = {outcome.seed: outcome for outcome in best[0]}
    for runs in best[1:]:
        pairs = [(outcome, sgd[outcome.seed]) for outcome in runs if outcome.seed in sgd]
        lower = [
            f"{heading} {sum(getattr(a, name) < getattr(b, name) for a, b in pairs)}"
            for heading, name, *_ in COLUMNS
            if name in ("eigenvalue", "relative", "unseen", "rise")
        ]
        gain = 100 * statistics.mean(a.test_accuracy - b.test_accuracy for a, b in pairs)
        console.print(
            f"{runs[0].method}: below SGD of the same seed, in how many of {len(pairs)}: {', '.join(lower)}; "
            f"test accuracy {gain:+.2f} points"
        )


def write(path: str, outcomes: list[Outcome]) -> None:
    """One line per run."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Outcome)])
        writer.writeheader()
        writer.writerows(asdict(outcome) for outcome in outcomes)


def read(path: str) -> list[Outcome]:
    """What :func:`write` wrote."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [Outcome(**{each.name: each.type(row[each.name]) for each in fields(Outcome)}) for row in rows]


def main() -> None:
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("csv", nargs="+", help="files that flatness.py wrote")
    outcomes = [outcome for path in parser.parse_args().csv for outcome in read(path)]
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        report(Console(width=180), [outcome for outcome in outcomes if outcome.task == task])


if __name__ == "__main__":
    main()
