"""One rank of DDP runs that watch their sharpness; `python -m support.ddp_sharpness FOLDER`."""

import os
from pathlib import Path

import lightning as L
import torch

from lightning_robust.callbacks import SharpnessMonitor
from support.modules import PlainModule, loader, trainer, weights_of
from support.ranks import as_rank

OPTIONS = {"trace_products": 3, "ascent_steps": 2}
RUNS = {
    "all": {"max_samples": None, "per_class": True, **OPTIONS},
    "differences": {"max_samples": None, "method": "finite-difference", **OPTIONS},
    "parts": {"max_samples": None, "batch_size": 5, **OPTIONS},
    "power": {"max_samples": None, "solver": "power", **OPTIONS},
    "one": {"max_samples": 1, **OPTIONS},  # the second rank has none
}


def main(folder: Path) -> None:
    ddp = {"strategy": "ddp", "devices": 2}
    result = {}
    for name, options in RUNS.items():
        run = trainer(SharpnessMonitor(**options), **ddp)
        run.validate(PlainModule(), loader(), verbose=False)
        result[name] = {key: value.item() for key, value in run.callback_metrics.items()}
    for name, monitors in {
        "without": [],
        "with": [
            SharpnessMonitor(every_n_steps=1, max_samples=11),
            SharpnessMonitor(data="train", every_n_steps=1, max_samples=7, ascent_steps=1),
        ],
    }.items():
        L.seed_everything(0)
        module = PlainModule(dropout=0.5)
        run = trainer(*monitors, max_epochs=2, **ddp)
        run.fit(module, loader(shuffle=True), loader())
        result[f"weights {name}"] = weights_of(module)
        result[f"metrics {name}"] = {key: value.item() for key, value in run.callback_metrics.items()}
    try:
        trainer(SharpnessMonitor(per_class=[0, 9]), **ddp).validate(PlainModule(), loader(), verbose=False)
    except ValueError as error:
        result["refusal"] = str(error)
    torch.save(result, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    as_rank(main)
