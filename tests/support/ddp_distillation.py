"""One rank of DDP runs with losses that train parts; `python -m support.ddp_distillation FOLDER` under torchrun."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_robust.callbacks import Distillation
from lightning_robust.data import EpochSampler, ResumableDataLoader
from lightning_robust.distillation import DHKD, USKD, FeatureMSE
from support.modules import CLASSES, Images, PlainModule, trainer
from support.ranks import WORLD, as_rank
from support.teachers import teacher_network

SAMPLES, EPOCHS, BATCHES, SEED = 24, 2, 4, 3
STEPS = (2, BATCHES, 6)
# Sizes are said, so that the parts are the same however the run is started: DDP seeds once more before setup.
CALLBACKS = {
    "hint": lambda: Distillation(teacher_network(width=7), FeatureMSE("net.0", "0", student_width=5, teacher_width=7)),
    "aligned": lambda: Distillation(
        teacher_network(),
        DHKD(temperature=1.0, width=20, num_classes=CLASSES),
        weight=5.0,
        base_weight=1.0,
        align_gradients=True,
    ),
    "uskd": lambda: Distillation(None, USKD("net.0", mu=0.1), base_weight=1.0),
}


def shuffled(rank=0, world=1):
    data = Images(SAMPLES)
    sampler = EpochSampler(data, seed=7, num_replicas=world, rank=rank)
    return ResumableDataLoader(data, SAMPLES // BATCHES // world, sampler=sampler)


def fit(name, folder, loader, ckpt_path=None, **options):
    L.seed_everything(SEED)
    module, callback = PlainModule(norm=False), CALLBACKS[name]()
    saving = ModelCheckpoint(dirpath=folder / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(callback, saving, max_epochs=EPOCHS, enable_checkpointing=True, **options)
    run.fit(module, loader, ckpt_path=ckpt_path)
    assert run.global_step == EPOCHS * BATCHES
    assert callback.loss.state_dict()
    return {**module.state_dict(), **callback.loss.state_dict()}


def ranks(folder):
    rank = int(os.environ["RANK"])
    results = {}
    for name in CALLBACKS:
        for step in (None, *STEPS):
            options = {"devices": WORLD, "strategy": DDPStrategy(process_group_backend="gloo")}
            path = None if step is None else folder / "all" / name / f"step={step}.ckpt"
            where = folder / ("all" if step is None else f"from {step}")
            results.setdefault(name, {})["whole" if step is None else step] = fit(
                name, where, shuffled(rank, WORLD), path, **options
            )
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(ranks, quiet=True)
