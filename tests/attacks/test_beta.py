"""The best of targeted attacks on every wrong class."""

import pytest
import torch
from torch import nn

from lightning_robust.attacks import BETA, PGD
from support.attacked import CLASSES, CountingNet, images


@pytest.fixture
def net():
    torch.manual_seed(0)
    return CountingNet().double().eval()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_takes_the_best_end_point_of_all_classes(norm, net):
    x, _ = images(dtype=torch.float64)
    y = net(x).argmax(1)
    eps = {"linf": 0.01, "l2": 0.1, "l1": 0.5}[norm]
    options = {"eps": eps, "norm": norm, "steps": 4, "random_start": False, "step_size": eps / 3}
    attacked = BETA(**options)(net, x, y)
    rows = torch.arange(len(x))
    ends, reached = [], []
    for shift in range(1, CLASSES):
        wanted = (y + shift) % CLASSES
        end = PGD(**options, loss="margin")(net, x, y, towards=wanted)
        logits = net(end)
        ends.append(end)
        reached.append(logits[rows, wanted] - logits[rows, y])
    best = torch.stack(reached).argmax(0)
    assert len(best.unique()) > 1
    torch.testing.assert_close(attacked, torch.stack(ends)[best, rows], rtol=0, atol=1e-12)


def test_it_does_not_follow_a_class_that_leads_nowhere():
    def model(x):
        """Class 1 is close, but bounded; class 2 is far, and wins at the end of the budget."""
        return torch.cat([torch.full_like(x, 1.0), 0.9 + 0.05 * torch.tanh(-40 * (x - 0.5)), 10 * (x - 0.5)], 1)

    x, y = torch.full((3, 1), 0.5), torch.zeros(3, dtype=torch.int64)
    options = {"eps": 0.15, "steps": 10, "random_start": False}
    assert model(PGD(**options, loss="margin")(model, x, y)).argmax(1).tolist() == [0, 0, 0]
    assert model(BETA(**options)(model, x, y)).argmax(1).tolist() == [2, 2, 2]
    assert model(BETA(**options, classes=1)(model, x, y)).argmax(1).tolist() == [0, 0, 0]
    assert model(BETA(**options, classes=7)(model, x, y)).argmax(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize(("classes", "targets"), [(None, CLASSES - 1), (2, 2), (9, CLASSES - 1)])
def test_cost(classes, targets, net):
    x, y = images(dtype=torch.float64)
    attack = BETA(steps=3, classes=classes)
    attack(net, x, y)
    assert net.batches == [len(x)] * (1 + targets * 4)
    assert BETA(steps=3, classes=2).passes == 7.5
    assert BETA(steps=3).passes == 32


def test_rmsprop_divides_by_the_root_of_the_mean_square():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.rand(4, 5, dtype=torch.float64) / 2 + 0.25, torch.tensor([0, 1, 1, 0])
    attacked = BETA(eps=10.0, steps=5, step_size=1e-3, optimizer="rmsprop", random_start=False)(net, x, y)
    delta = nn.Parameter(torch.zeros_like(x))
    optimizer = torch.optim.RMSprop([delta], lr=1e-3, alpha=0.99, eps=1e-30, maximize=True)
    rows = torch.arange(4)
    for _ in range(5):
        optimizer.zero_grad()
        logits = net(x + delta)
        (logits[rows, 1 - y] - logits[rows, y]).sum().backward()
        optimizer.step()
    torch.testing.assert_close(attacked, x + delta.detach(), rtol=0, atol=1e-9)


def test_rmsprop_does_not_underflow():
    net = nn.Linear(5, 2)
    x, y = torch.full((4, 5), 0.5), torch.tensor([0, 1, 1, 0])
    moved = [
        BETA(eps=0.1, steps=3, step_size=0.01, optimizer="rmsprop", random_start=False)(model, x, y)
        for model in (net, lambda z: 1e-30 * net(z))
    ]
    assert float((moved[0] - x).abs().min()) > 0
    torch.testing.assert_close(moved[1], moved[0])


def test_probabilities_as_targets(net):
    x, _ = images(dtype=torch.float64)
    y = net(x).argmax(1)
    soft = 0.9 * nn.functional.one_hot(y, CLASSES).double() + 0.1 / CLASSES
    attack = BETA(eps=0.02, steps=3)
    index = torch.arange(len(x))
    assert torch.equal(attack(net, x, soft, indices=index), attack(net, x, y, indices=index))


def test_in_train_mode_statistics_move(net):
    net.train()
    x, y = images(dtype=torch.float64)
    BETA(steps=2, mode="train")(net, x, y)
    assert int(net.norm.num_batches_tracked) == 1 + 3 * 3
    BETA(steps=2, mode="train-frozen-stats")(net, x, y)
    assert int(net.norm.num_batches_tracked) == 1 + 3 * 3


def test_refusals(net):
    x, y = images(dtype=torch.float64)
    with pytest.raises(ValueError, match="BETA steers to every wrong class itself"):
        BETA()(net, x, y, towards=y)
    with pytest.raises(ValueError, match="Without a random start all restarts are the same"):
        BETA(restarts=2, random_start=False)
    with pytest.raises(ValueError, match="Expected `optimizer` to be one of 'steepest', 'rmsprop' but got 'adam'"):
        BETA(optimizer="adam")
    with pytest.raises(ValueError, match="Expected `classes` to be an integer >= 1 but got 0"):
        BETA(classes=0)
    with pytest.raises(ValueError, match="Expected `step_size` to be a finite number >= 0 but got -1"):
        BETA(step_size=-1)
    with pytest.raises(ValueError, match="Expected `steps` to be an integer >= 0 but got -1"):
        BETA(steps=-1)
