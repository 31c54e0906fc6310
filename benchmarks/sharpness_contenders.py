# SPDX-License-Identifier: Apache-2.0
"""The sharpness-aware steps that `sharpness_peers.py` compares: ours, and other people's optimizers where they are."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from sam_overhead import sgd
from torch import nn
from torch.nn import functional as F

from lightning_robust import callbacks, sharpness
from lightning_robust.attacks import PGD

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[], object]
Maker = Callable[[nn.Module, Batch], Step]
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
GAM = {"grad_rho": 0.02, "grad_norm_rho": 0.2, "beta0": 0.5, "beta1": 0.6, "gamma": 0.03}


@dataclass(frozen=True)
class Contender:
    """One implementation of one method.

    Attributes:
        family: what it computes; those of one family are compared with each other.
        name: whose it is.
        make: makes the step of a loop from a network and a batch.
        callbacks: makes the callbacks of a Trainer instead.
        passes: forward and backward passes per step; 0 if they are not all alike.
        cycle: steps that belong together, over which the time is averaged.
        epochs: a Trainer's epochs, of which the last one counts.
    """

    family: str
    name: str
    make: Maker | None = None
    callbacks: Callable[[], list[L.Callback]] | None = None
    passes: float = 1
    cycle: int = 1
    epochs: int = 1


class Constant:
    """What other implementations call a scheduler of the radius."""

    def __init__(self, value: float) -> None:
        self.value = value

    def step(self) -> float:
        """The radius."""
        return self.value


def loss_of(net: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of all contenders."""
    return F.cross_entropy(net(batch[0]), batch[1])


def bare(net: nn.Module, batch: Batch, passes: int = 1) -> Step:
    """The least that ``passes`` gradients and one update can cost."""
    optimizer, parameters = sgd(net), list(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(passes - 1):
            torch.autograd.grad(loss_of(net, batch), parameters)
        loss_of(net, batch).backward()
        optimizer.step()

    return step


def plain(name: str, **options: Any) -> Maker:
    """Our method in a loop."""

    def make(net: nn.Module, batch: Batch) -> Step:
        method = getattr(sharpness, name)(**options)
        optimizer, steps = sgd(net), count()

        def step() -> None:
            optimizer.zero_grad()
            sharpness.sharp_backward(lambda: loss_of(net, batch), method, optimizer, module=net, step=next(steps))
            optimizer.step()

        return step

    return make


def ours(family: str, class_name: str, passes: float = 2, cycle: int = 1, **options: Any) -> list[Contender]:
    """Our method in a loop and in a Trainer."""

    def sharp() -> list[L.Callback]:
        return [callbacks.SharpnessAware(getattr(sharpness, class_name)(**options))]

    return [
        Contender(family, "plain", make=plain(class_name, **options), passes=passes, cycle=cycle),
        Contender(family, "Lightning", callbacks=sharp, passes=passes, cycle=cycle),
    ]


def closure_of(net: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[..., torch.Tensor]:
    """Clear gradients, forward, backward; takes and ignores what some optimizers pass."""

    def closure(**_: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        return loss

    return closure


def two_step(module: str, name: str, **options: Any) -> Maker:
    """Optimizers whose caller runs the first pass: davda54 and pytorch_optimizer."""

    def make(net: nn.Module, batch: Batch) -> Step:
        cls = getattr(importlib.import_module(module), name)
        optimizer = cls(net.parameters(), torch.optim.SGD, **options, **SGD)
        closure = closure_of(net, batch, optimizer)

        def step() -> None:
            closure()
            optimizer.step(closure)

        return step

    return make


def with_closure(make_optimizer: Callable[[nn.Module], Any]) -> Maker:
    """Optimizers that run all passes themselves, by a closure."""

    def make(net: nn.Module, batch: Batch) -> Step:
        optimizer = make_optimizer(net)
        closure = closure_of(net, batch, optimizer)
        return lambda: optimizer.step(closure)

    return make


def with_set_closure(make_optimizer: Callable[[nn.Module], Any]) -> Maker:
    """Optimizers that are given loss function, images and labels."""

    def make(net: nn.Module, batch: Batch) -> Step:
        optimizer = make_optimizer(net)

        def step() -> None:
            optimizer.set_closure(F.cross_entropy, *batch)
            optimizer.step()

        return step

    return make


def official_asam(net: nn.Module, batch: Batch) -> Step:
    """SamsungLabs' class has an ascent and a descent step."""
    optimizer = sgd(net)
    asam = importlib.import_module("asam").ASAM(optimizer, net, rho=0.5, eta=0.01)

    def step() -> None:
        loss_of(net, batch).backward()
        asam.ascent_step()
        loss_of(net, batch).backward()
        asam.descent_step()

    return step


def official_gam(net: nn.Module) -> Any:
    """The class of xxgege reads its coefficients from the arguments of its script."""
    args = SimpleNamespace(
        grad_beta_1=GAM["beta1"], grad_beta_2=1 - GAM["beta0"], grad_beta_3=1 - GAM["beta1"], grad_gamma=GAM["gamma"]
    )
    radii = {"grad_rho_scheduler": Constant(GAM["grad_rho"]), "grad_norm_rho_scheduler": Constant(GAM["grad_norm_rho"])}
    return importlib.import_module("gam.gam").GAM(net.parameters(), sgd(net), net, args=args, **radii)


def gsam(module: str, name: str, alpha: str, **options: Any) -> Maker:
    """The official GSAM and its port."""

    def make_optimizer(net: nn.Module) -> Any:
        cls = getattr(importlib.import_module(module), name)
        return cls(net.parameters(), sgd(net), net, rho_scheduler=Constant(0.05), **{alpha: 0.4}, **options)

    return with_set_closure(make_optimizer)


def composer_sam(net: nn.Module) -> Any:
    """Composer's optimizer, without its Trainer."""
    return importlib.import_module("composer.algorithms.sam.sam").SAMOptimizer(sgd(net), rho=0.05)


def wsam(**options: Any) -> Maker:
    """The port of WSAM."""

    def make_optimizer(net: nn.Module) -> Any:
        cls = importlib.import_module("pytorch_optimizer").WSAM
        return cls(net, net.parameters(), torch.optim.SGD, rho=0.05, gamma=0.9, **options, **SGD)

    return with_closure(make_optimizer)


def pgd() -> L.Callback:
    """Adversarial training with a short attack."""
    return callbacks.AdversarialTraining(PGD(eps=8 / 255, step_size=4 / 255, steps=3))


def contenders() -> list[Contender]:
    """Everything that is measured, if it is there."""
    kozistr = "pytorch_optimizer"
    return [
        *ours("SAM", "SAM", rho=0.05),
        Contender("SAM", "davda54", two_step("sam", "SAM", rho=0.05), passes=2),
        Contender("SAM", "kozistr", two_step(kozistr, "SAM", rho=0.05), passes=2),
        Contender("SAM", "kozistr, foreach", two_step(kozistr, "SAM", rho=0.05, foreach=True), passes=2),
        Contender("SAM", "Composer", with_closure(composer_sam), passes=2),
        *ours("ASAM", "ASAM", rho=0.5, eta=0.01),
        Contender("ASAM", "official", official_asam, passes=2),
        *ours("ASAM, all weights", "ASAM", rho=2.0, eta=0.0, scaling="all"),
        Contender("ASAM, all weights", "davda54", two_step("sam", "SAM", rho=2.0, adaptive=True), passes=2),
        Contender("ASAM, all weights", "kozistr", two_step(kozistr, "SAM", rho=2.0, adaptive=True), passes=2),
        *ours("GSAM", "GSAM", rho=0.05, alpha=0.4),
        Contender("GSAM", "official", gsam("gsam", "GSAM", "gsam_alpha"), passes=2),
        Contender("GSAM", "kozistr", gsam(kozistr, "GSAM", "alpha"), passes=2),
        Contender("GSAM", "kozistr, foreach", gsam(kozistr, "GSAM", "alpha", foreach=True), passes=2),
        *ours("GAM", "GAM", passes=4, **GAM),
        Contender("GAM", "official", with_set_closure(official_gam), passes=4),
        *ours("WSAM", "WSAM", rho=0.05, gamma=0.9),
        Contender("WSAM", "kozistr", wsam(), passes=2),
        Contender("WSAM", "kozistr, foreach", wsam(foreach=True), passes=2),
        *ours("LookSAM", "LookSAM", passes=1.2, cycle=5, rho=0.1, interval=5),
        Contender("LookSAM", "kozistr", two_step(kozistr, "LookSAM", rho=0.1, k=5), passes=2, cycle=5),
        *ours("FriendlySAM", "FriendlySAM", rho=0.2, sigma=1.0, lmbda=0.6),
        Contender("FriendlySAM", "kozistr", two_step(kozistr, "FriendlySAM", rho=0.2, sigma=1.0, lmbda=0.6), passes=2),
        *ours("AWP", "AWP"),
        Contender(
            "AWP + PGD-3", "Lightning", callbacks=lambda: [callbacks.SharpnessAware(sharpness.AWP()), pgd()], passes=0
        ),
        Contender("PGD-3", "Lightning", callbacks=lambda: [pgd()], passes=0),
        Contender("SAF", "Lightning", callbacks=lambda: [callbacks.SAF(start_epoch=0, lag=1)], epochs=2),
        Contender("MESA", "Lightning", callbacks=lambda: [callbacks.MESA(start_epoch=0)], epochs=2),
        Contender("SGD", "Lightning", callbacks=list),
    ]
