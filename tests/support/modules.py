"""LightningModules written the way people write them; none of them knows about lightning-robust."""

import lightning as L
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CLASSES, CHANNELS, SIZE = 4, 2, 6


class Images(Dataset):
    """Deterministic images in [0, 1] with labels that can be learned, as pairs or as dictionaries."""

    def __init__(self, length=24, form="pair", seed=0, classes=CLASSES):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(classes, (length,), generator=generator)
        noise = torch.rand(length, CHANNELS, SIZE, SIZE, generator=generator)
        self.x = (0.5 * noise + 0.5 * self.y.view(-1, 1, 1, 1) / classes).clamp(0, 1)
        self.form = form

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        if self.form == "dict":
            return {"image": self.x[index], "label": self.y[index], "id": index}
        if self.form == "triple":
            return self.x[index], self.y[index], index
        return self.x[index], self.y[index]


def loader(length=24, batch_size=6, form="pair", shuffle=False, seed=0):
    return DataLoader(Images(length, form, seed), batch_size=batch_size, shuffle=shuffle)


def network(norm=True, dropout=0.0):
    layers = [nn.Conv2d(CHANNELS, 5, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(5))
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(20, CLASSES))


class PlainModule(L.LightningModule):
    """forward + self(x), metrics objects inside training_step, SGD with momentum."""

    def __init__(self, norm=True, dropout=0.0, lr=0.1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = network(norm, dropout)
        self.lr = lr
        self.train_acc = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch[0], batch[1]
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch[0], batch[1]
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)


class DictModule(PlainModule):
    """Dictionary batches, returned dictionaries, self.net(x), several parameter groups, AdamW and a scheduler."""

    def training_step(self, batch):
        logits = self.net(batch["image"])
        loss = F.cross_entropy(logits, batch["label"])
        self.log_dict({"train_loss": loss}, on_step=True, on_epoch=True)
        return {"loss": loss, "seen": batch["id"]}

    def validation_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.net(batch["image"]), batch["label"])}

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "lr": 0.005}], lr=0.01
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class CollectionModule(PlainModule):
    """No forward at all, a MetricCollection, a shared criterion attribute, a triple batch."""

    forward = L.LightningModule.forward

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.classification.MulticlassAccuracy(CLASSES),
                "precision": torchmetrics.classification.MulticlassPrecision(CLASSES),
            },
            prefix="train_",
        )

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        logits = self.net(x)
        self.metrics.update(logits, y)
        return self.criterion(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val_loss", self.criterion(self.net(x), y))

    def on_train_epoch_end(self):
        self.log_dict(self.metrics.compute())
        self.updates = self.metrics["acc"].update_count
        self.metrics.reset()


class ManualModule(PlainModule):
    """Manual optimization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()


def trainer(*callbacks, **kwargs):
    """A quiet CPU Trainer for tests."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])
