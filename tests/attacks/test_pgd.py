"""PGD against a loop written out, its budget, its cost and its edge cases."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, GeneratorDraws
from lightning_robust.attacks.losses import ATTACK_LOSSES, PREDICTION_LOSSES, margin
from lightning_robust.attacks.norms import NORMS
from support.attacked import CLASSES, CountingNet, images

EPS = 8 / 255


def evaluated(net, x, y):
    with torch.no_grad():
        return F.cross_entropy(net(x), y, reduction="none"), net(x).argmax(1)


def written_out(net, x, y, start, eps, alpha, steps, norm):
    """The textbook loop, with averaged losses and backward."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv = x_adv.clone().requires_grad_()
        F.cross_entropy(net(x_adv), y).backward()
        g, delta = x_adv.grad, (x_adv - x).detach()
        if norm == "linf":
            delta = torch.clamp(delta + alpha * torch.sign(g), min=-eps, max=eps)
        else:
            for i in range(len(x)):
                delta[i] += alpha * g[i] / (g[i].pow(2).sum().sqrt() + 1e-12)
                delta[i] *= min(1.0, eps / float(delta[i].pow(2).sum().sqrt()))
        x_adv = torch.clamp(x + delta, 0, 1)
    return x_adv


@pytest.fixture
def net():
    return CountingNet().double().eval()


@pytest.mark.parametrize(
    ("norm", "eps", "alpha"), [("linf", EPS, 2 / 255), ("l2", 0.5, 0.1), ("linf", 0.6, 0.2), ("l2", 6.0, 2.0)]
)
def test_same_as_the_loop_written_out(net, norm, eps, alpha):
    x, y = images(dtype=torch.float64)
    start = (x + 0.3 * eps * torch.randn_like(x)).clamp(0, 1)
    attack = PGD(eps=eps, norm=norm, steps=7, step_size=alpha)
    torch.testing.assert_close(
        attack(net, x, y, start=start), written_out(net, x, y, start, eps, alpha, 7, norm), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 3.0)])
def test_order_of_the_projections(net, norm, eps):
    x, y = images(dtype=torch.float64)
    x = x.round()  # every second step leads out of the pixels
    start = (x + 0.3 * eps * torch.randn_like(x)).clamp(0, 1)
    z = start.clone().requires_grad_()
    F.cross_entropy(net(z), y).backward()
    length = z.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = start + 0.8 * eps * (z.grad.sign() if norm == "linf" else z.grad / length)

    def ball(point):
        delta = point - x
        if norm == "linf":
            return x + delta.clamp(-eps, eps)
        return x + delta * (eps / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)

    def box(point):
        return point.clamp(0, 1)

    expected = {"ball-box": box(ball(moved)), "box-ball": ball(box(moved)), "box": box(moved)}
    for projection, point in expected.items():
        attack = PGD(eps=eps, norm=norm, steps=1, step_size=0.8 * eps, projection=projection)
        torch.testing.assert_close(attack(net, x, y, start=start), point, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False, "uniform", "radial", "normal", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_the_budget_and_raises_the_loss(norm, random_start, dtype):
    net = CountingNet().to(dtype).eval()
    x, y = images(dtype=dtype)
    eps = EPS if norm == "linf" else 0.5
    x_adv = PGD(eps=eps, norm=norm, steps=5, random_start=random_start)(net, x, y)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert bool((size <= eps + 1e-6).all())
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert bool((evaluated(net, x_adv, y)[0] > evaluated(net, x, y)[0]).all())


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({}, 6),
        ({"random_start": False}, 6),
        ({"loss": "kl"}, 7),
        ({"loss": "lse"}, 7),
        ({"loss": "brier"}, 6),
        ({"evaluate_result": True}, 7),
        ({"restarts": 3}, 21),
        ({"norm": "l2"}, 6),
        ({"loss": "margin"}, 6),
    ],
)
def test_number_of_passes(net, options, forwards):
    x, y = images(dtype=torch.float64)
    backwards = []
    net.conv.register_full_backward_hook(lambda *_: backwards.append(1))
    attack = PGD(**{"steps": 6, **options})
    attack(net, x, y)
    assert len(net.batches) == forwards
    assert len(backwards) == attack.restarts * attack.steps
    assert attack.passes == (forwards + len(backwards)) / 2


def test_default_step_size():
    assert PGD(eps=0.1, steps=10).step_size == pytest.approx(0.025)
    assert PGD(eps=0.1, steps=5).step_size == pytest.approx(0.05)
    assert PGD(eps=0.1, steps=5, step_size=0.01).step_size == 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [True, "radial", "normal", False])
def test_no_steps_give_the_start_within_the_budget(net, norm, start):
    x, y = images(dtype=torch.float64)
    attacked = PGD(eps=1e-4, norm=norm, steps=0, random_start=start)(net, x, y)
    moved = NORMS[norm].size(attacked - x)
    assert bool((moved <= 1e-4 * (1 + 1e-6)).all())
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert bool((moved > 0).all()) == (start is not False)
    assert net.batches == []


@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"early_stop": True}, {"norm": "l2"}, {"loss": "margin"}])
def test_batch_of_one_gives_what_the_batch_gives(net, options):
    x, y = images(dtype=torch.float64)
    attack = PGD(steps=4, **options)
    start = (x + 0.5 * EPS * torch.randn_like(x)).clamp(0, 1)
    if "restarts" in options:
        alone = attack(net, x[2:3], y[2:3], start=start[2:3])
        assert alone.shape == (1, *x.shape[1:])
        return
    together = attack(net, x, y, start=start)
    alone = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], start=start[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("loss", [name for name in ATTACK_LOSSES if name != "dlr"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_any_number_of_classes_and_the_last_one(loss, classes):
    net = CountingNet(classes).eval()
    x, _ = images()
    y = torch.full((len(x),), classes - 1)
    x_adv = PGD(eps=0.1, steps=4, loss=loss)(net, x, y)
    assert bool(x_adv.isfinite().all())
    if loss not in PREDICTION_LOSSES:
        with torch.no_grad():
            assert float(margin(net(x_adv), y).sum()) > float(margin(net(x), y).sum())


def test_dlr_needs_three_classes():
    x, _ = images()
    with pytest.raises(ValueError, match="at least 3 classes"):
        PGD(steps=1, loss="dlr")(CountingNet(2).eval(), x, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.uint8])
def test_integer_targets_of_any_size(net, kind):
    x, y = images(dtype=torch.float64)
    attack = PGD(steps=2, random_start=False)
    assert torch.equal(attack(net, x, y.to(kind)), attack(net, x, y))


def test_soft_targets(net):
    x, y = images(dtype=torch.float64)
    attack = PGD(steps=3, random_start=False)
    one_hot = F.one_hot(y, CLASSES).float()
    torch.testing.assert_close(attack(net, x, one_hot), attack(net, x, y))
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    attacked = attack(net, x, mixed)
    with torch.no_grad():
        before, after = (-(mixed * net(images).log_softmax(1)).sum() for images in (x, attacked))
    assert float(after) > float(before)


def test_targeted_lowers_the_loss_of_the_wanted_class(net):
    x, y = images(dtype=torch.float64)
    wanted = (y + 1) % CLASSES
    x_adv = PGD(eps=0.5, steps=20, targeted=True)(net, x, wanted)
    assert bool((evaluated(net, x_adv, wanted)[0] < evaluated(net, x, wanted)[0]).all())
    assert float((evaluated(net, x_adv, wanted)[1] == wanted).double().mean()) > 0.5


def test_kl_is_measured_from_the_clean_prediction(net):
    x, y = images(dtype=torch.float64)
    clean = net(x).log_softmax(1).detach()
    start = x + 0.001 * torch.randn_like(x)
    z = start.clone().requires_grad_()
    F.kl_div(net(z).log_softmax(1), clean.exp(), reduction="sum").backward()
    expected = (x + (start - x + 0.01 * z.grad.sign()).clamp(-EPS, EPS)).clamp(0, 1)
    torch.testing.assert_close(PGD(steps=1, step_size=0.01, loss="kl")(net, x, y, start=start), expected)


def test_result_does_not_depend_on_the_batch_size(net):
    x, y = images(count=64, dtype=torch.float64)
    attack = PGD(steps=3, norm="l2", eps=0.5, random_start=False)
    parts = torch.cat([attack(net, a, b) for a, b in zip(x.split(8), y.split(8), strict=True)])
    torch.testing.assert_close(attack(net, x, y), parts)


class TestRestarts:
    def test_the_union_of_the_runs(self, net):
        x, y = images(count=40, dtype=torch.float64)
        y = net(x).argmax(1)
        single = PGD(eps=0.05, steps=1, step_size=0.02)
        union = PGD(eps=0.05, steps=1, step_size=0.02, restarts=6)
        runs = [single(net, x, y, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in range(6)]
        best = union(net, x, y, generator=torch.Generator().manual_seed(0))
        losses, predictions = zip(*(evaluated(net, run, y) for run in runs), strict=True)
        fooled = torch.stack(predictions) != y
        assert torch.equal(evaluated(net, best, y)[1] != y, fooled.any(0))
        assert int(fooled.any(0).sum()) > int(fooled[-1].sum())
        for i in range(len(x)):
            wins = fooled[:, i].nonzero()
            index = int(wins[0]) if len(wins) else int(torch.stack(losses)[:, i].argmax())
            assert torch.equal(best[i], runs[index][i])

    def test_early_stop_finds_no_less(self, net):
        x, y = images(count=40, dtype=torch.float64)
        y = net(x).argmax(1)
        full = PGD(eps=0.05, steps=4, restarts=3)
        stopped = PGD(eps=0.05, steps=4, restarts=3, early_stop=True)
        first, second = (
            evaluated(net, attack(net, x, y, generator=torch.Generator().manual_seed(0)), y)[1] != y
            for attack in (full, stopped)
        )
        assert bool((second | ~first).all())

    def test_a_given_start_counts_for_the_first_run(self, net):
        x, y = images(dtype=torch.float64)
        before = len(net.batches)
        PGD(steps=1, restarts=2)(net, x, y, start=x)
        assert len(net.batches) - before == 4


class TestEarlyStop:
    def test_returns_the_first_point_that_fools(self, net):
        x, _ = images(count=30, dtype=torch.float64)
        y = net(x).argmax(1)
        path = [x]
        one_more = PGD(eps=0.2, steps=1, step_size=0.01, random_start=False)
        for _ in range(20):
            start = path[-1]
            path.append(PGD(eps=0.2, steps=1, step_size=0.01)(net, x, y, start=start))
        stopped = PGD(eps=0.2, steps=20, step_size=0.01, random_start=False, early_stop=True)(net, x, y)
        wrong = torch.stack([evaluated(net, point, y)[1] != y for point in path])
        assert one_more.steps == 1
        for i in range(len(x)):
            hits = wrong[:, i].nonzero()
            expected = path[int(hits[0])][i] if len(hits) else path[-1][i]
            torch.testing.assert_close(stopped[i], expected)

    def test_fooled_samples_cost_nothing(self, net):
        x, _ = images(count=30, dtype=torch.float64)
        y = net(x).argmax(1)
        net.batches.clear()
        PGD(eps=0.5, steps=50, step_size=0.02, early_stop=True)(net, x, y)
        assert len(net.batches) < 50
        assert net.batches == sorted(net.batches, reverse=True)

    def test_misclassified_samples_stay(self, net):
        x, _ = images(dtype=torch.float64)
        y = (net(x).argmax(1) + 1) % CLASSES
        attacked = PGD(steps=5, random_start=False, early_stop=True)(net, x, y)
        assert torch.equal(attacked, x)

    def test_kl(self, net):
        x, _ = images(count=30, dtype=torch.float64)
        y = net(x).argmax(1)
        attacked = PGD(eps=0.3, steps=20, loss="kl", early_stop=True, restarts=2)(net, x, y)
        assert bool((evaluated(net, attacked, y)[1] != y).any())


@pytest.mark.parametrize("start", ["uniform", "radial"])
def test_random_starts_are_clipped_to_the_pixels(start):
    x = torch.ones(4, 3, 6, 6, dtype=torch.float64)
    begin = PGD(eps=0.1, random_start=start).draw_start(x, GeneratorDraws(torch.Generator().manual_seed(0)))
    assert float(begin.max()) <= 1
    assert float(begin.min()) < 1


def test_other_bounds(net):
    x, y = images(dtype=torch.float64)
    x = 255 * x
    attacked = PGD(eps=8.0, step_size=2.0, steps=3, bounds=(0, 255))(net, x, y)
    assert float((attacked - x).abs().max()) == pytest.approx(8.0)
    assert float(attacked.max()) <= 255


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_flat_inputs(norm):
    net = nn.Linear(7, 3)
    attacked = PGD(steps=2, norm=norm)(net, torch.rand(5, 7), torch.tensor([0, 1, 2, 0, 1]))
    assert attacked.shape == (5, 7)


def test_channels_last_stays(net):
    x, y = images(dtype=torch.float64)
    attacked = PGD(steps=2)(net, x.to(memory_format=torch.channels_last), y)
    assert attacked.is_contiguous(memory_format=torch.channels_last)


def test_repr_can_be_evaluated():
    attack = PGD(eps=0.1, norm="l2", steps=3, restarts=2, random_start="radial", mean=[0.5], std=[0.2])
    assert repr(eval(repr(attack))) == repr(attack)
    assert repr(PGD(step_size=0.01)) == f"PGD(eps={8 / 255}, step_size=0.01)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1}, "Expected `eps` to be a finite number >= 0"),
        ({"eps": float("nan")}, "Expected `eps`"),
        ({"steps": -1}, "Expected `steps` to be an integer >= 0"),
        ({"steps": 1.5}, "Expected `steps`"),
        ({"norm": "l7"}, "Expected `norm` to be one of 'linf', 'l2'"),
        ({"step_size": -0.1}, "Expected `step_size`"),
        ({"random_start": "gauss"}, "Expected `random_start`"),
        ({"restarts": 0}, "Expected `restarts` to be an integer >= 1"),
        ({"loss": "hinge"}, "Expected `loss` to be one of"),
        ({"mode": "test"}, "Expected `mode` to be one of 'eval', 'train', 'train-frozen-stats'"),
        ({"projection": "none"}, "Expected `projection`"),
        ({"seed": -1}, "Expected `seed`"),
        ({"mean": [0.5]}, "Expected both `mean` and `std`"),
        ({"mean": [0.5], "std": [0.1, 0.2]}, "of equal length but got 1 and 2"),
        ({"mean": [0.5], "std": [0.0]}, "Expected `std` to be a finite number > 0"),
        ({"bounds": (1, 0)}, r"Expected `bounds` to be \(low, high\)"),
        ({"early_stop": True, "mode": "train"}, "needs mode='eval', not 'train'"),
        ({"loss": "kl", "targeted": True}, "knows no target"),
        ({"loss": "lse", "targeted": True}, "loss='lse' compares with the clean prediction and knows no target"),
        ({"loss": "kl", "random_start": False}, "needs a random start"),
        ({"loss": "js", "random_start": False}, "loss='js' has no gradient at the clean images"),
        ({"random_start": False, "restarts": 2}, "all restarts are the same"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PGD(**options)
