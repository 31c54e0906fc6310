"""Optimizer-side methods under two-process DDP; started once by the tests, two processes at a time."""

import os

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_robust.callbacks import OrthogonalGradient, SharpnessAware
from lightning_robust.optimizers import AdaHessian
from lightning_robust.sharpness import SAM
from support.modules import Images, PlainModule, network, trainer
from support.ranks import WORLD, as_rank
from support.reference import SEED

OPTIONS = {"lr": 0.01, "eps": 1e-2, "update_each": 2, "n_samples": 2}


class SecondOrder(PlainModule):
    """AdaHessian in manual optimization."""

    def __init__(self, own_backward=False):
        super().__init__(norm=False)
        self.automatic_optimization = False
        self.own_backward = own_backward

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        graph = optimizer.needs_graph
        if self.own_backward:
            loss.backward(create_graph=graph)
        else:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(loss, create_graph=graph)
        optimizer.step()

    def configure_optimizers(self):
        return AdaHessian(self.parameters(), **OPTIONS)


CASES = {
    "adahessian": {"module": SecondOrder},
    "adahessian-own-backward": {"module": lambda: SecondOrder(own_backward=True)},
    "orthogonal": {"callbacks": lambda: [OrthogonalGradient()], "accumulate": 2, "clip": 0.3},
    "orthogonal-sam": {"callbacks": lambda: [OrthogonalGradient(), SharpnessAware(SAM(rho=0.2))]},
}


def plain_loop(rank):
    """AdaHessian with DDP and no Lightning."""
    torch.manual_seed(0)
    net = network(norm=False)
    ddp = DistributedDataParallel(net)
    optimizer = AdaHessian(net.parameters(), **OPTIONS)
    for _ in range(2):
        for x, y in batches(rank):
            optimizer.zero_grad()
            with ddp.no_sync():
                F.cross_entropy(ddp(x), y).backward(create_graph=optimizer.needs_graph)
            optimizer.step()
    return net.state_dict()


def batches(rank):
    """What the loader of a rank yields: every other sample, three at a time."""
    data = Images()
    return list(zip(data.x[rank::WORLD].split(3), data.y[rank::WORLD].split(3), strict=True))


def build(case):
    return case["module"]() if "module" in case else PlainModule(norm=False)


def main(folder):
    rank = int(os.environ["RANK"])
    for name, case in CASES.items():
        L.seed_everything(SEED)
        module = build(case)
        run = trainer(
            *case.get("callbacks", list)(),
            max_epochs=2,
            devices=WORLD,
            strategy=DDPStrategy(process_group_backend="gloo"),
            accumulate_grad_batches=case.get("accumulate", 1),
            gradient_clip_val=case.get("clip"),
        )
        sampler = torch.utils.data.DistributedSampler(Images(), WORLD, rank, shuffle=False)
        run.fit(module, DataLoader(Images(), batch_size=3, sampler=sampler))
        torch.save(module.net.state_dict(), folder / f"{name}_{rank}.pt")
    torch.save(plain_loop(rank), folder / f"adahessian-plain_{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
