"""What each step callback must do to the weights, written as a plain loop over the public functions."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import (
    AdversarialTraining,
    Distillation,
    LogitRegularization,
    ObjectiveTraining,
    SharpnessAware,
)
from lightning_robust.distillation import KD
from lightning_robust.guards import buffers_restored
from lightning_robust.losses import MaxSup
from lightning_robust.objectives import TRADES
from lightning_robust.sharpness import ASAM, SAM, SharpnessMethod, WeightBackup, Weights, sharp_direction
from lightning_robust.training import derive_seed
from support.modules import CLASSES, loader, network

SEED = 3


def teacher(seed=99):
    torch.manual_seed(seed)
    return network(norm=True).eval()


def attack():
    return PGD(eps=0.1, steps=2, step_size=0.05)


def trades():
    return TRADES(beta=3.0, attack=PGD(eps=0.1, steps=2, step_size=0.05, loss="kl", random_start="normal"))


@dataclass
class Method:
    """A set of callbacks and the loss that they must amount to."""

    callbacks: Any
    adversarial: bool = False
    objective: bool = False
    penalty: bool = False
    teacher: bool = False
    sharp: SharpnessMethod | None = None

    def prepare(self, module, batch, seed, rank, epoch, index):
        """What is computed once per batch, at the unperturbed weights; returns the loss as a function of nothing."""
        x, y = batch

        def generator(salt):
            return torch.Generator().manual_seed(derive_seed(seed, rank, epoch, index, salt))

        if self.objective:
            objective = trades()
            prepared = objective.prepare(module, x, y, generator=generator("objective"))
            return lambda: objective(module, prepared).loss
        if self.adversarial:
            x = attack()(module, x, y, generator=generator("attack"))
        guide = teacher() if self.teacher else None

        def loss():
            logits = module(x)
            value = F.cross_entropy(logits, y)
            if guide is not None:
                with torch.no_grad():
                    target = guide(x)
                value = 0.1 * value + 0.9 * KD(temperature=2.0)(logits, target)
            if self.penalty:
                value = value + MaxSup(alpha=0.5)(logits)
            return value

        return loss


METHODS = {
    "sam": Method(lambda: [SharpnessAware(SAM(rho=0.2))], sharp=SAM(rho=0.2)),
    "asam": Method(lambda: [SharpnessAware(ASAM(rho=0.5))], sharp=ASAM(rho=0.5)),
    "adversarial": Method(lambda: [AdversarialTraining(attack())], adversarial=True),
    "maxsup": Method(lambda: [LogitRegularization(MaxSup(alpha=0.5))], penalty=True),
    "distill": Method(lambda: [Distillation(teacher(), KD(temperature=2.0))], teacher=True),
    "trades": Method(lambda: [ObjectiveTraining(trades())], objective=True),
    "all": Method(
        lambda: [
            # listed in the wrong order on purpose: stages decide; among losses the first listed is applied last
            LogitRegularization(MaxSup(alpha=0.5)),
            Distillation(teacher(), KD(temperature=2.0)),
            SharpnessAware(SAM(rho=0.2)),
            AdversarialTraining(attack()),
        ],
        adversarial=True,
        penalty=True,
        teacher=True,
        sharp=SAM(rho=0.2),
    ),
}


def train(module, method, *, epochs=2, batches=None, precision="32-true", accumulate=1, clip=None, seed=SEED, world=1):
    """Train as Lightning would with the method's callbacks; several ranks are simulated by averaging gradients.

    `batches[epoch][rank]` is a list of batches; by default one rank sees the standard loader.
    """
    module.train()
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    parameters = [p for p in module.parameters() if p.requires_grad]
    batches = batches or [[list(loader())] for _ in range(epochs)]
    for epoch in range(epochs):
        count = len(batches[epoch][0])
        for index in range(count):
            if index % accumulate == 0:
                optimizer.zero_grad()
            rank_gradients = [
                gradients_of(module, method, batches[epoch][rank][index], optimizer, scaler, precision, accumulate)(
                    str(seed), rank, epoch, index
                )
                for rank in range(world)
            ]
            for parameter, *gradients in zip(parameters, *rank_gradients, strict=True):
                gradient = torch.stack(gradients).mean(0) if world > 1 else gradients[0]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if (index + 1) % accumulate == 0 or index + 1 == count:
                scaler.unscale_(optimizer)
                if clip:
                    kind, size = clip
                    clipper = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}
                    clipper[kind](parameters, size)
                scaler.step(optimizer)
                scaler.update()
    return module


def gradients_of(module, method, batch, optimizer, scaler, precision, accumulate):
    def compute(seed, rank, epoch, index):
        with precision_context(precision):
            loss = method.prepare(module, batch, seed, rank, epoch, index)
            first = loss()
        weights = Weights.of(optimizer, module)
        if method.sharp is None:
            return torch.autograd.grad(scaler.scale(first / accumulate), weights.tensors)
        unit = 1.0 / scaler.scale(torch.ones(()))

        def gradient(value):
            return [g * unit for g in torch.autograd.grad(scaler.scale(value), weights.tensors)]

        def moved():
            with buffers_restored(module), precision_context(precision):
                return gradient(loss())

        direction = sharp_direction(method.sharp, weights, gradient(first), moved, WeightBackup())
        factor = scaler.scale(torch.ones(()) / accumulate)
        return [d * factor for d in direction]

    return compute


def precision_context(precision):
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    # as in Lightning, without the cache of low-precision weights: it changes where gradients of two forwards are summed
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype else contextlib.nullcontext()


def twin(module):
    return copy.deepcopy(module)


__all__ = ["CLASSES", "METHODS", "SEED", "Method", "teacher", "train", "twin"]
