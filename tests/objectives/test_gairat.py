"""GAIRAT against its formula and a count written out."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ScheduledAttack
from lightning_robust.objectives import GAIRAT, gairat_weights
from lightning_robust.schedules import Constant
from support.attacked import CountingNet, images


@pytest.fixture
def net():
    return CountingNet().double().train()


def weights(kappa, steps, shift, assignment):
    """The formula in numpy."""
    kappa = np.asarray(kappa, dtype=np.float64)
    score = shift + (steps // 2 - kappa) * 5 / (steps // 2)
    raw = {
        "tanh": (np.tanh(score) + 1) / 2,
        "sigmoid": 1 / (1 + np.exp(-score)),
        "discrete": (steps + 1 - kappa) / (steps + 1),
    }[assignment]
    return torch.from_numpy(raw * len(raw) / raw.sum())


@pytest.mark.parametrize("assignment", ["tanh", "sigmoid", "discrete"])
@pytest.mark.parametrize(("steps", "shift"), [(10, -1.0), (7, 0.5), (2, -2.0)])
def test_weights(steps, shift, assignment):
    kappa = torch.arange(steps + 1, dtype=torch.float64)
    ours = gairat_weights(kappa, steps, shift=shift, assignment=assignment)
    torch.testing.assert_close(ours, weights(kappa, steps, shift, assignment), rtol=1e-9, atol=1e-14)
    assert (ours.diff() < 0).all()
    torch.testing.assert_close(ours.mean(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("assignment", ["tanh", "sigmoid", "discrete"])
def test_weights_at_the_edges(assignment):
    assert torch.equal(gairat_weights(torch.tensor([10]), 10, assignment=assignment), torch.ones(1))
    ours = gairat_weights(torch.tensor([0, 1]), 1, assignment=assignment)
    assert ours[0] > ours[1] > 0
    equal = gairat_weights(torch.full((3,), 10), 10, shift=-500.0, assignment=assignment)  # all underflow
    torch.testing.assert_close(equal, torch.ones(3))
    assert gairat_weights(torch.zeros(0), 10, assignment=assignment).shape == (0,)


@pytest.mark.parametrize("soft", [False, True])
def test_kappa_counts_the_iterates_that_are_right(net, soft):
    x, y = images(dtype=torch.float64)
    y = torch.where(torch.rand(8) < 0.5, net.eval()(x).argmax(1), y)  # right at first, some of them
    net.train().batches.clear()
    target = F.one_hot(y, 4).double() * 0.6 + 0.1 if soft else y
    attack = PGD(eps=0.15, steps=6)
    objective = GAIRAT(attack=attack, start_epoch=0)
    prepared = objective.prepare(net, x, target, generator=torch.Generator().manual_seed(0))
    assert net.batches == [8] * 6  # no pass of its own
    # the same attack with fewer steps stops at its iterates
    kappa = torch.zeros(8, dtype=torch.float64)
    for steps in range(6):
        short = PGD(eps=0.15, steps=max(steps, 1), step_size=attack.step_size if steps else 0.0)
        iterate = short(net, x, target, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            kappa += net.eval()(iterate).argmax(1) == y
        net.train()
    torch.testing.assert_close(prepared.extra["kappa"], kappa)
    assert len(kappa.unique()) > 2
    torch.testing.assert_close(prepared.extra["weights"], weights(kappa, 6, -1.0, "tanh"))


def test_loss_is_the_weighted_cross_entropy(net):
    x, y = images(dtype=torch.float64)
    objective = GAIRAT(attack=PGD(eps=0.2, steps=4), start_epoch=0)
    prepared = objective.prepare(net, x, y)
    output = objective(net, prepared)
    samples = F.cross_entropy(net(prepared.x_adv), y, reduction="none")
    torch.testing.assert_close(output.loss, (prepared.extra["weights"] * samples).mean())
    torch.testing.assert_close(output.logs["adversarial"], samples.mean().detach())
    assert objective.passes(1) == 5


def test_weights_begin_in_their_epoch(net):
    x, y = images(dtype=torch.float64)
    objective = GAIRAT(attack=PGD(steps=2), start_epoch=3)
    for epoch, weighted in ((0, False), (2, False), (3, True), (9, True)):
        objective.epoch_starts(epoch, 10)
        prepared = objective.prepare(net, x, y)
        assert ("weights" in prepared.extra) is weighted
    plain = objective(net, type(prepared)(x, y, prepared.x_adv))
    torch.testing.assert_close(plain.loss, F.cross_entropy(net(prepared.x_adv), y))


def test_published_defaults():
    objective = GAIRAT()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps, attack.random_start) == (0.031, 0.007, 10, True)
    assert (objective.shift, objective.assignment, objective.start_epoch) == (-1.0, "tanh", 59)
    assert "assignment='tanh'" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_epoch": -1}, "Expected `start_epoch` to be an integer >= 0"),
        ({"shift": float("nan")}, "Expected `shift` to be a finite number"),
        ({"assignment": "step"}, "Expected `assignment` to be one of 'tanh', 'sigmoid', 'discrete'"),
        ({"attack": PGD(restarts=2)}, "GAIRAT follows one run"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        GAIRAT(**options)


def test_refusals_of_the_function_and_of_a_scheduled_attack():
    with pytest.raises(ValueError, match="Expected `steps` to be an integer >= 1"):
        gairat_weights(torch.zeros(1), 0)
    scheduled = ScheduledAttack(PGD(early_stop=True), eps=Constant(value=0.1))
    with pytest.raises(ValueError, match="GAIRAT follows one run"):
        GAIRAT(attack=scheduled).epoch_starts(0, 2)
