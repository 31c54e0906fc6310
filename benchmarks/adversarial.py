# SPDX-License-Identifier: Apache-2.0
"""What adversarial training gains, and how single-step training breaks: clean, PGD-20 and AutoAttack accuracy.

Small residual networks on the digits of scikit-learn and, with --cifar, on a part of CIFAR-10, over several seeds. All
methods take the same number of epochs with the same batches and learning rates; "passes" is what a step costs. The last
epoch is measured, without any choice of an epoch, so overfitting shows. AutoAttack is the standard version with its
full budgets, on the first --attacked test images.

Two budgets are trained with per task: a usual one, at which single-step training holds, and a large one, at which it
overfits catastrophically: FGSM accuracy high, PGD accuracy zero; ELLE and AAER are meant to prevent just that.

    python benchmarks/adversarial.py --cifar cifar10.npz --csv adversarial.csv
    python benchmarks/adversarial.py --table adversarial.csv       the tables again, also of a run that is not finished
"""

import argparse
import csv
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import lightning as L
import torch
from flatness import Task, cifar_task, digits_task, logits_of
from lightning.pytorch.callbacks import Callback
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_robust.attacks import FGSM, PGD, Attack, AutoAttack
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining
from lightning_robust.data import ArrayDataModule, channel_statistics
from lightning_robust.models import ImageClassifier
from lightning_robust.objectives import AAER, ELLE, ELLEA, MART, TRADES, Objective

#: (usual, large) budget of each task, in pixel units.
BUDGETS = {"digits": (0.1, 0.2), "cifar": (8 / 255, 16 / 255)}


@dataclass(frozen=True)
class Outcome:
    """What one run ended with; accuracies are shares of the attacked test images."""

    task: str
    eps: float
    method: str
    seed: int
    epochs: int
    passes: float
    clean: float
    fgsm: float
    pgd: float
    autoattack: float
    train_seconds: float
    attack_seconds: float


def many_steps(eps: float) -> dict[str, Callback | None]:
    """Training with iterated attacks, and without any."""

    def pgd(**options: str) -> PGD:
        return PGD(eps=eps, steps=7, step_size=eps / 4, **options)  # type: ignore[arg-type]

    return {
        "standard": None,
        "PGD-AT": AdversarialTraining(pgd()),
        "TRADES": ObjectiveTraining(TRADES(beta=6.0, attack=pgd(loss="kl", random_start="normal"))),
        "MART": ObjectiveTraining(MART(beta=5.0, attack=pgd(random_start="normal"))),
    }


def single_step(eps: float, elle: float) -> dict[str, Callback | None]:
    """Training with one step, and what keeps it from overfitting."""
    plain = FGSM(eps=eps, mode="train")
    random = FGSM(eps=eps, step_size=1.25 * eps, random_start=True, mode="train")

    def objective(made: Objective) -> Callback:
        return ObjectiveTraining(made)

    return {
        "FGSM": AdversarialTraining(plain),
        "FGSM-RS": AdversarialTraining(random),
        "FGSM + ELLE": objective(ELLE(attack=plain, weight=elle)),
        "FGSM + ELLE-A": objective(ELLEA(attack=plain, max_weight=elle)),
        "FGSM + AAER": objective(AAER(attack=plain, variation_weight=20.0)),
    }


def run(task: Task, eps: float, name: str, method: Callback | None, seed: int, args: argparse.Namespace) -> Outcome:
    """Train once, and attack the end."""
    begin = time.process_time()
    L.seed_everything(seed, verbose=False)
    data = ArrayDataModule(
        train=task.train, val=task.val, test=task.test, num_classes=10, batch_size=args.batch_size, seed=seed
    )
    mean, std = channel_statistics(task.train[0])
    model = ImageClassifier(
        args.backbone,
        num_classes=10,
        in_chans=data.in_chans,
        mean=mean,
        std=std,
        optimizer=lambda params: torch.optim.SGD(params, lr=args.lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler="cosine",
        scheduler_interval="step",
    )
    trainer = L.Trainer(
        max_epochs=task.epochs,
        callbacks=[] if method is None else [method],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    trained = time.process_time()
    model.eval()
    x, y = (part[: args.attacked] for part in task.test)
    attacks: dict[str, Attack] = {
        "fgsm": FGSM(eps=eps),
        "pgd": PGD(eps=eps, steps=20, step_size=eps / 8),
        "autoattack": AutoAttack(eps=eps),
    }
    found = {}
    right = logits_of(model, x).argmax(1) == y
    for attack_name, attack in attacks.items():
        survives = right.clone()
        indices = right.nonzero().squeeze(1)
        if len(indices):
            x_adv = attack(model, x[indices], y[indices], indices=indices)
            survives[indices] = logits_of(model, x_adv).argmax(1) == y[indices]
        found[attack_name] = float(survives.float().mean())
    return Outcome(
        task=task.name,
        eps=eps,
        method=name,
        seed=seed,
        epochs=task.epochs,
        passes=1.0 if method is None else method.passes(1),  # type: ignore[attr-defined]
        clean=float(right.float().mean()),
        train_seconds=trained - begin,
        attack_seconds=time.process_time() - trained,
        **found,
    )


def report(console: Console, outcomes: list[Outcome]) -> None:
    """One table for each task and budget: means over the seeds, and the range of AutoAttack accuracy."""
    for task, eps in dict.fromkeys((outcome.task, outcome.eps) for outcome in outcomes):
        runs = [outcome for outcome in outcomes if (outcome.task, outcome.eps) == (task, eps)]
        seeds = len({outcome.seed for outcome in runs})
        title = f"{task}, {runs[0].epochs} epochs, budget {eps:.3f} ({seeds} seeds)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("", "passes", "clean", "FGSM", "PGD-20", "AutoAttack", "lowest-highest", "train s", "attack s"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name in dict.fromkeys(outcome.method for outcome in runs):
            same = [outcome for outcome in runs if outcome.method == name]
            shares = [_mean(same, column) for column in ("clean", "fgsm", "pgd", "autoattack")]
            ends = [outcome.autoattack for outcome in same]
            table.add_row(
                name,
                f"{same[0].passes:g}",
                *(f"{share:.1%}" for share in shares),
                f"{min(ends):.1%}-{max(ends):.1%}",
                *(f"{_mean(same, column):.0f}" for column in ("train_seconds", "attack_seconds")),
            )
        console.print(table)


def _mean(outcomes: list[Outcome], column: str) -> float:
    return statistics.fmean(getattr(outcome, column) for outcome in outcomes)


def write(path: str, outcomes: list[Outcome]) -> None:
    """One line per run."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)])
        writer.writeheader()
        writer.writerows(asdict(outcome) for outcome in outcomes)


def read(path: str) -> list[Outcome]:
    """What `write` wrote."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        kinds = {field.name: field.type for field in fields(Outcome)}
        return [Outcome(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]  # type: ignore[operator,arg-type]


def all_methods(eps: float, large: bool, elle: float) -> dict[str, Callable[[], Callback | None]]:
    """What to train with a budget; at the large one it is about single steps."""
    names = ["PGD-AT", *single_step(eps, elle)] if large else [*many_steps(eps), "FGSM-RS"]

    def make(name: str) -> Callable[[], Callback | None]:
        # made anew for each run: callbacks and objectives have state
        return lambda: {**many_steps(eps), **single_step(eps, elle)}[name]

    return {name: make(name) for name in names}


def main() -> None:
    """Train, attack and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cifar", default=None, help=".npz file with CIFAR-10; without it only the digits")
    parser.add_argument("--tasks", nargs="+", default=["digits", "cifar"], choices=["digits", "cifar"])
    parser.add_argument("--methods", nargs="+", default=None, help="only these")
    parser.add_argument("--budgets", nargs="+", default=["usual", "large"], choices=["usual", "large"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15, help="on CIFAR-10")
    parser.add_argument("--digits-epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=2000, help="training images of CIFAR-10")
    parser.add_argument("--size", type=int, default=16, help="side to which CIFAR-10 is averaged down; 32 as it is")
    parser.add_argument("--attacked", type=int, default=64, help="test images to attack")
    parser.add_argument("--backbone", default="resnet8_cifar")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--elle", type=float, default=300.0, help="weight of ELLE, and largest weight of ELLE-A")
    parser.add_argument("--csv", default=None, help="write one line per run")
    parser.add_argument("--table", default=None, help="print the tables of such a file and stop")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    console = Console(width=120)
    if args.table is not None:
        report(console, read(args.table))
        return
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tasks = [digits_task(args.digits_epochs, size=12)] if "digits" in args.tasks else []
    if "cifar" in args.tasks and args.cifar is not None:
        tasks.append(cifar_task(args.cifar, args.images, 0.0, args.size, args.epochs))
    console.print(f"{args.backbone}, SGD lr {args.lr} (cosine); torch {torch.__version__}, Lightning {L.__version__}")
    outcomes: list[Outcome] = []
    for task in tasks:
        for seed in range(args.seeds):
            for kind, eps in zip(("usual", "large"), BUDGETS[task.key], strict=True):
                for name, make in all_methods(eps, kind == "large", args.elle).items():
                    if kind in args.budgets and (args.methods is None or name in args.methods):
                        outcomes.append(run(task, eps, name, make(), seed, args))
                        console.print(outcomes[-1], highlight=False)
                        if args.csv is not None:
                            write(args.csv, outcomes)
    report(console, outcomes)


if __name__ == "__main__":
    main()
