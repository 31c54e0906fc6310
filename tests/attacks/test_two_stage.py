"""Margin decomposition and the probability margin attack."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_robust.attacks import APGD, MD, PMA, AttackSequence, MultiTargeted, PMAPlus, gradient_imbalance
from lightning_robust.attacks.losses import margin_terms
from lightning_robust.attacks.two_stage import two_stage_step
from support.attacked import CLASSES, CountingNet, images


@pytest.fixture
def net():
    torch.manual_seed(0)
    return CountingNet().double().eval()


def test_terms_of_the_margin():
    values = torch.tensor([[3.0, 1.0, 0.5], [-1.0, 2.0, 0.0]])
    target, wanted = torch.tensor([0, 2]), torch.tensor([2, 0])
    assert [term.tolist() for term in margin_terms(values, target)] == [[3.0, 0.0], [1.0, 2.0]]
    assert [term.tolist() for term in margin_terms(values, target, wanted)] == [[3.0, 0.0], [0.5, -1.0]]
    with pytest.raises(ValueError, match=r"Expected integer classes \[B\] to split a margin"):
        margin_terms(values, values.softmax(1))


@pytest.mark.parametrize(("steps", "first"), [(50, 20), (100, 50), (50, 25)])
def test_steps_follow_the_published_cosine(steps, first):
    for step in range(steps):
        place = step - first if step > first else step
        published = 2 * 0.5 * (1 + math.cos((place - 1) / (steps - first) * math.pi))
        assert two_stage_step(step, steps, first, 1.0) == pytest.approx(published)


@pytest.mark.parametrize("first", [0, 7, 10])
def test_steps_never_grow_within_a_stage(first):
    sizes = [two_stage_step(step, 10, first, 0.1) for step in range(10)]
    assert all(0 <= size <= 0.2 + 1e-9 for size in sizes)
    assert all(
        later <= earlier + 1e-9
        for part in (sizes[1 : first + 1], sizes[first + 1 :])
        for earlier, later in pairwise(part)
    )


def by_hand(net, x, y, start, number, steps, first, eps, probabilities):
    """One round for samples that nothing fools, in a plain loop."""
    point = start
    for step in range(steps):
        point = point.detach().requires_grad_()
        values = net(point).softmax(1) if probabilities else net(point)
        own, other = margin_terms(values, y)
        if step == 0:
            loss = own
        elif step < first:
            loss = other if number else -own
        else:
            loss = other - own
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        moved = point + two_stage_step(step, steps, first, eps) * gradient.sign()
        point = torch.min(torch.max(moved, x - eps), x + eps).clamp(0, 1)
        yield point.detach()


@pytest.mark.parametrize("kind", [MD, PMA])
def test_two_rounds_against_a_plain_loop(kind, net):
    x, _ = images(6, dtype=torch.float64)
    y, eps, seen = net(x).argmax(1), 0.001, []

    def model(z):
        seen.append(z.detach().clone())
        return net(z)

    attacked = kind(eps=eps, steps=8, first_stage=3)(model, x, y)
    assert bool((net(attacked).argmax(1) == y).all())
    assert len(seen) == 1 + 2 * 9
    assert torch.equal(seen[0], x)
    points = []
    for number, path in enumerate((seen[1:10], seen[10:])):
        expected = list(by_hand(net, x, y, path[0], number, 8, 3, eps, kind is PMA))
        torch.testing.assert_close(torch.stack(path[1:]), torch.stack(expected))
        points += path
    assert not torch.equal(seen[1], seen[10])  # rounds start at points of their own
    # returned is the point of largest loss on the way
    margins = torch.stack([other - own for own, other in (margin_terms(net(point), y) for point in [x, *points])])
    if kind is MD:
        own, other = margin_terms(net(attacked), y)
        torch.testing.assert_close(other - own, margins.amax(0))


def test_default_stages():
    assert MD()._first_stage == 20
    assert MD(steps=100)._first_stage == 40
    assert PMA()._first_stage == 50
    assert PMA(steps=50)._first_stage == 25
    assert (MD().steps, PMA().steps) == (50, 100)


@pytest.mark.parametrize("kind", [MD, PMA])
def test_fooled_samples_leave(kind, net):
    x, _ = images(12, dtype=torch.float64)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    net.batches.clear()
    attacked = kind(eps=0.03, steps=20)(net, x, y)
    batches = net.batches.copy()
    robust = int((net(attacked).argmax(1) == y).sum())
    assert 0 < robust < 11
    assert torch.equal(attacked[0], x[0])
    assert batches[:2] == [12, 11]
    assert batches == sorted(batches, reverse=True)
    assert batches[-1] == robust


def test_imbalanced_gradients_are_overcome():
    def model(x):
        """The true class has a steep slope that leads nowhere; the other one decides."""
        steep = 5 - 40 * torch.relu(x[:, :1] - 0.5).pow(2) - 40 * torch.relu(0.5 - x[:, :1]).pow(2)
        return torch.cat([steep, 4.2 + 10 * (x[:, 1:] - 0.5)], 1)

    x, y = torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    attacked = MD(eps=0.1, steps=10)(model, x, y)
    assert bool((model(attacked).argmax(1) == 1).all())


@pytest.mark.parametrize("kind", [MD, PMA])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_fools_and_keeps_the_budget(kind, norm, net):
    x, _ = images(12, dtype=torch.float64)
    y = net(x).argmax(1)
    eps = {"linf": 0.08, "l2": 0.6, "l1": 4.0}[norm]
    attacked = kind(eps=eps, norm=norm, steps=20)(net, x, y)
    assert int((net(attacked).argmax(1) == y).sum()) <= 4
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    assert float(torch.linalg.vector_norm((attacked - x).flatten(1), order, dim=1).max()) <= eps * (1 + 1e-6)


@pytest.mark.parametrize("kind", [MD, PMA])
def test_both_meanings_of_a_target(kind, net):
    x, _ = images(10, dtype=torch.float64)
    y = net(x).argmax(1)
    wanted = (y + 1) % CLASSES
    reached = kind(eps=0.15, steps=20, targeted=True)(net, x, wanted)
    assert int((net(reached).argmax(1) == wanted).sum()) >= 8
    steered = kind(eps=0.15, steps=20)(net, x, y, towards=wanted)
    assert int((net(steered).argmax(1) != y).sum()) >= 8
    several = MultiTargeted(kind(eps=0.05, steps=10), targets=3)(net, x, y)
    single = kind(eps=0.05, steps=10)(net, x, y, towards=wanted)
    assert int((net(several).argmax(1) == y).sum()) <= int((net(single).argmax(1) == y).sum())


def test_steered_rounds_raise_the_wanted_class(net):
    x, _ = images(8, dtype=torch.float64)
    y = net(x).argmax(1)
    wanted = net(x).argmin(1)
    for kind in (MD, PMA):
        attacked = kind(eps=0.005, steps=10)(net, x, y, towards=wanted)
        before, after = net(x), net(attacked)
        gain = (after - before).gather(1, wanted[:, None]) - (after - before).gather(1, y[:, None])
        assert bool((gain > 0).all())


def test_dlr_as_the_second_stage(net):
    x, _ = images(8, dtype=torch.float64)
    y = net(x).argmax(1)
    assert int((net(MD(eps=0.05, steps=20, loss="dlr")(net, x, y)).argmax(1) == y).sum()) <= 3


def test_a_saturated_softmax_does_not_stop_pma():
    torch.manual_seed(1)
    base = nn.Linear(20, 3)
    x = torch.rand(16, 20)
    y = base(x).argmax(1)
    robust = [
        int((base(PMA(eps=0.2, steps=20)(model, x, y)).argmax(1) == y).sum())
        for model in (base, lambda z: 1e4 * base(z))
    ]
    assert robust[0] < 8
    assert robust[1] == robust[0]


def test_pma_plus_is_pma_and_then_targeted_apgd(net):
    attack = PMAPlus(eps=0.03, steps=10, targets=3)
    assert isinstance(attack, AttackSequence)
    stages = attack.stages(CLASSES)
    assert list(stages) == ["pma", "apgd-t"]
    assert repr(stages["pma"]) == "PMA(eps=0.03, steps=10)"
    assert repr(stages["apgd-t"]) == repr(MultiTargeted(APGD(eps=0.03, steps=10, loss="dlr"), targets=3))
    assert repr(attack) == "PMAPlus(eps=0.03, steps=10, targets=3)"
    x, _ = images(12, dtype=torch.float64)
    y = net(x).argmax(1)
    index = torch.arange(12)
    both = net(attack(net, x, y, indices=index)).argmax(1) == y
    alone = net(PMA(eps=0.03, steps=10)(net, x, y, indices=index)).argmax(1) == y
    assert not bool((both & ~alone).any())
    assert attack.at(3, 10) is attack
    assert attack.replaced(eps=0.1).attacks["pma"].eps == 0.1


@pytest.mark.parametrize("classes", [2, 3])
def test_pma_plus_with_few_classes(classes):
    torch.manual_seed(0)
    net = CountingNet(classes=classes).eval()
    x, _ = images(6)
    y = net(x).argmax(1)
    attacked = PMAPlus(eps=0.4, steps=10)(net, x, y)
    assert int((net(attacked).argmax(1) == y).sum()) <= 2


def test_imbalance_of_gradients():
    model = nn.Linear(3, 3, bias=False)
    model.weight.data = torch.tensor([[4.0, 1.0, 0.0], [0.0, -0.5, 0.5], [0.0, 0.0, 0.0]])
    x = torch.tensor([[0.9, 0.5, 0.9], [0.1, 0.2, 0.9]])
    # |w_0| = 5 against |w_1| = 1 both ways; class 2, all zero, is the larger rest of nobody
    assert gradient_imbalance(model, x, torch.tensor([0, 1])).tolist() == [5.0, 5.0]
    assert gradient_imbalance(model, x[:1], torch.tensor([2])).item() == math.inf
    constant = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(constant.weight)
    assert gradient_imbalance(constant, x, torch.tensor([0, 1])).tolist() == [1.0, 1.0]


def test_imbalance_leaves_the_model_alone():
    net = CountingNet(dropout=0.5).train()
    x, y = images()
    mean = net.norm.running_mean.clone()
    with torch.inference_mode():
        first, second = (gradient_imbalance(net, x.clone(), y) for _ in range(2))
    assert torch.equal(first, second)
    assert bool((first >= 1).all())
    assert net.training
    assert net.norm.training
    assert torch.equal(net.norm.running_mean, mean)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (MD, {"norm": "l0"}, "Expected `norm` to be one of"),
        (MD, {"loss": "ce"}, "Expected `loss` to be one of 'margin', 'dlr' but got 'ce'"),
        (MD, {"first_stage": 60}, "Expected `first_stage` to be at most steps=50 but got 60"),
        (PMA, {"first_stage": -1}, "Expected `first_stage` to be an integer >= 0 but got -1"),
        (PMA, {"steps": 1.5}, "Expected `steps` to be an integer >= 0 but got 1.5"),
    ],
)
def test_refused_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
