"""One rank of DDP runs with the monitors of features, patterns and margins; under torchrun's variables."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from lightning_robust.callbacks import FeatureMonitor, MislabelMonitor, OverfittingMonitor
from lightning_robust.data import EpochSampler, ResumableDataLoader
from support.modules import Images, PlainModule, trainer
from support.ranks import WORLD, as_rank

SAMPLES, VAL, EPOCHS, BATCHES, STEP = 24, 30, 3, 4, 6


def shuffled(rank):
    data = Images(SAMPLES)
    return ResumableDataLoader(data, 3, sampler=EpochSampler(data, seed=7, num_replicas=WORLD, rank=rank))


def validation(rank):
    """The first rank gets twice as many samples as the other."""
    rows = range(20) if rank == 0 else range(20, VAL)
    return DataLoader(Subset(Images(VAL, seed=1), rows), 4)


def fit(folder, rank, ckpt_path=None):
    L.seed_everything(3)
    module = PlainModule(norm=False)
    mislabels = MislabelMonitor(dirpath=folder / ("resumed" if ckpt_path else "whole"))
    saving = ModelCheckpoint(dirpath=folder / "ckpt", every_n_train_steps=STEP, save_top_k=-1, filename="{step}")
    callbacks = [mislabels, FeatureMonitor(data="both"), OverfittingMonitor(every_n_batches=1)]
    run = trainer(
        *callbacks,
        saving,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )
    run.fit(module, shuffled(rank), validation(rank), ckpt_path=ckpt_path)
    return {
        "table": mislabels.table.state_dict(),
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "weights": dict(module.named_parameters()),
    }


def main(folder):
    rank = int(os.environ["RANK"])
    results = {"whole": fit(folder, rank)}
    results["resumed"] = fit(folder, rank, ckpt_path=folder / "ckpt" / f"step={STEP}.ckpt")
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
