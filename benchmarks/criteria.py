# SPDX-License-Identifier: Apache-2.0
"""Cost of every criterion and every penalty on logits beside torch's cross-entropy, forward and backward.

Each takes turns with ``torch.nn.functional.cross_entropy`` on the same logits, and the median of the ratios of
neighbours counts, so that a busy machine disturbs both alike. A penalty is measured together with torch's
cross-entropy. Memory is the peak of what is allocated between the call and the gradient of the logits, that gradient
included, as a multiple of the logits. Run:

    OMP_NUM_THREADS=1 python benchmarks/criteria.py --rounds 3 --csv criteria.csv
"""

import argparse
import csv
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust import losses
from lightning_robust.losses import Criterion, LogitRegularizer, MixedTarget, SampleCriterion

Run = Callable[[], Tensor]

SHAPES = [(128, 1000), (1024, 21000)]
REFERENCE = "F.cross_entropy"
# Compares all pairs of classes: minutes per step at 21,000 of them.
FEW_CLASSES = {"CPC"}
ENOUGH = 0.02  # seconds that one measurement takes at least


def kinds(base: type) -> dict[str, type]:
    """The exported classes of a kind that can be used, by name."""
    found = {name: getattr(losses, name) for name in losses.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind not in (Criterion, SampleCriterion, base)
    }


def arguments_of(name: str, classes: int) -> dict[str, object]:
    """What a class needs besides its defaults."""
    own: dict[str, dict[str, object]] = {
        "CALS": {"num_classes": classes},
        "GroupDRO": {"num_groups": 2},
        "OnlineLabelSmoothing": {"num_classes": classes},
        "VSLoss": {"class_counts": [10 + k for k in range(classes)]},
    }
    return own.get(name, {})


def inputs(batch: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits like those of a model that has learned something, and labels."""
    logits = 2 * torch.randn(batch, classes, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    logits.scatter_add_(1, labels[:, None], torch.full((batch, 1), 8.0, device=device))
    return logits.requires_grad_(), labels


def targets_of(name: str, labels: Tensor, classes: int) -> tuple[Tensor | MixedTarget, int]:
    """The target that a criterion is made for, and how many rows of the logits it takes."""
    if name == "OKO":  # sets of three rows: a class twice and another one once
        first = labels[: len(labels) // 3]
        return torch.stack([first, (first + 1) % classes, first], 1).flatten(), 3 * len(first)
    if name == "DecoupledMixup":
        return MixedTarget(labels, labels.flip(0), torch.tensor(0.3, device=labels.device)), len(labels)
    return labels, len(labels)


def criterion_run(name: str, kind: type, logits: Tensor, labels: Tensor) -> Run:
    """A call of a criterion as in training."""
    batch, classes = logits.shape
    criterion = kind(**arguments_of(name, classes)).to(logits.device)
    index = torch.arange(batch, device=logits.device)
    criterion.samples_known(batch)
    criterion.epoch_starts(0, 10)
    target, rows = targets_of(name, labels, classes)
    known = {"index": index, "group": index % 2}
    context = {each: known[each] for each in criterion.needs}
    return lambda: criterion(logits[:rows] if rows < batch else logits, target, **context)


def penalty_run(name: str, kind: type, logits: Tensor, labels: Tensor) -> Run:
    """The cross-entropy of torch with a penalty."""
    penalty = kind(**arguments_of(name, logits.shape[1])).to(logits.device)
    return lambda: F.cross_entropy(logits, labels) + penalty(logits)


def reference_run(name: str, logits: Tensor, labels: Tensor) -> Run:
    """What to compare with: torch's cross-entropy, of the same mixed target where there is one."""
    target, rows = targets_of(name, labels, logits.shape[1])
    if isinstance(target, MixedTarget):
        first, second, lam = target
        return lambda: lam * F.cross_entropy(logits, first) + (1 - lam) * F.cross_entropy(logits, second)
    return lambda: F.cross_entropy(logits[:rows] if rows < len(logits) else logits, target)


def step(run: Run, logits: Tensor) -> None:
    """Forward and backward, to the logits."""
    torch.autograd.grad(run(), logits)


def seconds(run: Run, logits: Tensor, number: int) -> float:
    """Time of some steps: processor time of a CPU, which other programs disturb least, else until it is done."""
    if logits.device.type == "cpu":
        begin = time.process_time()
        for _ in range(number):
            step(run, logits)
        return time.process_time() - begin
    device = torch.get_device_module(logits.device.type)
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(number):
        step(run, logits)
    device.synchronize()
    return time.perf_counter() - begin


def peak(run: Run, logits: Tensor) -> float:
    """Largest number of bytes that a step holds beyond the logits, in copies of the logits."""
    size = logits.numel() * logits.element_size()
    if logits.device.type != "cpu":
        device = torch.get_device_module(logits.device.type)
        device.reset_peak_memory_stats()
        before = device.memory_allocated()
        step(run, logits)
        return (device.max_memory_allocated() - before) / size
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(run, logits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [each for each in json.loads(path.read_text())["traceEvents"] if each["name"] == "[memory]"]
    held, largest = 0, 0
    for event in sorted(events, key=lambda each: each["ts"]):
        held += event["args"]["Bytes"]
        largest = max(largest, held)
    return largest / size


def measure(name: str, run: Run, plain: Run, logits: Tensor, rounds: int) -> dict[str, object]:
    """Median ratio of times and quartiles, and the peak memory."""
    step(run, logits)
    both = {"own": run, "plain": plain}
    numbers = {key: max(1, round(ENOUGH / max(seconds(each, logits, 1), 1e-6))) for key, each in both.items()}
    ratios, times = [], []
    for turn in range(rounds):
        order = list(both) if turn % 2 else list(both)[::-1]
        pair = {key: seconds(both[key], logits, numbers[key]) / numbers[key] for key in order}
        ratios.append(pair["own"] / pair["plain"])
        times.append(pair["own"])
    ratios.sort()
    return {
        "shape": "x".join(map(str, logits.shape)),
        "name": name,
        "ratio": statistics.median(ratios),
        "lower": ratios[len(ratios) // 4],
        "upper": ratios[-1 - len(ratios) // 4],
        "milliseconds": 1000 * statistics.median(times),
        "memory": peak(run, logits),
    }


def runs(logits: Tensor, labels: Tensor, only: list[str]) -> dict[str, Run]:
    """Everything to measure at a shape."""
    found: dict[str, Run] = {REFERENCE: lambda: F.cross_entropy(logits, labels)}
    for base, build in ((Criterion, criterion_run), (LogitRegularizer, penalty_run)):
        for name, kind in kinds(base).items():
            if (not only or name in only) and (logits.shape[1] <= 1000 or name not in FEW_CLASSES):
                found[name] = build(name, kind, logits, labels)
    return found


def table(rows: list[dict[str, object]]) -> str:
    """Ratio and memory of all shapes as a Markdown table, the cheapest first."""
    shapes = list(dict.fromkeys(str(row["shape"]) for row in rows))
    cells = {(row["name"], row["shape"]): row for row in rows}
    names = sorted({str(row["name"]) for row in rows}, key=lambda name: _ratio(cells, name, shapes))
    lines = ["| | " + " | ".join(f"{shape}: time | memory" for shape in shapes) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(shapes))
    for name in names:
        found = [cells.get((name, shape)) for shape in shapes]
        values = " | ".join(f"{row['ratio']:.2f} | {row['memory']:.1f}" if row else "- | -" for row in found)
        lines.append(f"| `{name}` | {values} |")
    return "\n".join(lines)


def _ratio(cells: dict[tuple[object, object], dict[str, object]], name: str, shapes: list[str]) -> float:
    return max(float(str(cells[name, shape]["ratio"])) for shape in shapes if (name, shape) in cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="criteria and penalties; all by default")
    parser.add_argument("--shapes", nargs="*", metavar="BxC", default=["x".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--csv", type=Path, help="where to write all numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    begin, rows = time.perf_counter(), []
    for shape in arguments.shapes:
        torch.manual_seed(0)
        logits, labels = inputs(*map(int, shape.split("x")), device)
        for name, run in runs(logits, labels, arguments.only).items():
            rows.append(measure(name, run, reference_run(name, logits, labels), logits, arguments.rounds))
            shown = "{shape:>10} {name:22} {ratio:7.2f} [{lower:.2f}, {upper:.2f}] {milliseconds:9.2f} ms {memory:6.1f}"
            print(shown.format(**rows[-1]), flush=True)
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(f"\n{device}, {arguments.threads} thread(s), torch {torch.__version__}, {arguments.rounds} rounds,", end=" ")
    print(f"{time.perf_counter() - begin:.0f} s\n\n{table(rows)}")


if __name__ == "__main__":
    main()
