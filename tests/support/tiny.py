"""A fast module for tests of the command line: real digits, no timm."""

import time

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.data import DigitsDataModule


class TinyClassifier(L.LightningModule):
    """Two linear layers; knows the number of classes from the data like ImageClassifier."""

    def __init__(self, *, num_classes: int = 10, in_chans: int = 1, width: int = 16, lr: float = 0.5) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Expected `width` to be an integer >= 1 but got {width}.")
        self.save_hyperparameters()
        self.num_classes = num_classes
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * in_chans, width), nn.ReLU(), nn.Linear(width, num_classes)
        )
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/acc", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class CrashAt(Callback):
    """Raises once a step is reached."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError(f"crashed on purpose at step {self.step}")


class SlowSteps(Callback):
    """Sleeps in every step."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: object) -> None:
        time.sleep(self.seconds)


class SevenClasses(DigitsDataModule):
    """Claims to have seven classes."""

    def __init__(self) -> None:
        super().__init__(image_size=8)
        self.num_classes = 7


class OwnData(TinyClassifier):
    """Brings its own loaders and no test set, as small projects do."""

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(32) % 10), batch_size=8)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.train_dataloader()
