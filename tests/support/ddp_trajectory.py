"""One rank of DDP runs with methods that remember; `python -m support.ddp_trajectory FOLDER`, see `launch`."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import MESA, SAF, Criterion, ObjectiveTraining
from lightning_robust.data import EpochSampler, ResumableDataLoader
from lightning_robust.losses import ELR, PSKD
from lightning_robust.objectives import ADR, AdversarialCrossEntropy
from lightning_robust.sharpness import LogitHistory, trajectory
from lightning_robust.training import PerSampleCallback, Stage
from support.modules import CollectionModule, Images, PlainModule, trainer
from support.ranks import WORLD, as_rank

SAMPLES, EPOCHS, BATCHES = 21, 4, 4  # 11 samples per rank, one of them twice; the last batch has 2
STEPS = (2, BATCHES, 6, 11)  # in the first epoch, at its end, in the middle and near the end of others
CALLBACKS = {
    "saf": lambda: SAF(weight=2.0, temperature=2.0, start_epoch=0, lag=1),
    "elr": lambda: Criterion(ELR(beta=0.5)),
    "pskd": lambda: Criterion(PSKD(alpha=1.0)),
    "mesa": lambda: MESA(weight=2.0, temperature=2.0, start_epoch=0, decay=0.8),
    "adr": lambda: ObjectiveTraining(
        ADR(objective=AdversarialCrossEntropy(attack=PGD(eps=0.1, steps=1, mode="train")), decay=0.8)
    ),
}


def shuffled(rank):
    data = Images(SAMPLES)
    return ResumableDataLoader(data, 3, sampler=EpochSampler(data, seed=7, num_replicas=WORLD, rank=rank))


def ddp():
    return {"devices": WORLD, "strategy": DDPStrategy(process_group_backend="gloo")}


def fit(name, folder, rank, ckpt_path=None):
    L.seed_everything(3)
    module = PlainModule(norm=name in ("mesa", "adr"))
    callback = CALLBACKS[name]()
    saving = ModelCheckpoint(dirpath=folder / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(callback, saving, max_epochs=EPOCHS, enable_checkpointing=True, **ddp())
    run.fit(module, shuffled(rank), ckpt_path=ckpt_path)
    assert run.global_step == EPOCHS * BATCHES
    return {"weights": dict(module.named_parameters()), "state": flat(callback.state_dict())}


def flat(state):
    """The values of nested dictionaries under their innermost names."""
    found = {}
    for name, value in state.items():
        found.update(flat(value) if isinstance(value, dict) else {name: value})
    return found


class Told(PerSampleCallback):
    """Keeps the indices that it is told and those in the batch."""

    stage = Stage.LOSS
    needs_logits = True

    def __init__(self):
        super().__init__()
        self.pairs = []

    def around_step(self, context, batch, run):
        output = run(batch)
        self.pairs.append((self.indices_of(context, len(batch[2])), batch[2]))
        return output


def injected_sampler():
    told = Told()
    loader = DataLoader(Images(SAMPLES, form="triple"), 3, shuffle=True, num_workers=1)
    trainer(told, max_epochs=2, **ddp()).fit(CollectionModule(), loader)
    return told.pairs


def merged(rank, dtype):
    """Different numbers of batches and rows, samples that both ranks or none have seen, and a second merge."""
    trajectory.ROWS = 4  # several portions
    history = LogitHistory(11, 2, lag=1, dtype=dtype)
    history.record(torch.tensor([0, 1, 2]), torch.full((3, 2), 10.0 + rank), epoch=0)  # both: the second rank is later
    if rank == 0:
        history.record(torch.tensor([2, 7]), torch.full((2, 2), -5.5), epoch=0)  # only here, and later
    history.merge(epoch=0)
    history.record(torch.tensor([4 + rank]), torch.full((1, 2), 20.0 + rank), epoch=0)
    history.merge(epoch=0)
    history.merge(epoch=0)
    return history.look_up(torch.arange(11), epoch=1)


def main(folder):
    rank = int(os.environ["RANK"])
    results = {"indices": injected_sampler()}
    for name in CALLBACKS:
        results[name] = {"whole": fit(name, folder, rank)}
        for step in STEPS:
            results[name][step] = fit(name, folder, rank, ckpt_path=folder / name / f"step={step}.ckpt")
    results["merged"] = {dtype: merged(rank, dtype) for dtype in ("float32", "bfloat16")}
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_rank(main, quiet=True)
