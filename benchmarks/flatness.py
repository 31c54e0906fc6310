# SPDX-License-Identifier: Apache-2.0
"""Where SGD, SAM and GAM end: test accuracy and sharpness, over several seeds.

Small residual networks on the digits of scikit-learn and, with --cifar, on a part of CIFAR-10 whose training labels are
partly wrong. All methods take the same number of epochs with the same batches, learning rates and weight decay, so SAM
computes twice and GAM four times as many gradients as SGD; --lengths adds SGD runs that are as much longer, and
shorter ones, of which validation picks a length. Each method is trained with every radius of its grid, and the radius
with the best mean accuracy on validation images (whose labels are as wrong as the training ones) is the one that is
reported; the test images take no part in that.

Sharpness is measured on the same training samples for all, with the labels that were trained on, in evaluation mode:
the largest eigenvalue of the Hessian of the mean loss, by Lanczos, and how much the loss rises within a ball of radius
--epsilon around the weights. A layer before a BatchNorm can be scaled without any change of the function, and the
Hessian shrinks with the square of the scale; "relative" is therefore the largest eigenvalue where each tensor is
measured in units of its own norm, which such a scaling does not change. The Hessian of cross-entropy also vanishes
where samples are fitted with certainty, whatever the weights: compare eigenvalues together with the training loss, and
see "unseen", the largest eigenvalue on validation samples, which nothing is fitted to. "learned" is the share of the
wrong labels that the network gives, "passes" the epochs times the gradients per step.

The file of --cifar is an .npz that `lightning_robust.data.read_npz` reads, of arrays or of encoded images.

    python benchmarks/flatness.py --cifar cifar10.npz --csv flatness.csv
    python benchmarks/flatness_table.py flatness.csv          the tables again, also of a run that is not finished
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
import torch
from flatness_table import Outcome, report, write
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_robust import sharpness
from lightning_robust.callbacks import SharpnessAware
from lightning_robust.data import ArrayDataModule, DigitsDataModule, channel_statistics, read_npz, stratified_split
from lightning_robust.models import ImageClassifier
from lightning_robust.sharpness import LossSurface, SharpnessMethod, epsilon_sharpness, lanczos

Samples = tuple[Tensor, Tensor]
RADII = {
    "digits": {"SAM": [0.05, 0.1, 0.2], "GAM": [0.1, 0.2, 0.4]},
    "cifar": {"SAM": [0.1, 0.2, 0.4], "GAM": [0.4, 0.8, 1.6]},
}


@dataclass(frozen=True)
class Task:
    """Data and how long to train on them.

    Attributes:
        key: its name in ``RADII``.
        name: how the table calls it.
        train: images and labels, wrong ones included.
        val: for the choice of the radius.
        test: for the accuracy.
        wrong: which training labels are wrong.
        epochs: of every method.
    """

    key: str
    name: str
    train: Samples
    val: Samples
    test: Samples
    wrong: Tensor
    epochs: int


@dataclass(frozen=True)
class Setting:
    """A method with one radius.

    Attributes:
        method: its name.
        rho: its radius.
        make: makes the rule for ``SharpnessAware``; none for SGD.
        passes: gradients per step, in multiples of SGD's.
        length: factor of the number of epochs.
    """

    method: str
    rho: float
    make: Callable[[], SharpnessMethod] | None = field(repr=False)
    passes: int
    length: float = 1.0


def digits_task(epochs: int, size: int) -> Task:
    """The digits, with a fifth of the training images for validation."""
    data = DigitsDataModule(image_size=size)
    train, test = data.load_train(), data.load_test()
    labels = torch.tensor([train[index][1] for index in range(len(train))])
    images = torch.stack([train[index][0] for index in range(len(train))])
    stay, held = stratified_split(labels, 0.2, seed=0)
    testing = [test[index] for index in range(len(test))]
    return Task(
        "digits",
        f"digits, {size}x{size}",
        (images[stay], labels[stay]),
        (images[held], labels[held]),
        (torch.stack([image for image, _ in testing]), torch.tensor([label for _, label in testing])),
        torch.zeros(len(stay), dtype=torch.bool),
        epochs,
    )


def cifar_task(path: str, images: int, noise: float, size: int, epochs: int) -> Task:
    """A part of CIFAR-10, of which ``noise`` of the training and validation labels are another class, drawn evenly."""
    splits, _ = read_npz(path)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(splits["train"][1]), generator=generator)[: images + images // 2]
    x, y = (tensor[chosen] for tensor in splits["train"])
    wrong = torch.rand(len(y), generator=generator) < noise
    shift = torch.randint(1, 10, (len(y),), generator=generator)
    y = torch.where(wrong, (y + shift) % 10, y)
    test_x, test_y = (tensor[:2000] for tensor in splits["test"])
    x, test_x = (shrunk(tensor, size) for tensor in (x, test_x))
    name = f"CIFAR-10, {images} images, {size}x{size}, {noise:.0%} wrong labels"
    return Task(
        "cifar", name, (x[:images], y[:images]), (x[images:], y[images:]), (test_x, test_y), wrong[:images], epochs
    )


def shrunk(images: Tensor, size: int) -> Tensor:
    """Float images in [0, 1], averaged down to ``size``."""
    images = images.float() / 255
    return images if images.shape[-1] == size else F.adaptive_avg_pool2d(images, size)


def grid(names: list[str], radii: dict[str, list[float]], lengths: bool) -> list[Setting]:
    """All settings of the methods that this version has."""

    def setting(name: str, rho: float) -> Setting:
        if name == "GAM":
            # the radius of the inner ascent is a tenth of the outer one, as in the official script for CIFAR-100
            return Setting(name, rho, lambda: sharpness.GAM(grad_norm_rho=rho, grad_rho=rho / 10), 4)
        return Setting(name, rho, lambda: getattr(sharpness, name)(rho=rho), 2)

    found = [Setting("SGD", 0.0, None, 1)]
    if lengths:
        found += [Setting("SGD, length chosen", 0.0, None, 1, length) for length in (0.25, 0.4, 0.6, 1)]
        found += [Setting(f"SGD, passes of {name}", 0.0, None, 1, length) for name, length in (("SAM", 2), ("GAM", 4))]
    return found + [setting(name, rho) for name in names if hasattr(sharpness, name) for rho in radii[name]]


def run(task: Task, setting: Setting, seed: int, args: argparse.Namespace) -> Outcome:
    """Train once and look at the end."""
    begin = time.process_time()
    L.seed_everything(seed, verbose=False)
    data = ArrayDataModule(
        train=task.train, val=task.val, test=task.test, num_classes=10, batch_size=args.batch_size, seed=seed
    )
    mean, std = channel_statistics(task.train[0])
    model = ImageClassifier(
        "resnet8_cifar",
        num_classes=10,
        in_chans=data.in_chans,
        mean=mean,
        std=std,
        optimizer=lambda params: torch.optim.SGD(params, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay),
        lr_scheduler="cosine",
        scheduler_interval="step",
    )
    epochs = round(task.epochs * setting.length)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[] if setting.make is None else [SharpnessAware(setting.make())],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    model.eval()
    val_logits, test_logits, train_logits = (logits_of(model, part[0]) for part in (task.val, task.test, task.train))
    hits = train_logits.argmax(1) == task.train[1]
    here, relative = surfaces(model, first(task.train, args.probe))
    unseen, _ = surfaces(model, first(task.val, args.probe))
    tops = [lanczos(surface, tolerance=0.03, max_products=60) for surface in (here, relative, unseen)]
    return Outcome(
        task=task.name,
        method=setting.method,
        rho=setting.rho,
        seed=seed,
        epochs=epochs,
        passes=setting.passes,
        val_accuracy=accuracy(val_logits, task.val[1]),
        val_loss=float(F.cross_entropy(val_logits, task.val[1])),
        test_accuracy=accuracy(test_logits, task.test[1]),
        train_accuracy=float(hits.float().mean()),
        wrong_learned=float(hits[task.wrong].float().mean()) if task.wrong.any() else float("nan"),
        train_loss=float(F.cross_entropy(train_logits, task.train[1])),
        eigenvalue=float(tops[0].values[0]),
        relative=float(tops[1].values[0]),
        unseen=float(tops[2].values[0]),
        rise=epsilon_sharpness(here, radius=args.epsilon, steps=5).absolute,
        weight_norm=float(nn.utils.parameters_to_vector(model.parameters()).norm()),
        products=sum(top.products for top in tops),
        seconds=time.process_time() - begin,
    )


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in batches."""
    return torch.cat([model(part) for part in images.split(500)])


def first(samples: Samples, count: int) -> Samples:
    """The first samples."""
    return samples[0][:count], samples[1][:count]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return float((logits.argmax(1) == labels).float().mean())


def surfaces(model: nn.Module, samples: Samples) -> tuple[LossSurface, LossSurface]:
    """The loss as a function of the weights, and of each tensor's displacement in units of its norm."""
    images, labels = samples
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    norms = {name: weight.norm() for name, weight in weights.items()}
    moves = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in weights.items()}

    def moved() -> Tensor:
        at = {name: weight + norms[name] * moves[name] for name, weight in weights.items()}
        return F.cross_entropy(functional_call(model, at, (images,)), labels)

    return (
        LossSurface(lambda: F.cross_entropy(model(images), labels), model),
        LossSurface(moved, list(moves.values()), module=model),
    )


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cifar", default=None, help=".npz file with CIFAR-10; without it only the digits")
    parser.add_argument("--tasks", nargs="+", default=["digits", "cifar"], choices=["digits", "cifar"])
    parser.add_argument("--methods", nargs="+", default=["SAM", "GAM"], choices=["SAM", "GAM"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sam-rho", nargs="+", type=float, default=None, help="radii to try")
    parser.add_argument("--gam-rho", nargs="+", type=float, default=None)
    parser.add_argument("--lengths", action="store_true", help="add SGD with 1/4 to 4 times the epochs")
    parser.add_argument("--epochs", type=int, default=20, help="on CIFAR-10")
    parser.add_argument("--digits-epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000, help="training images of CIFAR-10")
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong training labels of CIFAR-10")
    parser.add_argument("--size", type=int, default=16, help="side to which CIFAR-10 is averaged down; 32 as it is")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--probe", type=int, default=256, help="training samples on which sharpness is measured")
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--csv", default=None, help="write one line per run")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks = [digits_task(args.digits_epochs, size=8)] if "digits" in args.tasks else []
    if "cifar" in args.tasks and args.cifar is not None:
        tasks.append(cifar_task(args.cifar, args.images, args.noise, args.size, args.epochs))
    console = Console(width=190)
    console.print(
        f"resnet8_cifar, SGD with momentum 0.9, lr {args.lr} (cosine), weight decay {args.weight_decay}, batches of "
        f"{args.batch_size}; rise within {args.epsilon}; torch {torch.__version__}, Lightning {L.__version__}"
    )
    outcomes: list[Outcome] = []
    for task in tasks:
        given = {"SAM": args.sam_rho, "GAM": args.gam_rho}
        radii = {name: given[name] or usual for name, usual in RADII[task.key].items()}
        for seed in range(args.seeds):
            for setting in grid(args.methods, radii, args.lengths):
                outcomes.append(run(task, setting, seed, args))
                if args.csv is not None:
                    write(args.csv, outcomes)
        report(console, [outcome for outcome in outcomes if outcome.task == task.name])
    console.print(f"{sum(outcome.seconds for outcome in outcomes):.0f} s of processor time, all runs together")
    for name in args.methods:
        if not hasattr(sharpness, name):
            console.print(f"This version has no {name}; left out.")


if __name__ == "__main__":
    main()
