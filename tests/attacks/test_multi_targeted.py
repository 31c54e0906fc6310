"""One attack towards several classes: which classes, on which samples, at what cost."""

import pytest
import torch

from lightning_robust.attacks import APGD, FGSM, PGD, MultiTargeted
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.multi_targeted import likeliest_others
from lightning_robust.attacks.sequence import AttackSequence
from support.attacked import CountingNet, images

INNER = {
    "apgd": APGD(eps=0.05, steps=8, loss="dlr"),
    "apgd-l1": APGD(eps=4.0, norm="l1", steps=8, loss="ce", largereps=True),
    "pgd": PGD(eps=0.05, steps=8, loss="margin", early_stop=True),
    "pgd-ce": PGD(eps=0.05, steps=8),
    "fgsm": FGSM(eps=0.05, loss="prob-margin"),
    "fab": FAB(eps=0.05, steps=8),
}


def right(net, count=24, dtype=torch.float64):
    x, _ = images(count, dtype=dtype)
    with torch.no_grad():
        return x, net(x).argmax(1)


def fooled(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) != y


@pytest.fixture
def net():
    return CountingNet(7).double().eval()


def test_the_likeliest_other_classes():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    y = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    for count in (1, 3, 6, 9):
        chosen = likeliest_others(logits, y, count)
        assert chosen.shape == (50, min(count, 6))
        for i in range(50):
            order = sorted((k for k in range(7) if k != y[i]), key=lambda k: -logits[i, k])
            assert chosen[i].tolist() == order[:count]


def test_ties_leave_no_class_out():
    assert likeliest_others(torch.zeros(2, 4), torch.tensor([0, 2]), 9).tolist() == [[1, 2, 3], [0, 1, 3]]


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_union_of_the_targets(net, inner):
    x, y = right(net)
    attack = MultiTargeted(inner, targets=3)
    x_adv = attack(net, x, y, generator=torch.Generator().manual_seed(0))
    hit = fooled(net, x_adv, y)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        order = net(x).argsort(1, descending=True)
    left = torch.arange(len(x))
    for rank in (1, 2, 3):
        found = inner(net, x[left], y[left], towards=order[left, rank], generator=generator)
        wrong = fooled(net, found, y[left])
        torch.testing.assert_close(x_adv[left[wrong]], found[wrong])
        left = left[~wrong]
    assert torch.equal(hit.logical_not().nonzero().squeeze(1), left)
    assert len(left) < len(x)


def test_a_later_target_breaks_what_the_first_cannot():
    def model(x):
        # the runner-up is out of reach, the class after it is near
        flat = torch.zeros_like(x[:, 0])
        return torch.stack([flat, flat * x[:, 0] - 0.2, 10 * (x[:, 0] - 0.5) - 0.3, flat - 9], 1)

    x, y = torch.full((2, 3), 0.5), torch.zeros(2, dtype=torch.long)
    inner = APGD(eps=0.05, steps=5, loss="dlr")
    one, two = (fooled(model, MultiTargeted(inner, targets=targets)(model, x, y), y).tolist() for targets in (1, 2))
    assert (one, two) == ([False, False], [True, True])


def test_robust_samples_get_the_point_of_largest_margin(net):
    x, y = right(net)
    attack = MultiTargeted(APGD(eps=0.01, steps=4, loss="dlr"), targets=6)
    x_adv = attack(net, x, y)
    with torch.no_grad():
        before, after = margin(net(x), y), margin(net(x_adv), y)
    assert bool((~fooled(net, x_adv, y)).any())
    assert bool((after >= before).all())
    assert float(after.mean()) > float(before.mean())


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_budget_and_pixels(inner, dtype):
    net = CountingNet(7).to(dtype).eval()
    x, y = right(net, dtype=dtype)
    x_adv = MultiTargeted(inner)(net, x, y)
    assert x_adv.dtype == dtype
    delta = (x_adv.double() - x.double()).flatten(1)
    size = delta.abs().sum(1) if getattr(inner, "norm", "") == "l1" else delta.abs().amax(1)
    slack = 1e-6 if isinstance(inner, APGD) or dtype == torch.float32 else 0.1
    assert float(size.max()) <= inner.eps * (1 + slack)
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(inner, classes):
    net = CountingNet(classes).double().eval()
    x, y = right(net)
    x_adv = MultiTargeted(inner.replaced(eps=10 * inner.eps))(net, x, y)
    assert bool(fooled(net, x_adv, y).any())


@pytest.mark.parametrize(("classes", "loss"), [(2, "margin"), (3, "margin"), (4, "dlr")])
def test_targeted_dlr_becomes_the_margin_below_four_classes(classes, loss):
    net = CountingNet(classes).double().eval()
    x, y = right(net)
    given, expected = (
        MultiTargeted(APGD(eps=0.03, steps=5, loss=each), targets=9)(net, x, y, indices=torch.arange(len(x)))
        for each in ("dlr", loss)
    )
    assert torch.equal(given, expected)


def test_number_of_passes(net):
    x, y = right(net, 6)
    net.batches.clear()
    backwards = []
    net.conv.register_full_backward_hook(lambda *_: backwards.append(1))
    attack = MultiTargeted(APGD(eps=1e-6, steps=5, loss="dlr"), targets=4)
    x_adv = attack(net, x, y)
    assert not fooled(net, x_adv, y).any()
    forwards = len(net.batches) - 1
    assert forwards == 1 + 4 * (6 + 1)
    assert len(backwards) == 4 * 5
    assert attack.passes == (forwards + len(backwards)) / 2


def test_fooled_samples_leave_and_wrong_ones_stay(net):
    x, y = right(net)
    y[:5] = (y[:5] + 1) % 7
    net.batches.clear()
    x_adv = MultiTargeted(APGD(eps=0.5, steps=5, loss="margin"), targets=6)(net, x, y)
    assert torch.equal(x_adv[:5], x[:5])
    assert net.batches[:2] == [24, 19]
    assert not fooled(net, x_adv, y).logical_not().any()
    assert sum(net.batches[1:]) < 19 * 7
    net.batches.clear()
    assert torch.equal(MultiTargeted(APGD())(net, x[:5], y[:5]), x[:5])
    assert net.batches == [5]


def test_depends_on_no_other_sample(net):
    x, y = right(net)
    attack = MultiTargeted(APGD(eps=0.04, steps=10, loss="dlr", restarts=2, seed=3), targets=3)
    assert attack.seed == 3
    indices = torch.arange(len(x)) + 7
    together = attack(net, x, y, indices=indices)
    order = torch.randperm(len(x))
    torch.testing.assert_close(attack(net, x[order], y[order], indices=indices[order]), together[order])
    for i in range(3):
        torch.testing.assert_close(attack(net, x[i : i + 1], y[i : i + 1], indices=indices[i : i + 1])[0], together[i])


def test_edge_cases(net):
    x, y = right(net)
    attack = MultiTargeted(APGD(eps=0.05, steps=3, loss="dlr"))
    assert attack(net, x[:0], y[:0]).shape == (0, *x.shape[1:])
    assert attack(net, x[:1], y[:1]).shape == (1, *x.shape[1:])
    assert torch.equal(MultiTargeted(APGD(eps=0.0, loss="dlr", steps=2))(net, x, y), x)
    for steps in (0, 1):
        assert MultiTargeted(APGD(steps=steps, loss="dlr"))(net, x, y).shape == x.shape
    soft = torch.nn.functional.one_hot(y, 7).double()
    indices = torch.arange(len(x))
    assert torch.equal(attack(net, x, soft, indices=indices), attack(net, x, y, indices=indices))
    with torch.inference_mode():
        x, y = right(net)
        assert attack(net, x, y, indices=torch.arange(len(x))).shape == x.shape


def test_settings_follow_the_attack():
    inner = APGD(eps=0.1, mean=[0.5], std=[0.2], seed=4, loss="dlr")
    attack = MultiTargeted(inner, targets=3)
    assert (attack.eps, attack.mean, attack.std, attack.seed) == (0.1, [0.5], [0.2], 4)
    assert list(attack.stages(10)) == ["MultiTargeted"]
    assert attack.replaced(targets=5).targets == 5
    assert attack.at(0, 10).attack.eps == 0.1


def test_inside_a_sequence(net):
    x, y = right(net)
    steered = MultiTargeted(APGD(eps=0.05, steps=8, loss="dlr"), targets=3)
    both = AttackSequence(attacks={"ce": APGD(eps=0.05, steps=8), "t": steered})
    indices = torch.arange(len(x))
    hit = fooled(net, both(net, x, y, indices=indices), y)
    assert bool((hit | ~fooled(net, steered(net, x, y, indices=indices), y)).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiTargeted(APGD(), targets=0), "Expected `targets` to be an integer >= 1"),
        (lambda: MultiTargeted(APGD(loss="kl")), "can be steered to a class"),
        (lambda: MultiTargeted(APGD(targeted=True)), "can be steered to a class"),
        (lambda: MultiTargeted(MultiTargeted(APGD())), "can be steered to a class"),
        (lambda: MultiTargeted(PGD(mode="train")), "mode='eval' but got 'train'"),
    ],
)
def test_refused_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_a_class_to_steer_to(net):
    x, y = right(net)
    with pytest.raises(ValueError, match="chooses the classes itself"):
        MultiTargeted(APGD())(net, x, y, towards=y)
