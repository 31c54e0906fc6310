"""Runs sharp_backward on parameters sharded by fully_shard; started once by the tests, two processes at a time."""

import contextlib
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from lightning_robust.sharpness import ASAM, GAM, GSAM, SAM, sharp_backward
from support.ranks import WORLD
from support.sharded_lightning import sharded_runs

METHODS = {
    "sam": lambda: SAM(rho=0.5),
    "asam": lambda: ASAM(rho=0.5),
    "gsam": lambda: GSAM(rho=0.1),
    "gam": lambda: GAM(grad_rho=0.05),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 7, dtype=torch.float64), nn.Tanh())
        self.head = nn.Linear(7, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))  # leaves the second process an empty shard
        self.unused = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.body(x)) * self.scale


def build(sharded, **options):
    net = Net()
    if sharded:
        fully_shard(net.body, **options)
        fully_shard(net, **options)
    return net


def batch(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def shares(sharded, number):
    x, y = batch(number)
    if not sharded:
        return x, y
    size = len(x) // WORLD
    own = slice(size * distributed.get_rank(), size * (distributed.get_rank() + 1))
    return x[own], y[own]


def whole(net):
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone() for p in net.parameters()]


def train(net, method, *, sharded, accumulate=1, clip=None, steps=3):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = shares(sharded, step * accumulate + part)

            def closure(x=x, y=y):
                with torch.no_grad():
                    net(x)  # leaves gathered weights behind
                return F.cross_entropy(net(x), y)

            sharp_backward(closure, method, optimizer, module=net, accumulate=accumulate)
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return whole(net)


def after_exception():
    """Weights, gradients and the next forward after the second pass failed half-way."""
    net, plain = build(True), build(False)
    x, y = shares(True, 0)
    passes = []
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)

    def closure():
        passes.append(None)
        loss = F.cross_entropy(net(x), y)
        if len(passes) == 2:
            raise KeyError("second pass")
        return loss

    with contextlib.suppress(KeyError):
        sharp_backward(closure, SAM(rho=0.5), net)
    kept = all(bool((p.grad.full_tensor() == 1).all()) for p in net.parameters())
    with torch.no_grad():
        return {
            "weights": whole(net),
            "clean": whole(plain),
            "kept": kept,
            "off": float((net(x) - plain(x)).abs().max()),
        }


def refusals():
    """What is said where a step cannot be right."""
    said = {}
    x, y = shares(True, 0)

    def attempt(name, net, parameters=None, module=None):
        try:
            sharp_backward(lambda: F.cross_entropy(net(x), y), SAM(), parameters or net, module=module)
        except ValueError as error:
            said[name] = str(error)

    attempt("no module", net := build(True), list(net.parameters()))
    net = build(True)
    net.set_requires_gradient_sync(False)
    attempt("no sync", net)
    F.cross_entropy(net(x), y).backward()
    net.set_requires_gradient_sync(True)
    attempt("pending", net)
    net = Net()
    fully_shard(net, ignored_params={net.scale})
    attempt("mixed", net)
    return said


def main(folder):
    distributed.init_process_group("gloo")
    found = {}
    for name, method in METHODS.items():
        found[name] = [train(build(sharded), method(), sharded=sharded) for sharded in (True, False)]
        options = {"accumulate": 2, "clip": 0.3}
        found[f"{name} accumulate clip"] = [
            train(build(sharded), method(), sharded=sharded, **options) for sharded in (True, False)
        ]
    kept_whole = build(True, reshard_after_forward=False)
    kept_whole.set_reshard_after_backward(False)
    found["gathered copies kept"] = [train(kept_whole, SAM(rho=0.5), sharded=True), found_plain(SAM(rho=0.5))]
    found["exception"] = after_exception()
    found["refusals"] = refusals()
    found |= sharded_runs()
    torch.save(found, Path(folder) / f"rank{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


def found_plain(method):
    return train(build(False), method, sharded=False)


if __name__ == "__main__":
    main(sys.argv[1])
