# SPDX-License-Identifier: Apache-2.0
"""Attacks beside other people's: PGD-10, APGD-10 and -100, and AutoAttack, on the same model and the same samples.

Everything takes turns in one process, in a new random order every round; printed are medians over the rounds of the
ratio to something measured in the same round, so a busy machine disturbs all alike. Seconds are processor time of one
thread on the CPU.

"pgd" and "apgd" are divided by the least that their passes cost: a bare loop of as many forwards and input-backwards.
Labels are the model's own and eps is so small that no sample falls, so nobody saves time by leaving samples out.
"autoattack" trains a small network against PGD first, and counts how often each sample goes through it.

Other implementations are looked for in the folder --peers and otherwise in the environment; what is not there is listed
and left out. The folder can hold

    pip install --target FOLDER --no-deps torchattacks foolbox eagerpy gitpython gitdb smmap
    autoattack/ of fra31/auto-attack

    python benchmarks/attack_peers.py --peers FOLDER --rounds 5
    python benchmarks/attack_peers.py --peers FOLDER --parts autoattack --data cifar10.npz --eps 0.0314
"""

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import APGD, PGD, Attack, AutoAttack
from lightning_robust.data import ArrayDataModule, DigitsDataModule, ImageDataModule

Run = Callable[[], Tensor]
Maker = Callable[[nn.Module, Tensor, Tensor], Run]
Ensemble = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, dict[str, float]]]  # points, seconds per attack
TINY = 1e-6  # a budget in which nothing falls
STAGES = {"apgd": "apgd-ce", "apgd_targeted": "apgd-t", "fab": "fab-t", "square": "square"}


@dataclass(frozen=True)
class Contender:
    """An implementation: its name and what makes a run out of a model and samples."""

    name: str
    make: Maker


class Counted(nn.Module):
    """A model that counts the images which go through it forwards and backwards, and the calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.forwards = self.backwards = self.images_forward = self.images_backward = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        self.forwards += 1
        self.images_forward += len(x)
        return self.model(_Watched.apply(x, self))


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: Counted) -> Tensor:
        ctx.counted = counted
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.counted.backwards += 1
        ctx.counted.images_backward += len(gradients[0])
        return gradients[0], None


def seconds(run: Run) -> float:
    """Processor time."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def bare(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """PGD with nothing around it: no checks, no modes, no generators."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = torch.clamp(x_adv.detach() + eps / 4 * gradient.sign(), min=x - eps, max=x + eps).clamp(0, 1)
    return x_adv


def pgd_contenders(eps: float, steps: int) -> list[Contender]:
    """PGD of several packages; those that cannot be imported raise when made."""

    def of_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        import torchattacks

        attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps)
        return lambda: attack(x, y)

    def of_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=steps)
        return lambda: attack.run(wrapped, x, y, epsilon=eps)

    attack = PGD(eps=eps, step_size=eps / 4, steps=steps)
    return [
        Contender("bare loop", lambda model, x, y: lambda: bare(model, x, y, eps, steps)),
        Contender("lightning-robust", lambda model, x, y: lambda: attack(model, x, y)),
        Contender("torchattacks", of_torchattacks),
        Contender("foolbox", of_foolbox),
    ]


def apgd_contenders(eps: float, steps: int) -> list[Contender]:
    """APGD with the cross entropy."""

    def of_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        import torchattacks

        attack = torchattacks.APGD(model, norm="Linf", eps=eps, steps=steps, n_restarts=1, loss="ce")
        return lambda: attack(x, y)

    def of_authors(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        from autoattack.autopgd_base import APGDAttack

        attack = APGDAttack(model, n_iter=steps, norm="Linf", n_restarts=1, eps=eps, loss="ce", device="cpu")
        return lambda: attack.perturb(x, y)

    attack = APGD(eps=eps, steps=steps)
    return [
        Contender("bare loop", lambda model, x, y: lambda: bare(model, x, y, eps, steps)),
        Contender("lightning-robust", lambda model, x, y: lambda: attack(model, x, y)),
        Contender("official", of_authors),
        Contender("torchattacks", of_torchattacks),
    ]


def available(contenders: list[Contender], model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Run]:
    """The runs of those that are there; a line about each of the others."""
    runs = {}
    for contender in contenders:
        try:
            runs[contender.name] = contender.make(model, x, y)
        except ImportError as error:
            print(f"  {contender.name}: not there ({error})")
    return runs


def in_turns(runs: dict[str, Run], rounds: int) -> list[dict[str, float]]:
    """Seconds of each in each round."""
    measured = []
    for number in range(rounds):
        order = list(runs)
        random.Random(number).shuffle(order)
        measured.append({name: seconds(runs[name]) for name in order})
    return measured


def compare_loops(title: str, contenders: list[Contender], args: argparse.Namespace) -> None:
    """Print, for attacks of one kind, passes and the ratio to the bare loop."""
    torch.manual_seed(0)
    model = Counted(timm.create_model(args.model, num_classes=10)).eval()
    x = torch.rand(args.batch_size, 3, args.size, args.size)
    with torch.no_grad():
        y = model(x).argmax(1)
    print(f"\n{title}: {args.model}, batch {args.batch_size}, {args.size}x{args.size}, {args.rounds} rounds")
    runs = available(contenders, model, x, y)
    passes = {}
    for name, run in runs.items():  # warms up, too
        model.reset()
        run()
        passes[name] = f"{model.forwards:5} fwd {model.backwards:5} bwd"
    measured = in_turns(runs, args.rounds)
    for name in runs:
        ratios = [times[name] / times["bare loop"] for times in measured]
        spread = f"{min(ratios):.3f} .. {max(ratios):.3f}"
        print(f"  {name:<18} {passes[name]}   x bare loop {statistics.median(ratios):6.3f}   ({spread})")


@dataclass
class Outcome:
    """What an AutoAttack run left: who is robust, and where its time went."""

    robust: Tensor
    seconds: float
    forward: float
    backward: float
    stages: dict[str, float] = field(default_factory=dict)


@contextmanager
def timed(owner: Any, method: str, name: str, stages: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of a method of an object."""
    original = getattr(owner, method)

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            stages[name] = stages.get(name, 0.0) + time.process_time() - begin

    setattr(owner, method, measured)
    yield
    setattr(owner, method, original)


class TimedAutoAttack(AutoAttack):
    """AutoAttack that says where its time went."""

    def stages(self, num_classes: int) -> dict[str, Attack]:
        """The members, with a stopwatch."""
        self.spent: dict[str, float] = {}
        members = super().stages(num_classes)
        for name, member in members.items():
            timed(member, "solve", name, self.spent).__enter__()
        return members


def ours(version: str, eps: float) -> Ensemble:
    """Our AutoAttack."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        attack = TimedAutoAttack(version=version, eps=eps)
        return attack(model, x, y, indices=torch.arange(len(x))), attack.spent

    return run


def official(eps: float) -> Ensemble:
    """The authors' code."""
    from autoattack import AutoAttack as Peer

    def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        peer = Peer(model, norm="Linf", eps=eps, seed=0, verbose=False, version="standard", device="cpu")
        spent: dict[str, float] = {}
        for attribute, name in STAGES.items():
            timed(getattr(peer, attribute), "perturb", name, spent).__enter__()
        return peer.run_standard_evaluation(x, y, bs=len(x)), spent

    return run


def copied(eps: float) -> Ensemble:
    """The copy in torchattacks."""
    import torchattacks

    def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        peer = torchattacks.AutoAttack(model, norm="Linf", eps=eps, version="standard", n_classes=10, seed=0)
        return peer(x, y), {}

    return run


def outcome(run: Ensemble, model: Counted, x: Tensor, y: Tensor) -> Outcome:
    """Run once."""
    model.reset()
    begin = time.process_time()
    x_adv, stages = run(model, x, y)
    spent = time.process_time() - begin
    counts = model.images_forward / len(x), model.images_backward / len(x)
    with torch.no_grad():
        robust = (model(x_adv).argmax(1) == y) & (model(x).argmax(1) == y)
    return Outcome(robust, spent, *counts, stages)


def trained(data: ImageDataModule, eps: float, batches: int) -> nn.Module:
    """A small network after some batches of PGD adversarial training."""
    channels, side = data.in_chans, data.image_size
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attack = PGD(eps=eps, steps=5, step_size=eps / 2)
    epochs = chain.from_iterable(data.train_dataloader() for _ in count())
    for x, y, *_ in islice(epochs, batches):
        optimizer.zero_grad()
        F.cross_entropy(model(attack(model, x, y)), y).backward()
        optimizer.step()
    return model.eval()


def compare_autoattack(args: argparse.Namespace) -> None:
    """Print robust accuracies and times on the first test images."""
    torch.manual_seed(0)
    data: ImageDataModule
    if args.data == "digits":
        data = DigitsDataModule(image_size=16, batch_size=128, num_workers=0)
    else:
        data = ArrayDataModule(path=args.data, batch_size=128, num_workers=0)
    data.setup("fit")
    data.setup("test")
    model = Counted(trained(data, args.eps, args.batches))
    batches = [batch[:2] for batch in data.test_dataloader()]
    x, y = (torch.cat(parts)[: args.samples] for parts in zip(*batches, strict=True))
    print(f"\nAutoAttack linf eps {args.eps:.4f}: {args.data}, {len(x)} samples, {args.rounds} rounds")
    runs: dict[str, Ensemble] = {"ours": ours("standard", args.eps), "ours, fast": ours("fast", args.eps)}
    for name, make in (("official", official), ("torchattacks", copied)):
        try:
            runs[name] = make(args.eps)
        except ImportError as error:
            print(f"  {name}: not there ({error})")
    results: dict[str, list[Outcome]] = {name: [] for name in runs}
    for number in range(args.rounds):
        order = list(runs)
        random.Random(number).shuffle(order)
        for name in order:
            results[name].append(outcome(runs[name], model, x, y))
    with torch.no_grad():
        print(f"  clean accuracy {(model(x).argmax(1) == y).double().mean():.4f}")
    reference = results.get("official", results["ours"])
    for name, seen in results.items():
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(seen, reference, strict=True))
        last, other = seen[-1], reference[-1]
        differ = int((last.robust != other.robust).sum())
        print(
            f"  {name:<13} robust {last.robust.double().mean():.4f} ({differ} samples differ)  "
            f"{statistics.median(each.seconds for each in seen):7.2f} s, x reference {ratio:.3f}  "
            f"passes per sample {last.forward:.0f} fwd {last.backward:.0f} bwd"
        )
        print("    " + ", ".join(f"{stage} {spent:.2f} s" for stage, spent in last.stages.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--peers", default=None, help="folder with other implementations")
    parser.add_argument("--parts", nargs="*", default=["pgd", "apgd", "autoattack"])
    parser.add_argument("--model", default="resnet18", help="timm model of pgd and apgd")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="digits", help='of autoattack: "digits" or an .npz file')
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--batches", type=int, default=120, help="of 128 images, to train on")
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    if args.peers is not None:
        sys.path.append(args.peers)  # last, so that what the environment has is not replaced
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, one thread")
    if "pgd" in args.parts:
        compare_loops("PGD-10", pgd_contenders(TINY, 10), args)
    if "apgd" in args.parts:
        for steps in (10, 100):
            compare_loops(f"APGD-{steps}", apgd_contenders(TINY, steps), args)
    if "autoattack" in args.parts:
        compare_autoattack(args)


if __name__ == "__main__":
    main()
