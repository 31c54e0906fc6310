"""Mixout, a drop schedule and a penalty on weights under two-process DDP; started by the tests."""

import copy
import os

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_robust.callbacks import DropSchedule, Mixout, WeightRegularization
from lightning_robust.regularization import GOR
from support.modules import Images, PlainModule, trainer, weights_of
from support.ranks import WORLD, as_rank


class Watch(Callback):
    """The rate of the dropout layer, and which inputs of the head have their initial weights in the last step."""

    def __init__(self, module):
        self.initial = module.net[-1].weight.detach().clone()
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        head = pl_module.net[-1]
        with torch.no_grad():
            used = (head(torch.eye(20)) - head.bias).T
        self.replaced = (used - self.initial).abs().amax(0) < 1e-6
        self.rates += [layer.p for layer in pl_module.modules() if isinstance(layer, nn.Dropout)]


def fit(module, rank, *callbacks, **options):
    L.seed_everything(7, verbose=False)
    strategy = DDPStrategy(process_group_backend="gloo")
    sampler = DistributedSampler(Images(), WORLD, rank, shuffle=False)
    trainer(*callbacks, devices=WORLD, strategy=strategy, **options).fit(
        module, DataLoader(Images(), batch_size=6, sampler=sampler)
    )


def main(folder):
    rank = int(os.environ["RANK"])
    module = PlainModule(norm=False, dropout=0.1, seed=rank)  # the first process hands out its weights
    watch = Watch(PlainModule(norm=False, dropout=0.1, seed=0))
    fit(
        module,
        rank,
        Mixout(p=0.5),
        DropSchedule(0.5, kind="constant", cutoff_epochs=1, what="dropout"),
        watch,
        max_epochs=2,
    )
    penalised = PlainModule(norm=False)
    expected = copy.deepcopy(penalised)
    fit(penalised, rank, WeightRegularization(GOR(lam=0.5, min_filters=5)), max_steps=1)
    images, labels = Images().x[:12], Images().y[:12]  # the first batches of both processes
    loss = F.cross_entropy(expected.net(images), labels) + GOR(lam=0.5, min_filters=5)(expected.net)
    optimizer = expected.configure_optimizers()
    loss.backward()
    optimizer.step()
    torch.save(
        {
            "weights": weights_of(module),
            "rates": watch.rates,
            "replaced": watch.replaced,
            "penalised": weights_of(penalised),
            "expected": weights_of(expected),
        },
        folder / f"{rank}.pt",
    )


if __name__ == "__main__":
    as_rank(main, quiet=True)
