"""One rank of DDP runs of methods that remember; `python -m support.ddp_memory FOLDER` under torchrun's variables."""

import os

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lightning_robust.callbacks import SharpnessAware
from lightning_robust.sharpness import FisherSAM, FriendlySAM, LookSAM, sharp_backward
from support.modules import Images, PlainModule, trainer
from support.ranks import WORLD, as_rank

SEED, EPOCHS, ACCUMULATE, INTERVAL = 3, 3, 2, 3
METHODS = {
    "friendly": lambda: FriendlySAM(rho=0.2),
    "looksam": lambda: LookSAM(rho=0.2, interval=INTERVAL),
    "fisher": lambda: FisherSAM(rho=0.2, keep_ratio=0.3, refresh_every=INTERVAL),
}


def rank_loader(rank):
    sampler = DistributedSampler(Images(), WORLD, rank, shuffle=False)
    return DataLoader(Images(), batch_size=3, sampler=sampler)


def by_trainer(make, loader, epochs=EPOCHS, ckpt_path=None, save=None, **options):
    """Weights and memory after training with the callback."""
    L.seed_everything(SEED)
    module, method = PlainModule(norm=False), make()
    run = trainer(SharpnessAware(method), max_epochs=epochs, accumulate_grad_batches=ACCUMULATE, **options)
    run.fit(module, loader, ckpt_path=ckpt_path)
    if save is not None:
        run.save_checkpoint(save)
    return dict(module.net.state_dict()), dict(method.state_dict())


def by_loop(make, loader, wrap=lambda module: module):
    """The same by a plain loop."""
    module, method = PlainModule(norm=False), make()
    optimizer = module.configure_optimizers()
    forward = wrap(module)
    step = 0
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            sharp_backward(
                lambda x=x, y=y: F.cross_entropy(forward(x), y),
                method,
                optimizer,
                module=module,
                step=step,
                accumulate=ACCUMULATE,
            )
            if (index + 1) % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    return dict(module.net.state_dict()), dict(method.state_dict())


def main(folder):
    rank = int(os.environ["RANK"])

    def ddp(make, **options):
        strategy = DDPStrategy(process_group_backend="gloo")
        return by_trainer(make, rank_loader(rank), devices=WORLD, strategy=strategy, **options)

    for name, make in METHODS.items():
        checkpoint = folder / f"{name}.ckpt"
        ddp(make, epochs=EPOCHS - 1, save=checkpoint)
        found = {
            "whole": ddp(make),
            "resumed": ddp(make, ckpt_path=checkpoint),
            "loop": by_loop(make, rank_loader(rank), DistributedDataParallel),
        }
        torch.save(found, folder / f"{name}_{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
