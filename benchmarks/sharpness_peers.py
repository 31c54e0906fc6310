# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware steps against a bare SGD step and against other implementations: time, memory, and the same result.

Everything takes turns in one process, in a new random order every round, and each measurement is divided by that of a
bare SGD step taken right before it; printed are medians over the rounds, so a busy machine disturbs all alike. Seconds
are processor time of one thread. "plain" is ``sharp_backward`` in a loop, "Lightning" a callback in a Trainer, and the
rest are other people's optimizers in a loop.

Columns: "x SGD" the ratio to the bare step; "x passes" the ratio to a bare loop with as many passes and one optimizer
step; "memory" the peak of live tensors beyond that of SGD with momentum, in copies of the weights; "differs" how far
three steps end from where our plain loop ends, relative to the way they went.

Other implementations are looked for in the folder --peers and otherwise in the environment; what is not there is listed
and left out. The folder can hold

    pip install --target FOLDER --no-deps pytorch_optimizer mosaicml       (and what mosaicml needs to be imported)
    sam.py of davda54/sam, asam.py of SamsungLabs/ASAM, gsam/ of juntang-zhuang/GSAM, gam/ of xxgege/GAM

    python benchmarks/sharpness_peers.py --peers FOLDER --rounds 15
"""

import argparse
import copy
import gc
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import lightning as L
import timm
import torch
from sam_overhead import Classifier
from sharpness_contenders import Batch, Contender, Maker, Step, bare, contenders
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override


class Stopwatch(L.Callback):
    """Seconds from the start of each training step to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    @override
    def on_train_epoch_start(self, *args: object) -> None:
        self.starts = []

    @override
    def on_train_batch_start(self, *args: object) -> None:
        self.starts.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Of the last epoch."""
        return [later - earlier for earlier, later in pairwise(self.starts)]


def loop_seconds(step: Step, steps: int, cycle: int = 1) -> float:
    """Seconds of a step: the fastest of ``steps``, averaged over the cycle, after one cycle of warming up."""
    seconds = []
    for _ in range((steps + 1) * cycle):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    return fastest(seconds[cycle:], cycle)


def fastest(seconds: list[float], cycle: int) -> float:
    """The fastest of each position in the cycle, averaged."""
    return statistics.mean(min(seconds[position::cycle]) for position in range(cycle))


def fit(net: nn.Module, batch: Batch, contender: Contender, steps: int) -> list[float]:
    """Seconds of the steps of a fit's last epoch; the loader is an ordinary one, which SAF needs."""
    assert contender.callbacks is not None
    watch = Stopwatch()
    images, labels = (tensor.repeat(steps, *[1] * (tensor.ndim - 1)) for tensor in batch)
    trainer = L.Trainer(
        max_epochs=contender.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[watch, *contender.callbacks()],
    )
    trainer.fit(Classifier(net), DataLoader(TensorDataset(images, labels), batch_size=len(batch[0])))
    return watch.seconds


def seconds_of(contender: Contender, net: nn.Module, batch: Batch, steps: int) -> float:
    """Seconds of one step of a contender."""
    if contender.make is not None:
        return loop_seconds(contender.make(net, batch), steps, contender.cycle)
    seconds = fit(net, batch, contender, (steps + 1) * contender.cycle + 1)
    return fastest(seconds[contender.cycle :], contender.cycle)


def three_steps(contender: Contender, net: nn.Module, batch: Batch) -> torch.Tensor:
    """The weights after three steps from the weights of ``net``."""
    net = copy.deepcopy(net)
    if contender.make is not None:
        step = contender.make(net, batch)
        for _ in range(3):
            step()
    else:
        fit(net, batch, contender, 3)
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def peak_bytes(run: Callable[[], object]) -> float:
    """Largest sum of bytes of tensors that ``run`` allocated and had not freed yet."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        with open(file.name) as stream:
            events = json.load(stream)["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    live = highest = 0
    for _, change in changes:
        live += change
        highest = max(highest, live)
    return highest


def extra_copies(contender: Contender, net: nn.Module, batch: Batch) -> float:
    """Peak memory beyond SGD's in copies of the weights; two images, so that the activations hardly count."""
    few = batch[0][:2], batch[1][:2]
    steps = 3 * contender.cycle

    def loop(make: Maker) -> None:
        step = make(copy.deepcopy(net), few)  # the copy counts, because some replace the memory of the weights
        for _ in range(steps):
            step()

    def run() -> None:
        if contender.make is not None:
            loop(contender.make)
        else:
            fit(copy.deepcopy(net), few, contender, steps)

    size = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    return (peak_bytes(run) - peak_bytes(lambda: loop(bare))) / size


def available(candidates: list[Contender], net: nn.Module, batch: Batch) -> tuple[list[Contender], list[str]]:
    """Those that can take a step, and a line about each of the others."""
    found, missing = [], []
    few = batch[0][:8], batch[1][:8]
    for contender in candidates:
        try:
            three_steps(contender, net, few)
        except (ImportError, AttributeError, TypeError) as error:
            missing.append(
                f"{contender.family}, {contender.name}: {type(error).__name__}: {str(error).splitlines()[0]}"
            )
        else:
            found.append(contender)
    return found, missing


def measure(
    chosen: list[Contender], net: nn.Module, batch: Batch, rounds: int, steps: int
) -> dict[tuple[str, str], list[float]]:
    """Ratios to the bare step, one per round."""
    ratios: dict[tuple[str, str], list[float]] = {(each.family, each.name): [] for each in chosen}
    order = list(chosen)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for contender in order:
            base = loop_seconds(bare(net, batch), steps)
            ratios[contender.family, contender.name].append(seconds_of(contender, net, batch, steps) / base)
    return ratios


def table(chosen: list[Contender], ratios: dict[tuple[str, str], list[float]], net: nn.Module, batch: Batch) -> None:
    """Print a line for each contender."""
    start = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    ends: dict[str, torch.Tensor] = {}
    print(f"{'':<36} {'x SGD':>7} {'quartiles':>13} {'x passes':>9} {'memory':>7} {'differs':>8}")
    for each in chosen:
        line = f"{each.family:<18} {each.name:<17}"
        seen = ratios.get((each.family, each.name), [])
        if len(seen) > 1:
            low, middle, high = statistics.quantiles(seen, n=4, method="inclusive")
            line += f" {middle:7.3f} {low:6.3f}-{high:6.3f} "
            line += f"{middle / floor(ratios, each.passes):9.3f}" if each.passes else " " * 9
        else:
            line += " " * 32
        if each.family != "bare":
            end = three_steps(each, net, batch)
            reference = ends.setdefault(each.family, end)
            differs = float((end - reference).norm() / (end - start).norm())
            line += f" {extra_copies(each, net, batch):7.2f} {differs:8.0e}"
        print(line, flush=True)


def floor(ratios: dict[tuple[str, str], list[float]], passes: float) -> float:
    """Ratio of a bare loop with so many passes; in between for a fraction."""
    whole, part = int(passes), passes % 1
    below = statistics.median(ratios["bare", str(whole)])
    return below if not part else below + part * (statistics.median(ratios["bare", str(whole + 1)]) - below)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--peers", default=None, help="folder with other implementations")
    parser.add_argument("--only", nargs="*", default=None, help="families, for example SAM GAM")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="steps per measurement, of which the fastest counts")
    parser.add_argument("--rounds", type=int, default=15, help="below 2 there are no times")
    parser.add_argument("--threads", type=int, default=1, help="waiting threads would count as processor time")
    args = parser.parse_args()
    if args.peers is not None:
        sys.path.append(args.peers)  # last, so that what the environment has is not replaced
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net = timm.create_model(args.model, num_classes=10)
    batch = torch.rand(args.batch_size, 3, args.size, args.size), torch.randint(10, (args.batch_size,))
    wanted = [each for each in contenders() if args.only is None or each.family in (*args.only, "SGD")]
    chosen, missing = available(wanted, net, batch)
    floors = [
        Contender("bare", str(passes), lambda net, batch, passes=passes: bare(net, batch, passes), passes=passes)
        for passes in sorted({1, 2, *(int(each.passes) for each in chosen)} - {0})
    ]
    everything = [*floors, *chosen]
    ratios = measure(everything, net, batch, args.rounds, args.steps) if args.rounds > 1 else {}
    shape = f"{args.model}, batch {args.batch_size}, {args.size}x{args.size}"
    print(
        f"{shape}, {args.threads} threads, {args.rounds} rounds, torch {torch.__version__}, Lightning {L.__version__}"
    )
    table(everything, ratios, net, batch)
    both, attack = (ratios.get((family, "Lightning")) for family in ("AWP + PGD-3", "PGD-3"))
    if both and attack:
        expected = statistics.median(attack) + floor(ratios, 2) - floor(ratios, 1)
        print(f"AWP + PGD-3 / (PGD-3 and one more bare pass): {statistics.median(both) / expected:.3f}")
    for line in missing:
        print(f"not there: {line}")


if __name__ == "__main__":
    main()
