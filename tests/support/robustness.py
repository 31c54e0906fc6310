"""Models, data and attacks that robustness evaluations are tried on."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_robust.attacks import PGD

CLASSES = 4


def model(seed=0, dtype=torch.float64):
    """In float64, so that rounding does not depend on the size of a batch."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, CLASSES)
    )
    return net.to(dtype)


class Labelled(Dataset):
    """Images that the model above gets right, but for the first ones."""

    def __init__(self, length=61, wrong=9, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand(length, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            self.y = model(dtype=dtype).eval()(self.x).argmax(1)
        self.y[:wrong] = (self.y[:wrong] + 1) % CLASSES

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def batches(data, size=16, order=None):
    """Images and classes with their indices."""
    order = torch.arange(len(data)) if order is None else order
    return [(data.x[part], data.y[part], part) for part in order.split(size)]


def loader(data, size=16, **kwargs):
    return DataLoader(data, batch_size=size, **kwargs)


def weak(**kwargs):
    return PGD(**{"eps": 0.05, "steps": 2, **kwargs})


def strong(**kwargs):
    return PGD(**{"eps": 0.05, "steps": 10, "restarts": 2, "loss": "margin", **kwargs})


class Lying(PGD):
    """Returns a point farther away than it may."""

    def solve(self, problem, start=None):
        return super().solve(problem, start) + 0.1


class Chain(PGD):
    """An ensemble of two stages."""

    def stages(self, num_classes):
        return {"weak": weak(eps=self.eps), "strong": strong(eps=self.eps)}
