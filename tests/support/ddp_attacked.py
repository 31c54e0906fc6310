"""One rank of a DDP run with attacks; `python -m support.ddp_attacked FOLDER` under torchrun's variables."""

import os
from pathlib import Path

import lightning as L
import torch

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import AdversarialTraining, ObjectiveTraining, OverfittingGuard, RobustnessMonitor
from lightning_robust.objectives import ELLEA, TRADES
from lightning_robust.training import Stage, StepCallback
from support.modules import PlainModule, loader, trainer, weights_of
from support.ranks import as_rank

LIMIT = 11  # uneven: the first rank attacks one image more


def attack():
    return PGD(eps=0.05, steps=3, random_start=False)


class Perturbations(StepCallback):
    """Keeps what the attack added."""

    stage = Stage.LOSS

    def __init__(self):
        super().__init__()
        self.kept = []

    def around_step(self, context, batch, run):
        self.kept.append((batch[0] - context.batch_as_loaded[0]).mean())
        return run(batch)


def main(folder: Path) -> None:
    ddp = {"strategy": "ddp", "devices": 2}
    result = {}
    module = PlainModule()
    (result["logged"],) = trainer(RobustnessMonitor(attack(), max_samples=LIMIT), **ddp).validate(
        module, loader(), verbose=False
    )
    for name, callbacks in {
        "adversarial": [AdversarialTraining(PGD(eps=0.05, steps=2)), Perturbations(), RobustnessMonitor(attack())],
        "objective": [ObjectiveTraining(TRADES(attack=PGD(eps=0.05, steps=2, loss="kl")))],
        # one image: nothing is left for the second rank, which logs and decides the same all the same
        "guard": [OverfittingGuard(attack(), max_samples=1, action="stop")],
        "elle-a": [ObjectiveTraining(ELLEA(attack=FGSM(eps=0.5, mode="train"), sensitivity=0.0))],
    }.items():
        L.seed_everything(0)
        module = PlainModule(norm=False)
        run = trainer(*callbacks, max_epochs=3 if name == "elle-a" else 1, **ddp)
        run.fit(module, loader(), loader())
        result[name] = weights_of(module)
        result[f"{name} metrics"] = {key: value.item() for key, value in run.callback_metrics.items()}
        for callback in callbacks:
            if name == "elle-a":
                result["elle-a state"] = callback.objective.state_dict()
            if isinstance(callback, Perturbations):
                result["perturbations"] = torch.stack(callback.kept)
    torch.save(result, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    as_rank(main)
