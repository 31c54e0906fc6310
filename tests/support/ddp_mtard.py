"""Fits with MTARD; `python -m support.ddp_mtard FOLDER` under torchrun's variables is one rank of a DDP run."""

import os
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import ObjectiveTraining
from lightning_robust.data import EpochSampler, ResumableDataLoader
from lightning_robust.objectives import MTARD
from support.modules import Images, PlainModule, network, trainer, weights_of
from support.ranks import WORLD, as_rank

SAMPLES, BATCH, EPOCHS = 32, 8, 2


def teacher(seed, scale):
    torch.manual_seed(seed)
    net = network(norm=True)
    with torch.no_grad():
        net[-1].weight.mul_(scale)
    return net


def mtard(**options):
    told = {"attack": PGD(eps=0.05, steps=2, random_start=False), "weight_lr": 0.2, "temperature_lr": 0.05}
    return MTARD(teacher(7, 8.0), teacher(8, 2.0), **(told | options))


class Trajectory(L.Callback):
    """Weights and temperatures after each optimizer step."""

    def __init__(self, objective):
        self.objective, self.seen = objective, []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.seen):
            balances = self.objective.loss_balance.weights, self.objective.temperature_balance.temperatures
            self.seen.append(torch.cat(balances).clone())


def fit(*callbacks, objective=None, batches=None, norm=False, ckpt_path=None, **options):
    """A short run; its module, its objective and its trajectory."""
    objective = mtard() if objective is None else objective
    module, trajectory = PlainModule(norm=norm), Trajectory(objective)
    run = trainer(ObjectiveTraining(objective), *callbacks, trajectory, **({"max_epochs": EPOCHS} | options))
    if batches is None:
        batches = ResumableDataLoader(Images(SAMPLES), BATCH, sampler=EpochSampler(Images(SAMPLES), seed=0))
    run.fit(module, batches, ckpt_path=ckpt_path)
    return module, objective, torch.stack(trajectory.seen), run


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    # with these samplers and half the batch size both ranks together see what one process sees
    sampler = torch.utils.data.DistributedSampler(Images(SAMPLES), WORLD, rank, shuffle=False)
    result = {}
    for name, accumulate in (("plain", 1), ("accumulated", 2)):
        halves = DataLoader(Images(SAMPLES), BATCH // WORLD // accumulate, sampler=sampler)
        ddp = {"strategy": "ddp", "devices": WORLD, "use_distributed_sampler": False}
        module, _, trajectory, run = fit(
            objective=mtard(weights_from="previous-step" if accumulate > 1 else "this-step"),
            batches=halves,
            accumulate_grad_batches=accumulate,
            **ddp,
        )
        logged = {key: float(value) for key, value in run.callback_metrics.items()}
        result[name] = {"weights": weights_of(module), "trajectory": trajectory, "logged": logged}
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main)
