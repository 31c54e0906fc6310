"""The networks, attacks and optimizers that recordings of distillation describe."""

import re

import torch
from torch import Tensor, nn

from conformance.adapters.adversarial import TinyCNN, TinyMLP
from lightning_robust.attacks import PGD


def network(state: dict[str, Tensor], told: str = "") -> nn.Module:
    """A recorded network by the names of its parameters, in float64 and training mode.

    With numbers for names it is a plain sequence of layers, of which those without parameters are a Flatten in front
    and activations.
    """
    if "conv1.weight" in state:
        net: nn.Module = TinyCNN(state)
    elif "fc1.weight" in state:
        net = TinyMLP(state)
    else:
        net = sequence(state, nn.ReLU if "relu" in told.lower() else nn.Tanh)
    net.double().load_state_dict(state)
    return net.train()


def sequence(state: dict[str, Tensor], activation: type[nn.Module]) -> nn.Sequential:
    numbers = {int(name.partition(".")[0]) for name in state}
    layers: list[nn.Module] = []
    for place in range(max(numbers) + 1):
        if place not in numbers:
            layers.append(activation() if layers else nn.Flatten())
        elif f"{place}.running_mean" in state:
            layers.append(nn.BatchNorm1d(len(state[f"{place}.running_mean"])))
        else:
            outputs, inputs = state[f"{place}.weight"].shape
            layers.append(nn.Linear(inputs, outputs, bias=f"{place}.bias" in state))
    return nn.Sequential(*layers)


def number(text: str, pattern: str, default: float) -> float:
    found = re.search(pattern, text)
    return default if found is None else float(found[1])


def attack(told: str, **options) -> PGD:
    """The attack that a recording describes in words; where it says nothing, the published one."""
    return PGD(
        eps=number(told, r"eps ([\d.]+)/255", 8) / 255,
        step_size=number(told, r"step ([\d.]+)/255", 2) / 255,
        steps=int(number(told, r"PGD-(\d+)", 10)),
        norm="l2" if re.search(r"\bl_?2\b", told.lower()) else "linf",
        random_start="normal",
        mode="train" if "train mode" in told else "eval",
        **options,
    )


def start_scale(told: str) -> float:
    return number(told, r"x ?\+ ?([\d.]+) ?\*", 0.001)


def sgd(told: str, model: nn.Module) -> torch.optim.SGD:
    """The optimizer of a description such as ``SGD lr=0.1 momentum=0.9 wd=2e-4``; what it leaves out is 0."""
    patterns = (r"lr[ =]([\d.e-]+)", r"momentum[ =]([\d.e-]+)", r"(?:wd|weight_decay)[ =]([\d.e-]+)")
    lr, momentum, decay = (number(told, pattern, 0.0) for pattern in patterns)
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay, nesterov="nesterov" in told)
