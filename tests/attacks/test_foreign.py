"""Attacks of other libraries, with stand-ins that have their known defects, and with the libraries where installed."""

import copy
import pickle
import random
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from lightning_robust.attacks import (
    PGD,
    AttackSequence,
    ForeignAttack,
    from_autoattack,
    from_foolbox,
    from_torchattacks,
)
from support.attacked import CLASSES, CountingNet, differences, images, snapshot

EPS = 0.05


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = CountingNet(dropout=0.3)
    x, y = images()
    net.train()
    nn.functional.cross_entropy(net(x), y).backward()
    net.norm.eval()  # a user froze this layer
    net.head.bias.requires_grad_(False)
    return net


def predicted(net, x):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x).argmax(1)


def careless(model, x, y):
    """One step of an attack that does everything it should not."""
    assert not model.training
    assert len(list(model.children())) == 0
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    np.random.rand(3)
    random.random()
    x.add_(0.01 * torch.rand_like(x)).clamp_(0, 1)
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    return (x + 0.03 * x.grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_careless_attack_leaves_everything_alone(net, context):
    x, y = images()
    before, kept = snapshot(net), x.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with context():
        attacked = ForeignAttack(careless, eps=EPS)(net, x, y)
    assert differences(net, before) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert torch.equal(x, kept)
    assert float((attacked - x).abs().max()) == pytest.approx(0.04, abs=0.01)
    assert not attacked.requires_grad


def test_everything_is_put_back_after_an_exception(net):
    def fail(model, x, y):
        model(x)
        raise KeyboardInterrupt

    before, state = snapshot(net), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        ForeignAttack(fail, eps=EPS)(net, *images())
    assert differences(net, before) == []
    assert torch.equal(torch.get_rng_state(), state)


def noise(model, x, y):
    drawn = torch.rand_like(x) + float(np.random.rand()) + random.random()
    return (x + EPS * (drawn / 3)).clamp(0, 1)


def test_draws_follow_the_generator_or_the_indices(net):
    x, _ = images()
    y = predicted(net, x)
    attack, twin = ForeignAttack(noise, eps=EPS), ForeignAttack(noise, eps=EPS)
    first, second = attack(net, x, y), attack(net, x, y)
    assert not torch.equal(first, second)
    assert torch.equal(twin(net, x, y), first)
    index = torch.arange(len(x))
    assert torch.equal(attack(net, x, y, indices=index), attack(net, x, y, indices=index))
    assert not torch.equal(attack(net, x, y, indices=index), attack(net, x, y, indices=index + 1))


@pytest.mark.parametrize(("norm", "length"), [("linf", 0.1), ("l2", 0.1 * 108**0.5), ("l1", 10.8)])
def test_results_outside_the_budget(net, norm, length):
    x, _ = images()
    x = 0.2 + 0.6 * x
    y = predicted(net, x)

    def too_far(model, x, y):
        return x - 0.1 * torch.cat([torch.ones_like(x[:4]), torch.full_like(x[4:], 0.1)])

    assert ForeignAttack(too_far, eps=length, norm=norm)(net, x, y).shape == x.shape
    with pytest.raises(ValueError, match=r"ForeignAttack\(too_far.* returned points up to .*; give its true `eps`"):
        ForeignAttack(too_far, eps=length / 2, norm=norm)(net, x, y)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    for policy, sizes in (("project", {length / 2}), ("drop", {0.0})):
        attacked = ForeignAttack(too_far, eps=length / 2, norm=norm, on_violation=policy)(net, x, y)
        size = torch.linalg.vector_norm((attacked - x).flatten(1), order, dim=1)
        assert {round(value, 4) for value in size[:4].tolist()} <= {0.0} | {round(value, 4) for value in sizes}
        assert float(size.max()) <= length / 2 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("perturb", "message"),
    [
        (lambda model, x, y: x * 0 - 0.04, r"with pixels in \[-0.04, -0.04\] of \[0, 1\]"),
        (lambda model, x, y: x * float("nan"), "returned NaN or infinity"),
        (lambda model, x, y: x[:, :1], r"Expected attacked images \[8, 3, 6, 6\] .* but got \[8, 1, 6, 6\]"),
        (lambda model, x, y: (x, y), r"Expected attacked images \[8, 3, 6, 6\] .* but got tuple"),
    ],
)
def test_results_that_make_no_sense(net, perturb, message):
    x, y = images()
    with pytest.raises(ValueError, match=message):
        ForeignAttack(perturb, eps=EPS)(net, x * 0, y)


def test_rounding_is_no_violation(net):
    x, y = images()
    attack = ForeignAttack(lambda model, x, y: (x - EPS * 1.0002).clamp(0, 1), eps=EPS)
    assert float((attack(net, x, y).double() - x.double()).abs().max()) <= EPS * (1 + 1e-6)


def test_a_misclassified_clean_image_is_kept(net):
    x, _ = images()
    y = (predicted(net, x) + 1) % CLASSES

    def helpful(model, x, y):
        return PGD(eps=0.5, steps=20, targeted=True)(model, x, y)

    assert bool((predicted(net, PGD(eps=0.5, steps=20, targeted=True)(net, x, y)) == y).any())
    attacked = ForeignAttack(helpful, eps=0.5)(net, x, y)
    assert bool((predicted(net, attacked) != y).all())


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
def test_normalised_images_and_other_bounds_reach_it_as_pixels(net, bounds):
    low, high = bounds
    mean, std = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
    shape = (1, 3, 1, 1)
    x, _ = images(dtype=torch.float64)
    net.double()
    inputs = ((low + (high - low) * x) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    y = predicted(net, inputs)
    eps = EPS * (high - low)
    seen = []

    def attack(model, images, labels):
        seen.append(images)
        return PGD(eps=EPS, steps=4, step_size=0.02, random_start=False)(model, images, labels)

    attacked = ForeignAttack(attack, eps=eps, mean=mean, std=std, bounds=bounds)(net, inputs, y)
    torch.testing.assert_close(seen[0], x)
    own = PGD(eps=eps, steps=4, step_size=0.02 * (high - low), random_start=False, mean=mean, std=std, bounds=bounds)
    torch.testing.assert_close(attacked, own(net, inputs, y), rtol=0, atol=1e-6)


def test_in_sequences_with_stages_copies_and_a_name(net):
    x, _ = images()
    y = predicted(net, x)
    foreign = ForeignAttack(careless, eps=EPS, cost=3)
    assert repr(foreign) == "ForeignAttack(careless, eps=0.05, norm='linf')"
    assert list(ForeignAttack(careless, eps=EPS, name="mine").stages(4)) == ["mine"]
    assert foreign.passes == 4
    sequence = AttackSequence(attacks={"theirs": foreign, "ours": PGD(eps=EPS)})
    assert list(sequence.stages(4)) == ["theirs", "ours"]
    robust = predicted(net, sequence(net, x, y, indices=torch.arange(8))) == y
    assert int(robust.sum()) <= int((predicted(net, foreign(net, x, y, indices=torch.arange(8))) == y).sum())
    assert repr(pickle.loads(pickle.dumps(foreign))) == repr(foreign)
    assert foreign.replaced(eps=0.1).eps == 0.1


def test_no_budget_and_empty_batches_do_not_reach_it(net):
    def never(model, x, y):
        raise AssertionError

    x, y = images()
    assert torch.equal(ForeignAttack(never, eps=0)(net, x, y), x)
    assert ForeignAttack(never, eps=EPS)(net, x[:0], y[:0]).shape == (0, 3, 6, 6)


def test_refusals(net):
    x, y = images()
    attack = ForeignAttack(careless, eps=EPS)
    with pytest.raises(ValueError, match="`towards` steers to a class, which ForeignAttack"):
        attack(net, x, y, towards=y)
    with pytest.raises(ValueError, match="chooses where it starts; leave out `start`"):
        attack(net, x, y, start=x)
    with pytest.raises(ValueError, match="Expected `on_violation` to be one of 'error', 'project', 'drop' but got 'x'"):
        ForeignAttack(careless, eps=EPS, on_violation="x")
    with pytest.raises(ValueError, match="Expected `norm` to be one of 'linf', 'l2', 'l1' but got 'l0'"):
        ForeignAttack(careless, eps=EPS, norm="l0")
    with pytest.raises(ValueError, match="Expected `cost` to be a finite number > 0 but got 0"):
        ForeignAttack(careless, eps=EPS, cost=0)


class FakeTorchAttack:
    """Bound to a model when built, with a nested attack, as those of torchattacks are."""

    def __init__(self, model, eps, nested=None):
        self.model, self.eps, self.steps, self.device = model, eps, 7, "cuda:3"
        self.normalization_used, self.attack_mode = None, "default"
        self._attacks = {} if nested is None else {"nested.0": nested}
        self.nested = nested

    def __call__(self, x, y):
        if self.nested is not None:
            return self.nested(x, y)
        x = x.to(self.device).requires_grad_()
        sign = -1 if self.attack_mode == "targeted(label)" else 1
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(self.model(x), y), x)
        return (x + sign * self.eps * gradient.sign()).clamp(0, 1).detach()


@pytest.mark.parametrize("nested", [False, True])
def test_a_bound_attack_attacks_the_model_of_the_call(net, nested):
    other = CountingNet()
    inner = FakeTorchAttack(other, EPS)
    theirs = FakeTorchAttack(other, EPS, inner) if nested else inner
    x, _ = images()
    y = predicted(net, x)
    attack = from_torchattacks(theirs)
    attacked = attack(net, x, y)
    assert other.batches == []
    torch.testing.assert_close(attacked, PGD(eps=EPS, steps=1, step_size=EPS, random_start=False)(net, x, y))
    assert theirs.model is other
    assert theirs.device == "cuda:3"
    assert (attack.name, attack.eps, attack.norm, attack.cost) == ("FakeTorchAttack", EPS, "linf", 7.0)


def test_settings_of_torchattacks(net):
    theirs = FakeTorchAttack(net, EPS)
    theirs.attack_mode = "targeted(label)"
    x, _ = images()
    goal = (predicted(net, x) + 1) % CLASSES
    attacked = from_torchattacks(theirs)(net, x, goal)
    torch.testing.assert_close(
        attacked, PGD(eps=EPS, steps=1, step_size=EPS, random_start=False, targeted=True)(net, x, goal)
    )
    assert from_torchattacks(theirs, bounds=(-1.0, 1.0)).eps == 2 * EPS
    assert from_torchattacks(theirs, eps=0.3, norm="l2", name="x", cost=2).norm == "l2"
    assert from_torchattacks(type("PGDL2", (FakeTorchAttack,), {})(net, EPS)).norm == "l2"
    del theirs.eps
    with pytest.raises(ValueError, match="No radius is known of FakeTorchAttack; give `eps`"):
        from_torchattacks(theirs)
    theirs.normalization_used = {"mean": 0.5}
    with pytest.raises(ValueError, match="normalisation of its own"):
        from_torchattacks(theirs)


@dataclass
class FakeCriterion:
    labels: torch.Tensor
    targeted: bool = False


class FakeFoolboxAttack:
    distance = types.SimpleNamespace(p=2)
    steps = 5

    def __call__(self, model, x, criterion, *, epsilons):
        assert (model.bounds, model.device) == ((0, 1), x.device)
        ours = PGD(eps=epsilons, norm="l2", steps=5, random_start=False, targeted=criterion.targeted)
        found = ours(model.model, x, criterion.labels)
        return found * 5, found, None


def test_foolbox(net, monkeypatch):
    fake = types.ModuleType("foolbox")
    fake.PyTorchModel = lambda model, bounds, device: types.SimpleNamespace(model=model, bounds=bounds, device=device)
    fake.criteria = types.SimpleNamespace(
        Misclassification=FakeCriterion, TargetedMisclassification=lambda labels: FakeCriterion(labels, True)
    )
    monkeypatch.setitem(sys.modules, "foolbox", fake)
    x, _ = images()
    y = predicted(net, x)
    attack = from_foolbox(FakeFoolboxAttack(), eps=0.5)
    assert (attack.norm, attack.cost, attack.name) == ("l2", 5.0, "FakeFoolboxAttack")
    ours = PGD(eps=0.5, norm="l2", steps=5, random_start=False)
    torch.testing.assert_close(attack(net, x, y), ours(net, x, y))
    goal = (y + 1) % CLASSES
    targeted = from_foolbox(FakeFoolboxAttack(), eps=0.5, targeted=True)
    torch.testing.assert_close(targeted(net, x, goal), ours.replaced(targeted=True)(net, x, goal))
    with pytest.raises(ValueError, match="No norm is known of the foolbox attack"):
        from_foolbox(object(), eps=0.5)
    assert from_foolbox(object(), eps=0.5, norm="l1").norm == "l1"


class FakeAutoAttack:
    """Traces, counts for ever, seeds by time, and fails for fewer classes than targets, like the official one."""

    def __init__(self, model, attacks_to_run):
        self.model, self.norm, self.epsilon, self.seed, self.device = model, "L2", 0.5, None, "cuda"
        self.attacks_to_run = attacks_to_run
        for name, targets in (("apgd", 9), ("apgd_targeted", 9), ("fab", 9), ("square", 0)):
            setattr(self, name, types.SimpleNamespace(model=model, n_target_classes=targets, device="cuda"))

    def run_standard_evaluation(self, x, y, bs):
        assert bs == len(x)
        counts = sys.modules["fake_autoattack.checks"].funcs
        assert set(counts.values()) == {0}
        counts["grad"] += 1
        sys.settrace(None)
        classes = self.apgd.model(x).shape[1]
        assert self.apgd_targeted.n_target_classes == self.fab.n_target_classes == min(9, classes - 1)
        assert self.square.device == x.device
        generator = torch.Generator().manual_seed(self.seed)  # None would not do
        return x + 0.01 * torch.rand(x.shape, generator=generator).sub(0.5) * (x - x.round()).abs()


def test_official_autoattack(net, monkeypatch):
    monkeypatch.setattr(FakeAutoAttack, "__module__", "fake_autoattack.autoattack")
    checks = types.ModuleType("fake_autoattack.checks")
    checks.funcs = {"grad": 3, "backward": 1}
    monkeypatch.setitem(sys.modules, "fake_autoattack.checks", checks)
    theirs = FakeAutoAttack(net, ["apgd-ce", "apgd-t"])
    attack = from_autoattack(theirs)
    assert (attack.norm, attack.eps, attack.name) == ("l2", 0.5, "FakeAutoAttack")
    x, _ = images()
    y = predicted(net, x)
    tracer = sys.gettrace()
    index = torch.arange(8)
    first = attack(net, x, y, indices=index)
    assert sys.gettrace() is tracer
    assert torch.equal(attack(net, x, y, indices=index), first)
    assert theirs.seed is None
    assert theirs.fab.n_target_classes == 9
    with pytest.raises(ValueError, match="needs at least four classes for its DLR losses but the model has 3"):
        attack(lambda z: net(z)[:, :3], x, y.clamp(max=2))
    theirs.attacks_to_run = ["apgd-ce", "square"]
    assert from_autoattack(theirs)(lambda z: net(z)[:, :3], x, y.clamp(max=2)).shape == x.shape


def check_real(attack, net, at_most=8):
    x, _ = images()
    y = predicted(net, x)
    before, state = snapshot(net), torch.get_rng_state()
    with torch.inference_mode():
        attacked = attack(net, x, y, indices=torch.arange(8))
    assert differences(net, before) == []
    assert torch.equal(torch.get_rng_state(), state)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[attack.norm]
    assert float(torch.linalg.vector_norm((attacked - x).flatten(1), order, dim=1).max()) <= attack.eps * (1 + 1e-5)
    assert torch.equal(attack(net, x, y, indices=torch.arange(8)), attacked)
    assert int((predicted(net, attacked) == y).sum()) <= at_most


def test_with_the_real_torchattacks(net):
    torchattacks = pytest.importorskip("torchattacks")
    other = CountingNet()
    for attack in (
        from_torchattacks(torchattacks.PGD(other, eps=0.1)),
        from_torchattacks(torchattacks.PGDL2(other, eps=1.0, steps=10)),
        from_torchattacks(
            torchattacks.MultiAttack([torchattacks.PGD(other, eps=0.1), torchattacks.FGSM(other, 0.1)]), eps=0.1
        ),
        from_torchattacks(torchattacks.DeepFool(other, steps=10), eps=1.0, norm="l2", on_violation="drop"),
    ):
        check_real(attack, net, at_most=4)
    with pytest.raises(ValueError, match="returned points up to"):
        check_real(from_torchattacks(torchattacks.PGD(other, eps=0.1), eps=0.05), net)
    assert other.batches == []


def test_with_the_real_foolbox(net):
    foolbox = pytest.importorskip("foolbox")
    for attack in (
        from_foolbox(foolbox.attacks.LinfPGD(), eps=0.1),
        from_foolbox(foolbox.attacks.L2PGD(), eps=1.0),
        from_foolbox(foolbox.attacks.DDNAttack(steps=20), eps=1.0),
    ):
        check_real(attack, net, at_most=4)


def test_with_the_real_autoattack(net):
    autoattack = pytest.importorskip("autoattack")
    theirs = autoattack.AutoAttack(CountingNet(), eps=0.1, device="cpu", verbose=False)
    theirs.square.n_queries = 20
    check_real(from_autoattack(theirs), net, at_most=4)
