"""APGD against a loop written out per sample, its budget, its cost and its edge cases."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import APGD
from lightning_robust.attacks.apgd_l1 import budgets, sparse_direction
from lightning_robust.attacks.apgd_momentum import MomentumSteps
from lightning_robust.attacks.climb import Outcome
from lightning_robust.attacks.losses import ATTACK_LOSSES
from lightning_robust.attacks.region import region
from lightning_robust.attacks.space import InputSpace
from support.attacked import CLASSES, CountingNet, images

BUDGETS = {"linf": 8 / 255, "l2": 0.5, "l1": 4.0}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def net():
    return CountingNet().double().eval()


def fooled(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) != y


def loss_of(net, x, y, loss="ce"):
    with torch.no_grad():
        return ATTACK_LOSSES[loss](net(x), y)


def right(net, count=24, dtype=torch.float64):
    """Images and the classes that the model gives them."""
    x, _ = images(count, dtype=dtype)
    with torch.no_grad():
        return x, net(x).argmax(1)


def sizes(delta, norm):
    flat = delta.double().flatten(1)
    return {"linf": flat.abs().amax(1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(1)}[norm]


def project_one(x, point, eps, norm):
    delta = point - x
    if norm == "linf":
        return (x + delta.clamp(-eps, eps)).clamp(0, 1)
    if norm == "l2":
        return (x + delta * min(1.0, eps / max(float(delta.norm()), 1e-12))).clamp(0, 1)
    room = torch.where(delta > 0, 1 - x, x)
    low, high = 0.0, float(delta.abs().max())

    def shrunk(threshold):
        return torch.minimum((delta.abs() - threshold).clamp(min=0), room)

    if float(shrunk(0.0).sum()) <= eps:
        high = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shrunk(middle).sum()) > eps else (low, middle)
    return x + delta.sign() * shrunk(high)


def one_run(net, x, y, start, eps, norm, steps, loss):
    """One sample, written out: the table of losses, the count over the last k of them, all points of the path."""

    def look(point):
        point = point[None].clone().requires_grad_()
        value = ATTACK_LOSSES[loss](net(point), y[None])
        (gradient,) = torch.autograd.grad(value.sum(), point)
        return float(value.detach()), gradient[0]

    point = project_one(x, start, eps, norm)
    value, gradient = look(point)
    best, best_value, best_gradient = point, value, gradient
    path, table = [(point, value)], [0.0]  # the loss before the first step counts as zero
    eta, previous, since = 2 * eps, None, 0
    period = max(int(0.22 * steps), 1)
    halved, best_at_check = True, value
    fraction, entries, eta_l1 = 0.2, x.numel(), eps
    count, l1_period = float(entries), max(int(0.04 * steps), 1)
    for step in range(steps):
        if norm == "l1":
            order = gradient.abs().flatten().sort().values
            least = order[min(max(int((1 - fraction) * entries), 0), entries - 1)]
            signs = torch.where(gradient.abs() >= least, gradient.sign(), 0.0)
            new = project_one(x, point + eta_l1 * signs / signs.abs().sum(), eps, norm)
        else:
            direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
            new = project_one(x, point + eta * direction, eps, norm)
            if step > 0:
                new = project_one(x, point + 0.75 * (new - point) + 0.25 * (point - previous), eps, norm)
        previous, point = point, new
        value, gradient = look(point)
        path.append((point, value))
        table.append(value)
        if value > best_value:
            best, best_value, best_gradient = point, value, gradient
        since += 1
        if norm == "l1":
            if since == l1_period:
                pixels = float((best != x).sum())
                sparser, since = pixels / count < 0.95, 0
                fraction, count = pixels / entries / 1.5, pixels
                eta_l1 = eps if sparser else max(eta_l1 / 1.5, eps / 10)
                if sparser:
                    point, gradient = best, best_gradient
        elif since == period:
            rises = sum(table[-j] > table[-j - 1] for j in range(1, period + 1))
            halved = rises <= 0.75 * period or (not halved and best_at_check >= best_value)
            best_at_check, since = best_value, 0
            if halved:
                eta, point, gradient = eta / 2, best, best_gradient
            period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return path


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_same_as_the_loop_written_out(net, norm, steps, loss):
    x, y = right(net, 5)
    eps = BUDGETS[norm]
    start = (x + 0.02 * torch.randn_like(x)).clamp(0, 1)
    attack = APGD(eps=eps, norm=norm, steps=steps, loss=loss, early_stop=False)
    # torch.renorm stays 1e-7 below the radius
    close = {"rtol": 0, "atol": 1e-6 if norm == "l2" else 1e-9}
    worst = attack.replaced(best_loss=True)(net, x, y, start=start)
    listed = attack(net, x, y, start=start)
    first = attack.replaced(early_stop=True)(net, x, y, start=start)
    for i in range(len(x)):
        path = one_run(net, x[i], y[i], start[i], eps, norm, steps, loss)
        points, values = torch.stack([point for point, _ in path]), torch.tensor([value for _, value in path])
        wrong = fooled(net, points, y[i])
        torch.testing.assert_close(worst[i], points[values.argmax()], **close)
        among = values.masked_fill(~wrong, -math.inf) if bool(wrong.any()) else values
        torch.testing.assert_close(listed[i], points[among.argmax()], **close)
        index = int(wrong.int().argmax()) if bool(wrong.any()) else int(values.argmax())
        torch.testing.assert_close(first[i], points[index], **close)


@pytest.mark.parametrize("options", [{}, {"early_stop": False}], ids=["early", "full"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_leaves_budget_and_pixels(dtype, norm, options):
    net = CountingNet().to(dtype).eval()
    x, y = images(dtype=dtype)
    x[:3] = x[:3].round()
    for eps in (BUDGETS[norm], 1e-3, 10 * BUDGETS[norm]):
        attack = APGD(eps=eps, norm=norm, steps=10, largereps=norm == "l1", **options)
        x_adv = attack(net, x, y)
        assert x_adv.dtype == dtype
        assert bool((sizes(x_adv.double() - x.double(), norm) <= eps * (1 + 1e-6)).all())
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_normalised_images(norm):
    net = CountingNet().double().eval()
    x, y = images(dtype=torch.float64)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    m, s = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (mean, std))
    attack = APGD(eps=BUDGETS[norm], norm=norm, steps=10)
    plain = attack(lambda z: net((z - m) / s), x, y, indices=torch.arange(len(x)))
    normalised = attack.replaced(mean=mean, std=std)(net, (x - m) / s, y, indices=torch.arange(len(x)))
    torch.testing.assert_close(normalised * s + m, plain, rtol=0, atol=1e-9)


class TestPasses:
    @pytest.mark.parametrize(
        ("options", "forwards", "backwards"),
        [
            ({}, 13, 12),
            ({"norm": "l2"}, 13, 12),
            ({"norm": "l1"}, 13, 12),
            ({"norm": "l1", "largereps": True}, 15, 12),
            ({"restarts": 3}, 39, 36),
            ({"eot": 4}, 52, 48),
            ({"loss": "kl"}, 14, 12),
            ({"steps": 0}, 1, 0),
            ({"steps": 1}, 2, 1),
            ({"steps": 1, "norm": "l1", "largereps": True}, 3, 1),
        ],
    )
    def test_one_more_forward_than_backwards(self, net, options, forwards, backwards):
        x, y = images(dtype=torch.float64)
        seen = []
        net.conv.register_full_backward_hook(lambda *_: seen.append(1))
        attack = APGD(**{"steps": 12, "early_stop": False, **options})
        attack(net, x, y)
        assert len(net.batches) == forwards
        assert len(seen) == backwards
        assert attack.passes == (forwards + backwards) / 2

    def test_fooled_samples_leave(self, net):
        x, y = right(net)
        net.batches.clear()
        attack = APGD(eps=0.05, steps=30)
        x_adv = attack(net, x, y)
        assert net.batches == sorted(net.batches, reverse=True)
        left = int((~fooled(net, x_adv, y)).sum())
        assert 0 < left < len(x)
        assert net.batches[-2] >= left

    def test_nothing_left_ends_the_run(self, net):
        x, y = right(net)
        net.batches.clear()
        x_adv = APGD(eps=0.9, steps=100, restarts=3)(net, x, y)
        assert len(net.batches) < 30
        assert bool(fooled(net, x_adv, y).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
class TestStructure:
    def test_what_falls_does_not_depend_on_early_stop(self, net, norm):
        x, y = right(net)
        attack = APGD(eps=BUDGETS[norm], norm=norm, steps=25, restarts=2)
        indices = torch.arange(len(x))
        early = attack(net, x, y, indices=indices)
        full = attack.replaced(early_stop=False)(net, x, y, indices=indices)
        hit = fooled(net, early, y)
        assert 0 < int(hit.sum()) < len(x)
        assert torch.equal(hit, fooled(net, full, y))
        torch.testing.assert_close(early[~hit], full[~hit], rtol=0, atol=1e-12)
        assert bool((loss_of(net, full, y)[hit] >= loss_of(net, early, y)[hit]).all())

    def test_the_best_loss_is_no_less_than_any_other(self, net, norm):
        x, y = right(net)
        attack = APGD(eps=BUDGETS[norm], norm=norm, steps=25, early_stop=False)
        indices = torch.arange(len(x))
        best = loss_of(net, attack.replaced(best_loss=True)(net, x, y, indices=indices), y)
        assert bool((best >= loss_of(net, attack(net, x, y, indices=indices), y) - 1e-12).all())
        start = attack.replaced(steps=0)(net, x, y, indices=indices)
        assert bool((best >= loss_of(net, start, y)).all())
        assert float(best.mean()) > float(loss_of(net, start, y).mean())

    def test_restarts_only_add(self, net, norm):
        x, y = right(net, 40)
        indices = torch.arange(len(x))
        attack = APGD(eps=BUDGETS[norm], norm=norm, steps=2)
        one, many = (attack.replaced(restarts=n)(net, x, y, indices=indices) for n in (1, 6))
        first, all_of_them = fooled(net, one, y), fooled(net, many, y)
        assert bool((all_of_them | ~first).all())
        assert torch.equal(many[first], one[first])
        kept = ~all_of_them
        assert bool((loss_of(net, many, y)[kept] >= loss_of(net, one, y)[kept]).all())

    def test_depends_on_no_other_sample(self, net, norm):
        x, y = right(net)
        attack = APGD(eps=BUDGETS[norm], norm=norm, steps=15, restarts=2, seed=5)
        indices = torch.arange(len(x)) + 100
        together = attack(net, x, y, indices=indices)
        order = torch.randperm(len(x))
        mixed = attack(net, x[order], y[order], indices=indices[order])
        torch.testing.assert_close(mixed, together[order], rtol=0, atol=1e-9)
        alone = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], indices=indices[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(alone, together[:4], rtol=0, atol=1e-9)
        starts = [attack.replaced(seed=seed, steps=0)(net, x, y, indices=indices) for seed in (5, 6)]
        assert not torch.equal(*starts)

    def test_reaches_what_is_there(self, norm):
        # of a linear model the worst point is known
        model = nn.Linear(20, 2).double()
        x = torch.full((4, 20), 0.5, dtype=torch.float64)
        y = torch.tensor([0, 1, 0, 1])
        w = (model.weight[1] - model.weight[0]).detach()
        attack = APGD(eps=0.3, norm=norm, steps=100, loss="margin", early_stop=False, best_loss=True)
        x_adv = attack(model, x, y)
        dual = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm]
        gain = (x_adv - x) @ w * torch.tensor([1.0, -1.0, 1.0, -1.0])
        # sparse steps of so few entries never become as sparse as the solution
        rtol = 0.1 if norm == "l1" else 1e-3
        torch.testing.assert_close(gain.detach(), (0.3 * dual).detach().expand(4), rtol=rtol, atol=0)

    def test_edge_cases(self, net, norm):
        x, y = images(dtype=torch.float64)
        options = {"norm": norm, "restarts": 2}
        assert torch.equal(APGD(eps=0.0, steps=3, **options)(net, x, y), x)
        assert APGD(**options)(net, x[:0], y[:0]).shape == (0, *x.shape[1:])
        assert APGD(eps=0.1, steps=3, **options)(net, x[:1], y[:1]).shape == (1, *x.shape[1:])
        wrong = (net(x).argmax(1) + 1) % CLASSES
        assert bool(fooled(net, APGD(eps=BUDGETS[norm], steps=3, **options)(net, x, wrong), wrong).all())

    def test_a_start_outside_is_brought_in(self, net, norm):
        x, y = images(dtype=torch.float64)
        x_adv = APGD(eps=0.1, norm=norm, steps=0)(net, x, y, start=1 - x)
        assert bool((sizes(x_adv - x, norm) <= 0.1 * (1 + 1e-9)).all())
        assert float(sizes(x_adv - x, norm).min()) > 0.05


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts(norm):
    x = images(dtype=torch.float64)[0] * 0.2 + 0.4
    attack = APGD(eps=0.1, norm=norm, steps=0, early_stop=False)
    net = CountingNet().double().eval()
    y = torch.zeros(len(x), dtype=torch.long)
    first, second = (attack(net, x, y) for _ in range(2))
    assert not torch.equal(first, second)
    # all of them touch the ball
    torch.testing.assert_close(
        sizes(first - x, norm), torch.full((len(x),), 0.1, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("loss", ["ce", "margin", "prob-margin", "kl", "dlr"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_any_number_of_classes_and_the_last_one(loss, classes):
    if (classes, loss) == (2, "dlr"):
        return
    net = CountingNet(classes).eval()
    x, _ = images()
    y = torch.full((len(x),), classes - 1)
    x_adv = APGD(eps=0.1, steps=6, loss=loss)(net, x, y)
    assert bool(x_adv.isfinite().all())
    if loss != "kl":
        assert float(loss_of(net, x_adv, y, "margin").sum()) > float(loss_of(net, x, y, "margin").sum())


def test_dlr_needs_three_classes():
    x, _ = images()
    with pytest.raises(ValueError, match="at least 3 classes"):
        APGD(steps=1, loss="dlr")(CountingNet(2).eval(), x, torch.zeros(len(x), dtype=torch.long))


def test_targeted_and_towards(net):
    x, y = right(net)
    wanted = (y + 1) % CLASSES
    x_adv = APGD(eps=0.5, steps=30, targeted=True)(net, x, wanted)
    with torch.no_grad():
        assert float((net(x_adv).argmax(1) == wanted).double().mean()) > 0.8
    steered = APGD(eps=0.1, steps=30, loss="dlr")(net, x, y, towards=wanted)
    assert bool(fooled(net, steered, y).any())


def test_soft_targets(net):
    x, y = right(net)
    attack = APGD(steps=8)
    one_hot = F.one_hot(y, CLASSES).double()
    indices = torch.arange(len(x))
    torch.testing.assert_close(attack(net, x, one_hot, indices=indices), attack(net, x, y, indices=indices))


class TestLowPrecision:
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
    def test_where_gradients_are_off(self, net, norm, context):
        x, y = images(dtype=torch.float64)
        attack = APGD(eps=BUDGETS[norm], norm=norm, steps=5)
        expected = attack(net, x, y, indices=torch.arange(len(x)))
        with context():
            x, y = images(dtype=torch.float64)
            start = x.clone()
            assert torch.equal(attack(net, x, y, indices=torch.arange(len(x))), expected)
            assert attack(net, x, y, start=start).shape == x.shape

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
    def test_autocast(self, norm, dtype):
        net = CountingNet().eval()
        x, y = right(net, dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            x_adv = APGD(eps=BUDGETS[norm], norm=norm, steps=8)(net, x, y)
        assert x_adv.dtype == torch.float32
        assert float(loss_of(net, x_adv, y).mean()) > float(loss_of(net, x, y).mean())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
    def test_what_was_judged_is_what_is_returned(self, norm, dtype):
        net = CountingNet().to(dtype).eval()
        x, y = right(net, dtype=dtype)
        seen = []
        attack = APGD(eps=2 * BUDGETS[norm], norm=norm, steps=10, early_stop=False, best_loss=True, loss="margin")

        def watched(z):
            logits = net(z)
            seen.append(ATTACK_LOSSES["margin"](logits.detach().float(), y))
            return logits

        x_adv = attack(watched, x, y)
        torch.testing.assert_close(loss_of(lambda z: net(z).float(), x_adv, y, "margin"), torch.stack(seen).amax(0))


class TestRandomisedModels:
    def test_an_ordinary_model_sees_the_same_path(self, net):
        x, y = right(net)
        attack = APGD(steps=8)
        one, many = (attack.replaced(eot=k)(net, x, y, indices=torch.arange(len(x))) for k in (1, 3))
        torch.testing.assert_close(one, many, rtol=0, atol=1e-9)

    def test_averages_gradient_loss_and_prediction(self):
        class Alternating(nn.Module):
            """Two linear models in turn, whose mean is known."""

            def __init__(self):
                super().__init__()
                generator = torch.Generator().manual_seed(2)
                self.weights = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
                self.calls = 0

            def forward(self, z):
                self.calls += 1
                return z @ self.weights[self.calls % 2].T

        model = Alternating()
        x = torch.rand(6, 12, dtype=torch.float64)
        y = torch.tensor([0, 1, 2, 0, 1, 2])
        attack = APGD(eps=0.1, steps=4, eot=2, early_stop=False, best_loss=True)
        best = attack(model, x, y, start=x)

        def mean_loss(z):
            return torch.stack([F.cross_entropy(z @ w.T, y, reduction="none") for w in model.weights]).mean(0)

        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mean_loss(z).sum(), z)
        path = [attack.replaced(steps=1)(model, x, y, start=x), best]
        torch.testing.assert_close(path[0], (x + (0.2 * gradient.sign()).clamp(-0.1, 0.1)).clamp(0, 1))
        assert bool((mean_loss(best) >= mean_loss(path[0]) - 1e-12).all())
        hit = attack.replaced(early_stop=True, best_loss=False)(model, x, y, start=x)
        mean = torch.stack([(hit @ w.T).softmax(1) for w in model.weights]).mean(0)
        started = torch.stack([(x @ w.T).softmax(1) for w in model.weights]).mean(0).argmax(1) != y
        assert torch.equal(hit[started], x[started])
        assert bool((mean.argmax(1) != y)[started].all())


class TestSteps:
    def steps(self, count, eps=1.0, samples=2):
        around = region("linf", torch.full((samples, 3), 0.5, dtype=torch.float64), eps, InputSpace(), torch.float64)
        return MomentumSteps(around, "linf", count, rho=0.75, momentum=0.75)

    def outcome(self, loss):
        return Outcome(torch.zeros(len(loss), 3), loss, torch.zeros(len(loss), dtype=torch.bool))

    def test_published_checkpoints(self):
        steps, flat = self.steps(100), torch.zeros(2, dtype=torch.float64)
        steps.check(flat, self.outcome(flat))
        times = [i for i in range(1, 101) if steps.check(flat, self.outcome(flat)) is not None]
        assert times == [22, 41, 57, 70, 80, 87, 93, 99]

    def test_halves_where_few_steps_raise_the_loss(self):
        steps = self.steps(100)
        loss = torch.ones(2, dtype=torch.float64)
        steps.check(loss, self.outcome(loss))
        answers = []
        for step in range(1, 42):
            # the first sample rises in each step, the second in one of two
            loss = loss + torch.tensor([1.0, 1.0 if step % 2 else -0.5], dtype=torch.float64)
            back = steps.check(loss, self.outcome(loss))
            if back is not None:
                answers.append(back.tolist())
        assert answers == [[False, True], [False, True]]
        assert steps._size.tolist() == [2.0, 0.5]

    def test_halves_where_neither_loss_nor_step_has_changed(self):
        steps = self.steps(100)
        path, best = torch.ones(2, dtype=torch.float64), torch.full((2,), 50.0, dtype=torch.float64)
        steps.check(best, self.outcome(best))
        answers = []
        for _ in range(70):
            path = path + 0.1  # always rising, never above the best
            back = steps.check(path, self.outcome(best))
            if back is not None:
                answers.append(back[0].item())
        # at the first checkpoint the step size counts as just reduced
        assert answers == [False, True, False, True]

    def test_the_first_loss_is_compared_with_zero(self):
        steps = self.steps(4)  # a checkpoint after every step
        start, first = torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, 0.5])
        steps.check(start, self.outcome(start))
        assert steps.check(first, self.outcome(torch.maximum(start, first))).tolist() == [True, False]

    def test_schedule_of_budgets(self):
        assert budgets(2.0, 100, larger=True) == [(6.0, 30), (4.0, 30), (2.0, 40)]
        assert budgets(2.0, 100, larger=False) == [(2.0, 100)]
        for count in range(30):
            phases = budgets(2.0, count, larger=True)
            assert sum(number for _, number in phases) == count
            assert phases[-1][0] == 2.0
            assert all(number >= 0 for _, number in phases)

    def test_sparse_direction(self):
        gradient = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
        fraction = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0])
        step = sparse_direction(gradient, fraction)
        for i, kept in enumerate([1, 2, 3, 6, 12]):
            largest = gradient[i].flatten().abs().topk(kept).indices
            expected = torch.zeros(12).index_copy(0, largest, gradient[i].flatten()[largest].sign() / kept)
            torch.testing.assert_close(step[i].flatten(), expected)
        assert torch.equal(sparse_direction(torch.zeros(1, 4), torch.tensor([0.5])), torch.zeros(1, 4))


def test_larger_budgets_first_end_inside_and_help():
    net = CountingNet().double().eval()
    x, y = right(net, 40)
    attack = APGD(eps=2.0, norm="l1", steps=40, early_stop=False, best_loss=True)
    plain, larger = (attack.replaced(largereps=flag)(net, x, y, indices=torch.arange(len(x))) for flag in (False, True))
    assert bool((sizes(larger - x, "l1") <= 2.0 * (1 + 1e-9)).all())
    assert float(loss_of(net, larger, y).mean()) > 0.95 * float(loss_of(net, plain, y).mean())


def test_as_the_attack_of_a_training():
    net = CountingNet().double().train()
    x, y = images(dtype=torch.float64)
    before = net.norm.running_mean.clone()
    x_adv = APGD(steps=3, mode="train", early_stop=False, best_loss=True)(net, x, y)
    assert net.norm.num_batches_tracked == 4
    assert not torch.equal(net.norm.running_mean, before)
    with torch.no_grad():
        assert float(F.cross_entropy(net(x_adv), y)) > float(F.cross_entropy(net(x), y))


def test_repr_can_be_evaluated():
    attack = APGD(eps=0.1, norm="l1", steps=3, largereps=True, restarts=2, loss="dlr", eot=2)
    assert repr(eval(repr(attack))) == repr(attack)
    assert repr(APGD()) == f"APGD(eps={8 / 255})"
    assert list(attack.stages(10)) == ["APGD"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1}, "Expected `eps` to be a finite number >= 0"),
        ({"norm": "l3"}, "Expected `norm` to be one of 'linf', 'l2', 'l1'"),
        ({"steps": -1}, "Expected `steps` to be an integer >= 0"),
        ({"rho": 1.5}, r"Expected `rho` to be in \[0, 1\]"),
        ({"momentum": -0.1}, r"Expected `momentum` to be in \[0, 1\]"),
        ({"eot": 0}, "Expected `eot` to be an integer >= 1"),
        ({"restarts": 0}, "Expected `restarts` to be an integer >= 1"),
        ({"loss": "hinge"}, "Expected `loss` to be one of"),
        ({"largereps": True}, "is a schedule of budgets for norm='l1'"),
        ({"best_loss": True}, "needs early_stop=False"),
        ({"mode": "train"}, "needs mode='eval', not 'train'"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        APGD(**options)
