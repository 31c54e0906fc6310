"""A fast module for tests of the command line: real digits, no timm."""

import lightning as L
import torch
from torch import Tensor, nn


class TinyClassifier(L.LightningModule):
    """Two linear layers; knows the number of classes from the data like ImageClassifier."""

    def __init__(self, *, num_classes: int = 10, in_chans: int = 1, width: int = 16, lr: float = 0.5) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Expected `width` to be an integer >= 1 but got {width}.")
        self.save_hyperparameters()
        self.num_classes = num_classes
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_chans, width), nn.ReLU(), nn.Linear(width, num_classes))
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
        self.log("val/acc", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
