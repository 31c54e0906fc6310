# SPDX-License-Identifier: Apache-2.0
"""How much faster two processes evaluate robustness than one, each with one thread.

A small network attacks test digits, repeated to --samples, through `trainer.test` and `RobustEvaluation`, in turns by
one process and by two. Compared are the seconds of the evaluation itself, from the first batch to the gathered report,
without the start of the processes; and that both find the same accuracy.

    python benchmarks/evaluation_ranks.py --rounds 3
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from typing_extensions import override

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import RobustEvaluation
from lightning_robust.data import ArrayDataModule, DigitsDataModule
from lightning_robust.models import ImageClassifier


class Timed(RobustEvaluation):
    """An evaluation that knows how long it took."""

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        self.begin = time.perf_counter()
        super().on_test_epoch_start(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        trainer.strategy.barrier()
        self.seconds = time.perf_counter() - self.begin


def evaluate(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate once; in every process."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    digits = DigitsDataModule(image_size=12).load_test()
    chosen = [digits[index % len(digits)] for index in range(args.samples)]
    samples = torch.stack([image for image, _ in chosen]), torch.tensor([label for _, label in chosen])
    data = ArrayDataModule(train=samples, val=samples, test=samples, num_classes=10, batch_size=64)
    model = ImageClassifier("resnet8_cifar", num_classes=10, in_chans=1).eval()
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in samples[0].split(100)])
    # the network's own answers as labels, in a budget in which nothing falls: all processes have the same work
    data = ArrayDataModule(train=samples, val=samples, test=(samples[0], labels), num_classes=10, batch_size=64)
    evaluation = Timed(PGD(eps=1e-6, steps=args.steps), checks=None, eight_bit=False, display="off")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[evaluation],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(model, data, verbose=False)
    assert evaluation.report is not None
    return {"seconds": evaluation.seconds, "accuracy": evaluation.report.robust_accuracy, "rank": trainer.global_rank}


def run(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate in a program of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        options = ["--samples", str(args.samples), "--steps", str(args.steps)]
        command = [sys.executable, __file__, "--processes", str(processes), "--out", str(out), *options]
        subprocess.run(command, check=True, capture_output=True)
        return dict(json.loads(out.read_text(encoding="utf-8")))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, default=None, help="evaluate once, with so many (used by the script)")
    parser.add_argument("--out", default=None, help="file for the result of one evaluation (used by the script)")
    args = parser.parse_args()
    if args.processes is not None:
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        found = evaluate(args.processes, args)
        if found["rank"] == 0 and args.out is not None:
            Path(args.out).write_text(json.dumps(found), encoding="utf-8")
        return
    console = Console(width=100)
    pairs = [(run(1, args), run(2, args)) for _ in range(args.rounds)]
    for one, two in pairs:
        same = "the same accuracy" if one["accuracy"] == two["accuracy"] else "ANOTHER ACCURACY"
        console.print(f"one {one['seconds']:.2f} s, two {two['seconds']:.2f} s, {same}")
    ratio = statistics.median(one["seconds"] / two["seconds"] for one, two in pairs)
    console.print(f"{args.samples} samples, PGD-{args.steps}: two processes are {ratio:.2f} x as fast")


if __name__ == "__main__":
    main()
