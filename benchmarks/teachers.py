# SPDX-License-Identifier: Apache-2.0
"""Cost of learning from teachers: each method's training step against the passes that it cannot do without.

All variants take turns in one process on the same images. The floor of a method is the sum of the passes that its
formula asks for, each measured bare in the same round: forward and input gradient of the student in evaluation mode
(an attack step), forward and weight gradient in training mode, forward of a teacher, forward and input gradient of a
teacher. The printed numbers are medians of per-round ratios. Then the teacher of one method is replaced by a cache, and
computes in bfloat16.

Seconds are processor time, which other programs disturb least.

    python benchmarks/teachers.py --model resnet18 --teacher resnet34 --batch-size 64 --rounds 8
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import timm
import torch
from sam_overhead import Batch, bare_seconds, fit_seconds, lightning_seconds
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import Distillation, ObjectiveTraining, cache_teacher
from lightning_robust.distillation import DKD, KD, NKD, PLD, Teacher, TeacherSource
from lightning_robust.objectives import ADR, ARD, IADI, LTD, MTARD, RSLAD, AdaAD, AdversarialCrossEntropy

STEPS = 10  # of the attack


@dataclass(frozen=True)
class Passes:
    """What a step consists of."""

    student: float = 1  # forward and weight gradient
    bare_forward: float = 0  # forward of the student alone
    attack: float = 0  # forward and input gradient of the student
    teacher: float = 0  # forward
    attacked_teacher: float = 0  # forward and input gradient


def fastest(steps: int, work: Callable[[], object]) -> float:
    """Fewest seconds of some runs after a first one."""
    seconds = []
    for _ in range(steps + 1):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds[1:])


def input_gradient(net: torch.nn.Module, x: torch.Tensor) -> None:
    """Forward in evaluation mode and the gradient with respect to the images."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(net(x).logsumexp(1).sum(), x)


def primitives(student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch, steps: int) -> dict[str, float]:
    """Seconds of each kind of pass; the weights ask for no gradient in those that need none."""
    x, _ = batch
    found = {"student": bare_seconds(student.train(), batch, steps, 1)}
    for net, attacked, forward in ((student, "attack", "bare_forward"), (teacher, "attacked_teacher", "teacher")):
        net.eval().requires_grad_(False)
        found[attacked] = fastest(steps, lambda net=net: input_gradient(net, x))  # type: ignore[misc]
        with torch.no_grad():
            found[forward] = fastest(steps, lambda net=net: net(x))  # type: ignore[misc]
    student.train().requires_grad_(True)
    return found


def methods(teacher: Teacher) -> dict[str, tuple[Callable[[], L.Callback], Passes]]:
    """What is measured, and the passes that it is compared with."""

    def pgd(**options: str) -> PGD:
        return PGD(eps=8 / 255, step_size=2 / 255, steps=STEPS, **options)  # type: ignore[arg-type]

    ce, kl = pgd(random_start="normal"), pgd(random_start="normal", loss="kl")
    plain = AdversarialCrossEntropy(attack=pgd())
    one, two = Passes(teacher=1), Passes(student=2, attack=STEPS, teacher=2)
    attacked = Passes(attack=STEPS)
    return {
        "KD": (lambda: Distillation(teacher, KD()), one),
        "DKD": (lambda: Distillation(teacher, DKD()), one),
        "NKD": (lambda: Distillation(teacher, NKD()), one),
        "PLD": (lambda: Distillation(teacher, PLD()), one),
        "PGD-AT": (lambda: ObjectiveTraining(plain), attacked),
        "LTD": (lambda: ObjectiveTraining(LTD(teacher, objective=plain)), Passes(attack=STEPS, teacher=1)),
        "ADR": (lambda: ObjectiveTraining(ADR(objective=plain)), Passes(attack=STEPS, bare_forward=1)),
        "ARD": (
            lambda: ObjectiveTraining(ARD(teacher, attack=ce)),
            Passes(attack=STEPS, bare_forward=1, teacher=1),
        ),
        "RSLAD": (
            lambda: ObjectiveTraining(RSLAD(teacher, attack=kl)),
            Passes(student=2, attack=STEPS, teacher=1),
        ),
        "IAD-I": (lambda: ObjectiveTraining(IADI(teacher, attack=ce)), two),
        "MTARD": (lambda: ObjectiveTraining(MTARD(teacher, teacher, attack=ce)), two),
        "AdaAD": (
            lambda: ObjectiveTraining(AdaAD(teacher, attack=kl)),
            Passes(student=2, attack=STEPS, attacked_teacher=STEPS, teacher=2),
        ),
    }


def teacher_forms(
    network: torch.nn.Module, batch: Batch, folder: Path, copies: int
) -> tuple[TensorDataset, dict[str, Callable[[], L.Callback]]]:
    """The same teacher, live, in bfloat16 and as a cache of its answers to the batch."""
    x, y = batch
    data = TensorDataset(x.repeat(copies, 1, 1, 1), y.repeat(copies))
    silent = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    cache = cache_teacher(network, data, folder / "teacher", trainer=silent)
    return data, {
        "no teacher": L.Callback,
        "KD, float32": lambda: Distillation(network),
        "KD, bfloat16": lambda: Distillation(TeacherSource(network, dtype="bfloat16")),
        "KD, cache": lambda: Distillation(cache),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps per round, of which the fastest counts")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="waiting threads would count as processor time")
    parser.add_argument("--only", nargs="*", help="some of the methods")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    student, network = (timm.create_model(name, num_classes=10) for name in (args.model, args.teacher))
    batch = torch.rand(args.batch_size, 3, args.size, args.size), torch.randint(10, (args.batch_size,))
    print(
        f"{args.model} from {args.teacher}, batch {args.batch_size}, {args.size}x{args.size}, torch {torch.__version__}"
    )
    measured = methods(Teacher(network))
    chosen = {name: measured[name] for name in args.only or measured}
    rounds = [against_floor(chosen, student, network, batch, args.steps) for _ in range(args.rounds + 1)][1:]
    for name in chosen:
        print(f"{name:<8} {statistics.median(each[name] for each in rounds):.3f} x its passes")
    with tempfile.TemporaryDirectory() as folder:
        compare_forms(student, network, batch, Path(folder), args)


def against_floor(
    chosen: dict[str, tuple[Callable[[], L.Callback], Passes]],
    student: torch.nn.Module,
    network: torch.nn.Module,
    batch: Batch,
    steps: int,
) -> dict[str, float]:
    """A step of each method in multiples of its floor, in one round."""
    cost = primitives(student, network, batch, steps)
    found = {}
    for name, (make, passes) in chosen.items():
        floor = sum(count * cost[kind] for kind, count in asdict(passes).items())
        found[name] = lightning_seconds(student, batch, steps, [make()]) / floor
    return found


def compare_forms(
    student: torch.nn.Module, network: torch.nn.Module, batch: Batch, folder: Path, args: argparse.Namespace
) -> None:
    """Print what the teacher's form changes."""
    data, forms = teacher_forms(network, batch, folder, args.steps + 1)
    rounds = []
    for turn in range(args.rounds + 1):
        names = list(forms)[turn % len(forms) :] + list(forms)[: turn % len(forms)]  # none is always the first
        rounds.append(
            {name: fit_seconds(student, DataLoader(data, args.batch_size), [forms[name]()]) for name in names}
        )
    rounds = rounds[1:]
    for name in forms:
        ratio = statistics.median(seconds[name] / seconds["no teacher"] for seconds in rounds)
        print(f"{name:<14} {ratio:.3f} x a step without a teacher")


if __name__ == "__main__":
    main()
