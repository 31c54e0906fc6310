# SPDX-License-Identifier: Apache-2.0
"""The tables of `flatness.py`, from its runs or from the file that it wrote.

python benchmarks/flatness_table.py flatness.csv
"""

import argparse
import csv
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, fields

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """What one run ended with."""

    task: str
    method: str
    rho: float
    seed: int
    epochs: int
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
    """For each method the best runs: by validation accuracy, and validation loss where that is equal."""

    def quality(runs: list[Outcome]) -> tuple[float, float]:
        return round(mean_of(runs, "val_accuracy"), 6), -mean_of(runs, "val_loss")

    methods = dict.fromkeys(outcome.method for outcome in outcomes)
    return [max((runs for runs in settings(outcomes) if runs[0].method == method), key=quality) for method in methods]


def settings(outcomes: list[Outcome]) -> list[list[Outcome]]:
    """The runs that differ in the seed only."""
    found: dict[tuple[str, float, int], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.method, outcome.rho, outcome.epochs].append(outcome)
    return list(found.values())


def mean_of(runs: list[Outcome], name: str) -> float:
    """Mean over the seeds."""
    return statistics.mean(getattr(outcome, name) for outcome in runs)


def cell(runs: list[Outcome], name: str, scale: float = 1.0) -> str:
    """Mean and standard deviation over the seeds."""
    values = [scale * getattr(outcome, name) for outcome in runs]
    if any(value != value for value in values):
        return ""
    mean = statistics.mean(values)
    digits = 0 if mean >= 100 else 1 if mean >= 10 else 2 if mean >= 1 else 3
    return f"{mean:.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.{digits}f}"


COLUMNS: tuple[tuple[str, str, float], ...] = (
    ("test %", "test_accuracy", 100.0),
    ("val %", "val_accuracy", 100.0),
    ("eigenvalue", "eigenvalue", 1.0),
    ("relative", "relative", 1.0),
    ("unseen", "unseen", 1.0),
    ("rise", "rise", 1.0),
    ("train loss", "train_loss", 1.0),
    ("learned %", "wrong_learned", 100.0),
    ("norm", "weight_norm", 1.0),
)


def report(console: Console, outcomes: list[Outcome]) -> None:
    """The chosen runs, all runs, and the chosen ones against SGD."""
    best = chosen(outcomes)
    for title, rows in (("chosen on validation", best), ("everything", settings(outcomes))):
        table = Table(title=f"{outcomes[0].task}, {len(best[0])} seeds: {title}", box=box.SIMPLE)
        for heading in ("method", "rho", "epochs", "passes", *(heading for heading, *_ in COLUMNS)):
            table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
        for runs in rows:
            first = runs[0]
            cells = [cell(runs, name, scale) for _, name, scale in COLUMNS]
            table.add_row(
                first.method,
                f"{first.rho:g}" if first.rho else "",
                *map(str, (first.epochs, first.epochs * first.passes)),
                *cells,
            )
        console.print(table)
    sgd = {outcome.seed: outcome for outcome in best[0]}
    for runs in best[1:]:
        pairs = [(outcome, sgd[outcome.seed]) for outcome in runs]
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
        report(Console(width=190), [outcome for outcome in outcomes if outcome.task == task])


if __name__ == "__main__":
    main()
