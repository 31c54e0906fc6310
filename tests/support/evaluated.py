"""Attacks and data for tests of the command `eval`."""

from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import PGD, Problem


class CrashingPGD(PGD):
    """Fails at its third batch as long as there is a file `crash` in the working folder."""

    batches = 0

    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        CrashingPGD.batches += 1
        if CrashingPGD.batches == 3 and Path("crash").exists():
            raise RuntimeError("crashed on purpose")
        return super().run(problem, x_adv)


class ColourData(L.LightningDataModule):
    """Twelve small colour images of a thousand classes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.in_chans = 1000, 3

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(12)), batch_size=6)
