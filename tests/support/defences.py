"""Small trained classifiers of digits, and the ways to break a defence."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD

EPS = 0.1


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images and labels, test images and labels; images are [N, 1, 8, 8] in [0, 1]."""
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 48),
            nn.ReLU(),
            nn.Linear(48, 10),
        )


@cache
def _weights(attacked: bool, seed: int) -> dict[str, Tensor]:
    model = network(seed)
    x, y, _, _ = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    attack = PGD(eps=EPS, steps=5, step_size=EPS / 2)
    epochs = 12
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - epoch / epochs)
        for rows in torch.randperm(len(x), generator=generator).split(64):
            inputs = attack(model, x[rows], y[rows], generator=generator) if attacked else x[rows]
            loss = F.cross_entropy(model(inputs), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def trained(attacked: bool = False, seed: int = 0) -> nn.Sequential:
    """A network trained in a second or two, against PGD if asked; a new one for every call."""
    model = network(seed)
    model.load_state_dict(_weights(attacked, seed))
    return model.eval()


class Wrapped(nn.Module):
    """A classifier inside a defence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class GradientKiller(Wrapped):
    """The same answers, and a gradient of zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach()) + 0 * x.flatten(1).sum(1, keepdim=True)


class Quantiser(Wrapped):
    """Rounds its images; with a straight-through gradient if asked."""

    def __init__(self, model: nn.Module, levels: int = 4, *, straight_through: bool = False) -> None:
        super().__init__(model)
        self.levels, self.straight_through = levels, straight_through

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * self.levels).round() / self.levels
        return self.inner(x + (rounded - x).detach() if self.straight_through else rounded)


class Softmax(Wrapped):
    """Returns probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class Noise(Wrapped):
    """Adds noise to its images; the same in every forward if it has a seed."""

    def __init__(self, model: nn.Module, seed: int | None = None) -> None:
        super().__init__(model)
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return self.inner(x + 0.1 * torch.randn_like(x))


class Purifier(Wrapped):
    """Moves its images by a gradient of its own before it looks at them."""

    def __init__(self, model: nn.Module, how: str = "grad") -> None:
        super().__init__(model)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            own = x.detach().clone().requires_grad_()
            if self.how == "func":
                gradient = torch.func.grad(self._energy)(x.detach())
            elif self.how == "backward":
                self._energy(own).backward(inputs=[own])
                gradient = own.grad
            else:
                (gradient,) = torch.autograd.grad(self._energy(own), own)
        return self.inner((x + 0.05 * gradient.sign()).clamp(0, 1))

    def _energy(self, x: Tensor) -> Tensor:
        return self.inner(x).logsumexp(1).sum()


class Adapting(Wrapped):
    """Counts its forwards in a buffer and moves a weight, as test-time adaptation does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.register_buffer("seen", torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        with torch.no_grad():
            self.shift += 1e-3
        return self.inner(x) + self.shift


class BatchNormInTraining(Wrapped):
    """Normalises with the statistics of the batch whatever its mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        return self.inner(self.norm(x))


class Scaled(Wrapped):
    """The same answers with other logits."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__(model)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)
