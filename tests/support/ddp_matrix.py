"""Runs every method under two-process DDP; started once by the tests, two processes at a time."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.sharpness import SAM, sharp_backward
from support.modules import Images, PlainModule, trainer
from support.ranks import WORLD, as_rank
from support.reference import METHODS, SEED


class Stochastic(PlainModule):
    """Skips a branch at random, differently on each rank: needs find_unused_parameters."""

    def __init__(self):
        super().__init__(norm=False)
        self.branch = nn.Linear(4, 4)

    def on_train_start(self):
        torch.manual_seed(SEED + self.global_rank)  # the strategy seeds all ranks alike

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        if torch.rand(()) < 0.5:
            logits = logits + self.branch(logits)
        return F.cross_entropy(logits, batch[1])


class Reentrant(PlainModule):
    """Re-entrant activation checkpointing, which hides gradients from autograd.grad."""

    def __init__(self):
        super().__init__(norm=False)

    def forward(self, x):
        hidden = checkpoint(self.net[:3], x.detach().requires_grad_(), use_reentrant=True)
        return self.net[3:](hidden)


class ManualSAM(PlainModule):
    """Manual optimization with the plain-PyTorch function."""

    def __init__(self):
        super().__init__(norm=False)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        sharp_backward(
            lambda: F.cross_entropy(self(batch[0]), batch[1]),
            SAM(rho=0.2),
            optimizer.optimizer,
            module=self,
            backward=self.manual_backward,
        )
        optimizer.step()


CASES = {
    **{name: {"method": name} for name in METHODS},
    **{f"{name}-accumulate-clip": {"method": name, "accumulate": 2, "clip": 0.3} for name in METHODS},
    "sam-static": {"method": "sam", "strategy": {"static_graph": True}},
    "sam-bucket-view": {"method": "sam", "accumulate": 2, "strategy": {"gradient_as_bucket_view": True}},
    "sam-synced": {"callbacks": lambda: [SharpnessAware(SAM(rho=0.2), sync_ascent=True)]},
    "all-norm": {"method": "all", "norm": True},
    "sam-reentrant": {"method": "sam", "module": Reentrant},
    "sam-reentrant-accumulate": {"method": "sam", "module": Reentrant, "accumulate": 2},
    "sam-manual": {"module": ManualSAM, "callbacks": list},
    "sam-unused": {"method": "sam", "module": Stochastic, "strategy": {"find_unused_parameters": True}},
}


def build(case):
    return case["module"]() if "module" in case else PlainModule(norm=case.get("norm", False))


def refused(module, callbacks, rank):
    """DDP options that re-entrant checkpoints cannot have; the weights stay as they were."""
    for option in ("static_graph", "find_unused_parameters"):
        strategy = DDPStrategy(process_group_backend="gloo", **{option: True})
        run = trainer(*callbacks, devices=WORLD, strategy=strategy)
        with pytest.raises(RuntimeError, match=f"{option}=True"):
            run.fit(module, DataLoader(Images(), batch_size=3))


def main(folder):
    rank = int(os.environ["RANK"])
    for name, case in CASES.items():
        L.seed_everything(SEED)
        module = build(case)
        callbacks = case["callbacks"]() if "callbacks" in case else METHODS[case["method"]].callbacks()
        torch.manual_seed(SEED + rank)  # the ranks' own draws
        run = trainer(
            *callbacks,
            max_epochs=2,
            devices=WORLD,
            strategy=DDPStrategy(process_group_backend="gloo", **case.get("strategy", {})),
            accumulate_grad_batches=case.get("accumulate", 1),
            gradient_clip_val=case.get("clip"),
        )
        if case.get("module") is Reentrant:
            refused(module, callbacks, rank)
        sampler = torch.utils.data.DistributedSampler(Images(), WORLD, rank, shuffle=False)
        run.fit(module, DataLoader(Images(), batch_size=3, sampler=sampler))
        torch.save(module.state_dict(), folder / f"{name}_{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
