"""Steering to a class, budgets per sample, and attacks that change with the epoch."""

import pickle

import pytest
import torch

from lightning_robust.attacks import FGSM, MIM, PGD, ScheduledAttack, losses
from lightning_robust.schedules import Constant, Linear, Piecewise
from support.attacked import CLASSES, CountingNet, images


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return CountingNet().double().eval()


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "prob-margin"])
def test_steering_raises_the_wanted_class(net, loss):
    x, y = images(dtype=torch.float64)
    wanted = (y + 1) % CLASSES
    attacked = PGD(eps=0.1, steps=10, loss=loss, random_start=False)(net, x, y, towards=wanted)
    before, after = (losses.towards_class(net(at), y, wanted) for at in (x, attacked))
    assert bool((after > before).all())


def test_steering_stops_at_any_misclassification_and_targeting_at_the_target():
    def passing_through(x):  # on the way from class 0 to class 2 lies class 1
        return torch.cat([1 - x, torch.full_like(x, 0.9), 2 * x], 1)

    x, y, wanted = torch.zeros(1, 1), torch.tensor([0]), torch.tensor([2])
    options = {"eps": 1.0, "steps": 50, "step_size": 0.03, "early_stop": True, "random_start": False}
    steered = PGD(**options)(passing_through, x, y, towards=wanted)
    reached = PGD(**options, targeted=True)(passing_through, x, wanted)
    assert steered.item() == pytest.approx(0.12)
    assert reached.item() == pytest.approx(0.48)


def test_the_cross_entropy_to_a_class_is_the_targeted_attack(net):
    x, y = images(dtype=torch.float64)
    wanted = (y + 2) % CLASSES
    options = {"eps": 0.1, "steps": 5, "random_start": False}
    steered = PGD(**options)(net, x, y, towards=wanted)
    torch.testing.assert_close(steered, PGD(**options, targeted=True)(net, x, wanted), rtol=0, atol=0)


def test_what_cannot_steer_is_refused(net):
    x, y = images(dtype=torch.float64)
    for attack in (PGD(loss="kl"), PGD(targeted=True)):
        with pytest.raises(ValueError, match="`towards` steers to a class, which PGD"):
            attack(net, x, y, towards=y)
    with pytest.raises(ValueError, match=r"Expected one value of `towards` per image, \[8\], but got \[1\]"):
        PGD()(net, x, y, towards=y[:1])


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"projection": "box-ball"}, {"early_stop": True}])
@pytest.mark.parametrize("kind", [PGD, FGSM, MIM])
def test_a_budget_per_sample_is_the_attack_with_that_budget(net, kind, options):
    if kind is not PGD and set(options) & {"early_stop", "projection"}:
        return
    x, y = images(3, dtype=torch.float64)
    scale = torch.tensor([0.0, 0.5, 2.0])
    start = x.clone()
    attack = kind(eps=0.1, random_start=False, **options)
    scaled = attack(net, x, y, scale=scale, start=start)
    for row, factor in enumerate(scale.tolist()):
        single = attack.replaced(eps=0.1 * factor, step_size=attack.step_size * factor)
        expected = single(net, x[row : row + 1], y[row : row + 1], start=start[row : row + 1])
        torch.testing.assert_close(scaled[row : row + 1], expected, rtol=0, atol=1e-7)


def test_random_starts_have_the_budget_of_their_sample(net):
    x, y = images(3, dtype=torch.float64)
    x = 0.4 + 0.2 * x
    for norm in ("linf", "l2"):
        started = PGD(eps=0.1, norm=norm, steps=0)(net, x, y, scale=torch.tensor([0.0, 0.5, 2.0]))
        size = PGD(norm=norm)._norm.size(started - x)
        assert size[0] == 0
        assert 0 < size[1] <= 0.05 + 1e-12
        assert 0.05 < size[2] <= 0.2 + 1e-12


def test_replaced_changes_only_what_is_named():
    attack = MIM(eps=0.2, steps=4, decay=0.5)
    assert repr(attack.replaced(steps=8)) == repr(MIM(eps=0.2, steps=8, decay=0.5))
    assert attack.replaced(steps=8).step_size == pytest.approx(0.2 / 8)
    given = pickle.loads(pickle.dumps(PGD(eps=0.2, step_size=0.01)))
    assert repr(given.replaced(eps=0.1)) == repr(PGD(eps=0.1, step_size=0.01))


def test_a_scheduled_attack_grows():
    full = PGD(eps=0.4, step_size=0.1, steps=10)
    attack = ScheduledAttack(full, eps=Linear(start=0.0, end=0.4, epochs=5), steps=Piecewise(values={0: 2, 3: 10}))
    seen = [attack.at(epoch, 30) for epoch in (0, 2, 4, 29)]
    assert [each.eps for each in seen] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert [each.step_size for each in seen] == pytest.approx([0.0, 0.05, 0.1, 0.1])
    assert [each.steps for each in seen] == [2, 2, 10, 10]
    assert attack.at(29, 30) is attack.at(29, 30)
    assert full.at(3, 30) is full


def test_a_scheduled_attack_called_directly_is_the_full_one(net):
    x, y = images(dtype=torch.float64)
    full = PGD(eps=0.1, steps=3, step_size=0.05, random_start=False)
    attack = ScheduledAttack(full, eps=Constant(value=0.01))
    assert torch.equal(attack(net, x, y), full(net, x, y))
    scale = torch.linspace(0, 1, len(x)).double()
    assert torch.equal(attack(net, x, y, scale=scale), full(net, x, y, scale=scale))
    assert attack.passes == full.passes == 3
    assert attack.stages(4) == full.stages(4)
    assert repr(attack).startswith("ScheduledAttack(PGD(eps=0.1, steps=3, step_size=0.05, random_start=False), eps=")


def test_a_schedule_is_asked_for():
    with pytest.raises(ValueError, match="Expected a schedule of `eps` or of `steps`"):
        ScheduledAttack(PGD())
