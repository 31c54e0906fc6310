"""One rank of DDP runs with mixed samples; `python -m support.ddp_mixing FOLDER` under torchrun's variables."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F

from lightning_robust.callbacks import Criterion, ManifoldMixup, Mixing, SharpnessAware
from lightning_robust.data import EpochSampler, ResumableDataLoader
from lightning_robust.losses import DecoupledMixup
from lightning_robust.mixing import Mixup, TimmMixup
from lightning_robust.sharpness import SAM
from support.modules import CLASSES, Images, PlainModule, trainer
from support.ranks import WORLD, as_rank

SAMPLES, EPOCHS, BATCHES, SEED = 24, 2, 4, 3
STEPS = (2, BATCHES, 6)
LAYERS = ["net", "net.1", "net.4"]
CALLBACKS = {
    "mixup": lambda: [Mixing(Mixup(alpha=1.0), num_classes=CLASSES)],
    "timm": lambda: [Mixing(TimmMixup(cutmix_alpha=1.0), num_classes=CLASSES), SharpnessAware(SAM(rho=0.1))],
    "manifold": lambda: [ManifoldMixup(LAYERS, targets="hard"), Criterion(DecoupledMixup())],
}


class Soft(PlainModule):
    """Takes labels in any form."""

    def __init__(self):
        super().__init__(norm=False)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def shuffled(rank):
    data = Images(SAMPLES)
    return ResumableDataLoader(data, 3, sampler=EpochSampler(data, seed=7, num_replicas=WORLD, rank=rank))


def fit(name, folder, rank, ckpt_path=None):
    L.seed_everything(SEED)
    module = Soft()
    saving = ModelCheckpoint(dirpath=folder / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(
        *CALLBACKS[name](),
        saving,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    run.fit(module, shuffled(rank), ckpt_path=ckpt_path)
    assert run.global_step == EPOCHS * BATCHES
    return dict(module.named_parameters())


def main(folder):
    rank = int(os.environ["RANK"])
    results = {}
    for name in CALLBACKS:
        results[name] = {"whole": fit(name, folder, rank)}
        for step in STEPS:
            results[name][step] = fit(name, folder, rank, folder / name / f"step={step}.ckpt")
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
