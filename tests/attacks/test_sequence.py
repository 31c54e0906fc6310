"""Attacks in order, their union over norms, and mixtures for training."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD, AttackMixture, AttackSequence, AutoAttack, PMAPlus, ThreatUnion
from lightning_robust.attacks.losses import margin
from support.attacked import CLASSES, CountingNet, differences, images, snapshot


@pytest.fixture
def net():
    return CountingNet().double().eval()


def right(net, count=40):
    """Images that the network classifies correctly, but for the first two."""
    x, _ = images(count=count, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % CLASSES
    return x, y


def wrong(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) != y


def three():
    # each finds something: budgets grow
    return {
        "small": PGD(eps=0.01, steps=2, seed=1),
        "middle": PGD(eps=0.03, steps=3, loss="margin", seed=2),
        "large": PGD(eps=0.05, steps=3, restarts=2, seed=3),
    }


class TestSequence:
    def test_first_success_else_the_largest_margin(self, net):
        x, y = right(net)
        indices = torch.arange(len(x))
        members = three()
        found = AttackSequence(attacks=members)(net, x, y, indices=indices)
        alone = [attack(net, x, y, indices=indices) for attack in members.values()]
        fooled = torch.stack([wrong(net, point, y) for point in [x, *alone]])
        assert [int(each) for each in fooled.cummax(0).values.sum(1).diff()] != [0, 0, 0]
        assert not bool(fooled.any(0).all())
        for i in range(len(x)):
            points = [x[i], *(each[i] for each in alone)]
            hits = fooled[:, i].nonzero()
            with torch.no_grad():
                margins = torch.stack([margin(net(point[None]), y[i : i + 1])[0] for point in points])
            expected = points[int(hits[0])] if len(hits) else points[int(margins.argmax())]
            assert torch.equal(found[i], expected)

    def test_each_sees_only_what_is_left(self, net):
        x, y = right(net)
        indices = torch.arange(len(x))
        left, sizes = ~wrong(net, x, y), [len(x)]
        for attack in three().values():
            count = int(left.sum())
            sizes += [count] * ((attack.steps + (attack.restarts > 1)) * attack.restarts) + [count]
            left &= ~wrong(net, attack(net, x, y, indices=indices), y)
        net.batches.clear()
        AttackSequence(attacks=three())(net, x, y, indices=indices)
        assert net.batches == sizes

    def test_stops_when_none_is_left(self, net):
        x, _ = images(dtype=torch.float64)
        y = (net(x).argmax(1) + 1) % CLASSES
        net.batches.clear()
        assert torch.equal(AttackSequence(attacks=three())(net, x, y), x)
        assert net.batches == [len(x)]

    def test_neither_order_nor_batches_matter(self, net):
        x, y = right(net)
        indices = torch.arange(len(x)) + 100
        attack = AttackSequence(attacks=three())
        together = attack(net, x, y, indices=indices)
        order = torch.randperm(len(x))
        torch.testing.assert_close(attack(net, x[order], y[order], indices=indices[order]), together[order])
        parts = [
            attack(net, *part[:2], indices=part[2])
            for part in zip(x.split(7), y.split(7), indices.split(7), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts), together)

    def test_repeats_itself(self, net):
        x, y = right(net)
        first, second = (AttackSequence(attacks=three())(net, x, y) for _ in range(2))
        assert torch.equal(first, second)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
        first, same, other = (AttackSequence(attacks=three())(net, x, y, generator=each) for each in generators)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_a_given_start_is_that_of_the_first(self, net):
        x, y = right(net)
        start = (x + 0.005).clamp(0, 1)
        only = PGD(eps=0.01, steps=2)
        found = AttackSequence(attacks={"only": only})(net, x, y, start=start)
        still = ~wrong(net, x, y)
        direct = only(net, x, y, start=start)
        grown = margin(net(direct), y) > margin(net(x), y)
        kept = still & (grown | wrong(net, direct, y))
        assert int(kept.sum()) > 20
        torch.testing.assert_close(found[kept], direct[kept])

    def test_targeted(self, net):
        x, _ = images(count=40, dtype=torch.float64)
        wanted = (net(x).argmax(1) + 1) % CLASSES
        members = {"a": PGD(eps=0.02, steps=3, targeted=True), "b": PGD(eps=0.2, steps=9, targeted=True)}
        found = AttackSequence(attacks=members)(net, x, wanted)
        reached = ~wrong(net, found, wanted)
        assert bool(reached.any())
        assert float((found - x).abs().max()) > 0.02

    def test_towards_reaches_the_members(self, net):
        x, y = right(net)
        towards = (y + 1) % CLASSES
        plain = PGD(eps=0.03, steps=3, loss="margin", random_start=False)
        found = AttackSequence(attacks={"a": plain})(net, x, y, towards=towards)
        direct = plain(net, x, y, towards=towards)
        fooled = wrong(net, direct, y) & ~wrong(net, x, y)
        assert bool(fooled.any())
        assert torch.equal(found[fooled], direct[fooled])

    def test_soft_targets(self, net):
        x, y = right(net)
        attack = AttackSequence(attacks={"ce": PGD(eps=0.03, steps=3, random_start=False)})
        soft = F.one_hot(y, CLASSES).double()
        torch.testing.assert_close(attack(net, x, soft), attack(net, x, y))

    def test_leaves_the_model_alone(self, net):
        x, y = right(net)
        net.train()
        net.dropout.eval()
        before = snapshot(net)
        with torch.inference_mode():
            AttackSequence(attacks=three())(net, x, y)
        assert differences(net, before) == []

    def test_edges(self, net):
        x, y = right(net)
        attack = AttackSequence(attacks=three())
        assert attack(net, x[:0], y[:0]).shape == (0, *x.shape[1:])
        assert attack(net, x[5:6], y[5:6]).shape == (1, *x.shape[1:])
        nothing = AttackSequence(attacks={"zero": PGD(eps=0.0), "none": PGD(steps=0, random_start=False)})
        assert torch.equal(nothing(net, x, y), x)

    @pytest.mark.parametrize("classes", [2, 3])
    def test_few_classes_and_the_last_one(self, classes):
        net = CountingNet(classes).eval()
        x, _ = images()
        found = AttackSequence(attacks=three())(net, x, torch.full((len(x),), classes - 1))
        assert float((found - x).abs().max()) <= 0.05 + 1e-6

    def test_nested_stages_are_named_by_path(self):
        inner = AttackSequence(attacks={"ce": PGD(), "margin": PGD(loss="margin")})
        outer = AttackSequence(attacks={"fast": FGSM(), "both": inner})
        assert list(outer.stages(10)) == ["fast", "both/ce", "both/margin"]
        assert outer.stages(10)["both/margin"] is inner.attacks["margin"]

    def test_passes(self):
        assert AttackSequence(attacks=three()).passes == 0.5 + 2.5 + 3.5 + 7.5

    def test_travels_and_prints(self, net):
        attack = AttackSequence(attacks={"ce": PGD(eps=0.1, step_size=0.1), "fgsm": FGSM(eps=0.2)})
        assert repr(eval(repr(attack))) == repr(attack)
        x, y = right(net)
        indices = torch.arange(len(x))
        found = attack(net, x, y, indices=indices)
        copy = pickle.loads(pickle.dumps(attack))
        assert torch.equal(copy(net, x, y, indices=indices), found)
        assert repr(copy) == repr(attack)


@pytest.mark.parametrize("kind", [AttackSequence, AttackMixture])
@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ({}, "at least one attack"),
        ({"a": PGD(), "b": PGD(mode="train")}, "same `mode` but 'a' has 'eval' and 'b' has 'train'"),
        ({"a": PGD(), "b": PGD(targeted=True)}, "same `targeted`"),
        ({"a": PGD(), "b": PGD(bounds=(0, 255))}, "same `bounds`"),
        ({"a": PGD(), "b": PGD(mean=[0.5], std=[0.1])}, "same `mean`"),
    ],
)
def test_refused_members(kind, attacks, message):
    with pytest.raises(ValueError, match=message):
        kind(attacks=attacks)


def test_a_sequence_needs_evaluation_mode():
    with pytest.raises(ValueError, match="mode='eval' but got 'train'"):
        AttackSequence(attacks={"a": PGD(mode="train")})


def test_a_list_and_a_tuple_are_the_same_mean():
    members = {"a": PGD(mean=[0.5], std=[0.1]), "b": PGD(mean=(0.5,), std=(0.1,))}
    assert AttackSequence(attacks=members).mean == [0.5]


class TestThreatUnion:
    def test_worst_case_of_the_norms(self, net):
        x, y = right(net)
        indices = torch.arange(len(x))
        union = ThreatUnion(attack=PGD(steps=4), budgets={"linf": 0.02, "l2": 0.4})
        each = [wrong(net, attack(net, x, y, indices=indices), y) for attack in union.attacks.values()]
        assert not torch.equal(each[0], each[1])
        found = union(net, x, y, indices=indices)
        assert torch.equal(wrong(net, found, y), each[0] | each[1] | wrong(net, x, y))

    def test_a_step_size_belongs_to_one_norm(self):
        union = ThreatUnion(attack=PGD(eps=8 / 255, step_size=2 / 255), budgets={"linf": 4 / 255, "l2": 0.5})
        assert union.attacks["l2"].step_size == PGD(norm="l2", eps=0.5).step_size
        assert (union.attacks["l2"].norm, union.attacks["l2"].eps) == ("l2", 0.5)

    def test_default_is_autoattack_with_the_usual_budgets(self):
        union = ThreatUnion()
        assert {name: each.eps for name, each in union.attacks.items()} == {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
        assert all(isinstance(each, AutoAttack) and each.norm == name for name, each in union.attacks.items())
        assert list(union.stages(10))[3:5] == ["linf/square", "l2/apgd-ce"]

    def test_travels_and_prints(self):
        union = ThreatUnion(attack=PGD(step_size=0.01), budgets={"l2": 0.5})
        assert repr(pickle.loads(pickle.dumps(union))) == repr(eval(repr(union))) == repr(union)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budgets": {}}, "at least one norm"),
            ({"budgets": {"l7": 1.0}}, "Expected `norm` to be one of"),
            ({"budgets": {"linf": -1.0}}, "Expected `eps`"),
            ({"attack": AttackSequence(attacks={"a": PGD()})}, "to have a `norm`"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            ThreatUnion(**options)


class TestMixture:
    def test_random_is_one_member_per_batch(self, net):
        x, y = right(net)
        members = {"linf": PGD(eps=0.02, steps=1), "l2": PGD(eps=0.9, norm="l2", steps=1)}
        mixture = AttackMixture(attacks=members)
        counts = {"linf": 0, "l2": 0}
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            delta = mixture(net, x, y, generator=generator) - x
            small = delta.abs().flatten(1).amax(1) <= 0.02 + 1e-12
            assert bool(small.all()) or not bool(small.any())
            counts["linf" if bool(small.all()) else "l2"] += 1
        # two-sided, 4.5 standard deviations
        assert abs(counts["linf"] - 100) < 32

    def test_random_moves_on_without_other_draws(self, net):
        x, y = right(net)
        members = {"one": FGSM(eps=0.01), "two": FGSM(eps=0.02)}
        mixture = AttackMixture(attacks=members)
        sizes = {round(float((mixture(net, x, y) - x).abs().max()), 3) for _ in range(30)}
        assert sizes == {0.01, 0.02}

    def test_random_repeats_with_its_generator(self, net):
        x, y = right(net)
        mixture = AttackMixture(attacks=three())
        first, second = (
            [mixture(net, x, y, generator=generator) for _ in range(5)]
            for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
    def test_max_is_the_highest_loss(self, net, loss):
        x, y = right(net)
        members = {"linf": PGD(eps=0.02, steps=2), "l2": PGD(eps=0.175, norm="l2", steps=2)}
        found = AttackMixture(attacks=members, strategy="max", loss=loss)(net, x, y, generator=_same())
        generator = _same()
        alone = [attack(net, x, y, generator=generator) for attack in members.values()]
        values = torch.stack([_loss(net, point, x, y, loss) for point in alone])
        assert 0 < int(values.argmax(0).sum()) < len(x)
        for i in range(len(x)):
            assert torch.equal(found[i], alone[int(values[:, i].argmax())][i])

    def test_train_mode(self, net):
        x, y = right(net)
        mixture = AttackMixture(attacks={"a": PGD(mode="train", steps=2), "b": PGD(mode="train", steps=2)})
        net.train()
        before = net.norm.num_batches_tracked.clone()
        mixture(net, x, y)
        assert int(net.norm.num_batches_tracked - before) == 2

    def test_passes(self):
        members = {"a": PGD(steps=10), "b": PGD(steps=20)}
        assert AttackMixture(attacks=members).passes == 15
        assert AttackMixture(attacks=members, strategy="max").passes == 31

    def test_travels_and_prints(self):
        mixture = AttackMixture(attacks={"a": PGD(step_size=0.01)}, strategy="max", loss="margin")
        assert repr(pickle.loads(pickle.dumps(mixture))) == repr(eval(repr(mixture))) == repr(mixture)

    def test_refuses_an_unknown_strategy(self):
        with pytest.raises(ValueError, match="Expected `strategy` to be one of 'random', 'max'"):
            AttackMixture(attacks={"a": PGD()}, strategy="average")


def _same():
    return torch.Generator().manual_seed(5)


def _loss(net, point, x, y, loss):
    with torch.no_grad():
        if loss == "margin":
            return margin(net(point), y)
        if loss == "kl":
            clean = net(x).log_softmax(1)
            return (clean.exp() * (clean - net(point).log_softmax(1))).sum(1)
        return F.cross_entropy(net(point), y, reduction="none")


@pytest.mark.parametrize("attack", [AutoAttack(eps=1e-4, steps=1, queries=1), PMAPlus(eps=1e-4, steps=2)])
def test_what_a_late_member_cannot_do_is_refused_before_the_first(attack):
    def never(x):
        raise AssertionError("no member runs")

    x = torch.rand(3, 3, 6, 6)
    with pytest.raises(ValueError, match=r"Expected integer classes \[B\] for (AutoAttack|PMAPlus)"):
        attack(never, x, torch.full((3, 4), 0.25))
    with pytest.raises(ValueError, match="chooses the classes to steer to itself"):
        attack(never, x, torch.tensor([0, 1, 2]), towards=torch.tensor([1, 2, 3]))
