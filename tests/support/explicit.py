"""A small float64 problem whose gradients can be asked for at any weights, and a closure that records its passes."""

import io

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_robust.sharpness import sharp_backward

CLASSES = 3


class Net(nn.Module):
    """Parameters of every kind: an embedding, linear layers, LayerNorm, BatchNorm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 5)
        self.layer_norm = nn.LayerNorm(5)
        self.batch_norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, CLASSES)

    def forward(self, x):
        hidden = torch.tanh(self.layer_norm(self.first(self.embed(x).mean(1))))
        return self.last(self.batch_norm(hidden))


class Problem:
    """`batches` of token numbers and labels; weights are dictionaries by name."""

    def __init__(self, batches=12, seed=0, dtype=torch.float64):
        torch.manual_seed(seed)
        self.net = Net().to(dtype)
        self.batches = [(torch.randint(7, (6, 3)), torch.randint(CLASSES, (6,))) for _ in range(batches)]
        self.passes = []  # the weights of every pass since the last `closure`
        self.losses = []

    @property
    def weights(self):
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def gradient(self, weights, index):
        """Gradient at explicit weights; the network is not touched."""
        x, y = self.batches[index]
        leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
        buffers = {name: value.clone() for name, value in self.net.named_buffers()}
        loss = F.cross_entropy(functional_call(self.net, {**leaves, **buffers}, (x,)), y)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def closure(self, index, factor=1.0):
        """The loss of a batch, times `factor`."""
        x, y = self.batches[index]
        self.passes = []

        def loss():
            self.passes.append(self.weights)
            return F.cross_entropy(self.net(x), y) * factor

        return loss

    def offsets(self, position=1):
        """How far a pass was from the first one."""
        return {name: self.passes[position][name] - value for name, value in self.passes[0].items()}

    def grads(self):
        return {name: p.grad for name, p in self.net.named_parameters()}


def norm(vectors):
    """Of one vector made of all entries."""
    return sum(float((value.double() ** 2).sum()) for value in vectors.values()) ** 0.5


def flat(vectors):
    """One vector made of all entries."""
    return torch.cat([value.detach().flatten() for value in vectors.values()])


def plus(weights, offsets, scale=1.0):
    return {name: value + scale * offsets[name] if name in offsets else value for name, value in weights.items()}


def same(first, second, rtol=1e-10, atol=1e-13):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def identical(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def check_continued(make, first, steps):
    """A method made by `make` that was saved and loaded after `first` steps goes on as if nothing had happened."""
    problem, method, resumed = Problem(), make(), make()
    for step in range(first):
        sharp_backward(problem.closure(step), method, problem.net, step=step)
    state = through_file(method.state_dict())
    kept = through_file(state)
    resumed.load_state_dict(state)
    grads = []
    for each in (method, resumed):
        problem.net.zero_grad()
        for step in range(first, first + steps):
            sharp_backward(problem.closure(step), each, problem.net, step=step)
            grads.append({name: value.clone() for name, value in problem.grads().items()})
    assert all(identical(*pair) for pair in zip(grads[:steps], grads[steps:], strict=True))
    assert identical(state, kept)  # what was loaded is not written to


def through_file(state):
    """A state as a checkpoint holds it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
