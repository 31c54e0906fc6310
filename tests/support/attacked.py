"""Small classifiers that attacks are tried on."""

import torch
from torch import nn

CLASSES, SIZE = 4, 6


class CountingNet(nn.Module):
    """Conv, BatchNorm, dropout; counts its forwards and the images that went through them."""

    def __init__(self, classes=CLASSES, dropout=0.0, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6 * SIZE * SIZE, classes)
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        hidden = torch.tanh(self.norm(self.conv(x)))
        return self.head(self.dropout(hidden.flatten(1)))


def images(count=8, dtype=torch.float32, classes=CLASSES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (count,), generator=generator)


def snapshot(module):
    """Everything an attack must leave alone."""
    return {
        **{f"value {name}": tensor.clone() for name, tensor in module.state_dict().items()},
        **{f"gradient {name}": None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        **{f"trainable {name}": p.requires_grad for name, p in module.named_parameters()},
        **{f"mode {name}": child.training for name, child in module.named_modules()},
    }


def differences(module, before, ignore=()):
    after = snapshot(module)
    assert before.keys() == after.keys()
    return [
        key
        for key, value in before.items()
        if not any(part in key for part in ignore)
        and not (torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value is after[key])
    ]
