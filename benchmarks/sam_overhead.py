# SPDX-License-Identifier: Apache-2.0
"""Cost of the step pipeline and of SharpnessAware: against a plain step, and against the floor of two passes.

All variants take turns in one process on the same images; the printed numbers are medians of per-round ratios, so a
busy machine disturbs all of them alike. "Bare" is a plain PyTorch loop, the others are a Lightning Trainer.

Seconds are processor time, which other programs disturb least.

    python benchmarks/sam_overhead.py --model resnet18 --batch-size 64 --rounds 20
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.sharpness import ASAM, SAM
from lightning_robust.training import Stage, StepCallback

Batch = tuple[torch.Tensor, torch.Tensor]


class Classifier(L.LightningModule):
    """A module as people write it."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


class Idle(StepCallback):
    """A stage that hands everything through."""

    stage = Stage.LOSS

    @override
    def around_step(self, context: object, batch: object, run: Callable[[object], object]) -> object:
        return run(batch)


class Stopwatch(L.Callback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, *args: object) -> None:
        self.begin = time.process_time()

    @override
    def on_train_batch_end(self, *args: object) -> None:
        self.seconds.append(time.process_time() - self.begin)


def sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all variants."""
    return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def lightning_seconds(net: torch.nn.Module, batch: Batch, steps: int, callbacks: list[L.Callback]) -> float:
    """Fastest step of a short fit on one batch."""
    batches = [batch] * (steps + 1)  # a list by itself would be taken for several loaders
    return fit_seconds(net, DataLoader(batches, batch_size=None), callbacks)


def fit_seconds(net: torch.nn.Module, loader: DataLoader[Any], callbacks: list[L.Callback]) -> float:
    """Fastest step of a fit over a loader, after the first."""
    watch = Stopwatch()
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[watch, *callbacks],
    )
    trainer.fit(Classifier(net), loader)
    return min(watch.seconds[1:])


def bare_seconds(net: torch.nn.Module, batch: Batch, steps: int, passes: int) -> float:
    """Fastest of some steps with the least that ``passes`` gradients and one update can cost."""
    optimizer = sgd(net)
    parameters = list(net.parameters())
    seconds = []
    for _ in range(steps + 1):
        begin = time.process_time()
        optimizer.zero_grad()
        for _ in range(passes - 1):
            torch.autograd.grad(F.cross_entropy(net(batch[0]), batch[1]), parameters)
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
        seconds.append(time.process_time() - begin)
    return min(seconds[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="steps per round, of which the fastest counts")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="waiting threads would count as processor time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net = timm.create_model(args.model, num_classes=10)
    batch = torch.rand(args.batch_size, 3, args.size, args.size), torch.randint(10, (args.batch_size,))
    variants: dict[str, Callable[[], float]] = {
        "bare, one pass": lambda: bare_seconds(net, batch, args.steps, 1),
        "bare, two passes": lambda: bare_seconds(net, batch, args.steps, 2),
        "Lightning": lambda: lightning_seconds(net, batch, args.steps, []),
        "Lightning, idle stage": lambda: lightning_seconds(net, batch, args.steps, [Idle()]),
        "Lightning, SAM": lambda: lightning_seconds(net, batch, args.steps, [SharpnessAware(SAM())]),
        "Lightning, ASAM": lambda: lightning_seconds(net, batch, args.steps, [SharpnessAware(ASAM())]),
    }
    rounds = [{name: measure() for name, measure in variants.items()} for _ in range(args.rounds + 1)][1:]

    def ratio(name: str, base: str) -> float:
        return statistics.median(seconds[name] / seconds[base] for seconds in rounds)

    print(f"{args.model}, batch {args.batch_size}, {args.size}x{args.size}, torch {torch.__version__}")
    for name in variants:
        print(f"{name:<22} {ratio(name, 'bare, one pass'):.3f} x the bare step")
    print(f"idle stage / none      {ratio('Lightning, idle stage', 'Lightning'):.3f}")
    print(f"SAM / plain            {ratio('Lightning, SAM', 'Lightning'):.3f} in Lightning")
    print(f"SAM / two passes bare  {ratio('Lightning, SAM', 'bare, two passes'):.3f}")


if __name__ == "__main__":
    main()
