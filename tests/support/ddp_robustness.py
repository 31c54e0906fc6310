"""One rank of a robustness evaluation; `python -m support.ddp_robustness FOLDER` under torchrun's variables."""

import os
from pathlib import Path

import lightning as L
import torch

from lightning_robust.attacks import PGD
from lightning_robust.callbacks import RobustEvaluation
from support.modules import trainer
from support.ranks import as_rank
from support.robustness import Chain, Labelled, loader, model


class Evaluated(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, x):
        return self.net(x)

    def test_step(self, batch, batch_idx):
        self(batch[0])


class KilledError(Exception):
    pass


class Kills(Chain):
    """Raises in its n-th call in a process."""

    left = 0

    def stages(self, num_classes):
        return {"first": First(eps=self.eps, steps=2), "second": PGD(eps=self.eps, steps=8)}


class First(PGD):
    def solve(self, problem, start=None):
        Kills.left -= 1
        if Kills.left == 0:
            raise KilledError
        return super().solve(problem, start)


def attacks():
    return {"chain": Kills(eps=0.03), "l2": PGD(norm="l2", eps=0.2, steps=3)}


def evaluated(folder=None, size=8, processes=1, mode="exact"):
    """The report of an evaluation, and what was logged."""
    callback = RobustEvaluation(
        attacks(), mode=mode, checks=None, display="off", state_dir=folder, save_every_s=0.0, batch_size=8
    )
    strategy = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    (logged,) = trainer(callback, **strategy).test(Evaluated(), loader(Labelled(), size), verbose=False)
    return callback.report, logged


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    # 61 samples: each of the two processes gets 31, one of them for the second time
    for mode in ("exact", "union"):
        report, logged = evaluated(processes=2, mode=mode)
        report.save(folder / f"{mode}-{rank}.json")
        torch.save(logged, folder / f"{mode}-{rank}.pt")
    # begun by one process, continued by two
    report, _ = evaluated(folder / "state", size=16, processes=2)
    report.save(folder / f"continued-{rank}.json")


if __name__ == "__main__":
    as_rank(main)
