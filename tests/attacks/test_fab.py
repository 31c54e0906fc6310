"""FAB against distances known exactly, a loop written out, its cost, its budget and what degenerates."""

import math

import pytest
import torch
from torch import nn

from lightning_robust.attacks import FAB, MultiTargeted
from lightning_robust.attacks.projections import (
    project_hyperplane_l1,
    project_hyperplane_l2,
    project_hyperplane_linf,
)
from support.attacked import CountingNet, differences, images, snapshot

NORMS = {"linf": (math.inf, 1), "l2": (2, 2), "l1": (1, math.inf)}
EPS = {"linf": 0.05, "l2": 0.4, "l1": 3.0}
PROJECTIONS = {"linf": project_hyperplane_linf, "l2": project_hyperplane_l2, "l1": project_hyperplane_l1}
everywhere = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def net():
    return CountingNet().double().eval()


def right(net, count=12, **options):
    """Images with the predicted class as label."""
    x, _ = images(count, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        return x, net(x).argmax(1)


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def length(delta, norm):
    return torch.linalg.vector_norm(delta.double().flatten(1), NORMS[norm][0], dim=1)


def others(net, x):
    """The second likeliest class."""
    with torch.no_grad():
        return net(x).argsort(1, descending=True)[:, 1]


def written_out(net, x, y, norm, steps, towards=None, eta=1.05, alpha_max=0.1, beta=0.9):
    """One image at a time, the gradient of each logit by itself; the closest point and its distance."""
    points, found = x.clone(), torch.full((len(x),), math.inf, dtype=x.dtype)
    order, dual = NORMS[norm]

    def record(i, at):
        size = float(torch.linalg.vector_norm((at - x[i]).flatten(), order))
        wrong = int(predicted(net, at[None])) != int(y[i])
        if wrong and size < found[i]:
            points[i], found[i] = at, size
        return wrong

    for i in range(len(x)):
        at, label = x[i].clone(), int(y[i])
        for _ in range(steps):
            record(i, at)
            jacobian = torch.autograd.functional.jacobian(lambda z: net(z[None])[0], at)
            logits = net(at[None])[0].detach()
            planes = []
            for t in range(len(logits)) if towards is None else [int(towards[i])]:
                if t != label:
                    w, f = (jacobian[t] - jacobian[label]).flatten(), float(logits[t] - logits[label])
                    planes.append((abs(f) / float(torch.linalg.vector_norm(w, dual)), t, w, f))
            _, _, w, f = min(planes, key=lambda plane: plane[:2])
            b = (w @ at.flatten() - f)[None]
            d1, d2 = (PROJECTIONS[norm](z.flatten()[None], w[None], b).view_as(at) for z in (at, x[i]))
            a1, a2 = (max(float(torch.linalg.vector_norm(d.flatten(), order)), 1e-8) for d in (d1, d2))
            alpha = min(a1 / (a1 + a2), alpha_max)
            at = ((1 - alpha) * (at + eta * d1) + alpha * (x[i] + eta * d2)).clamp(0, 1)
            if record(i, at):
                at = x[i] + beta * (at - x[i])
    return points, found


@everywhere
@pytest.mark.parametrize("steered", [True, False])
def test_same_as_the_loop_written_out(net, norm, steered):
    x, y = right(net, 6)
    towards = others(net, x) if steered else None
    points, found = FAB(norm=norm, steps=8).closest(net, x, y, towards=towards)
    expected, distances = written_out(net, x, y, norm, 8, towards)
    torch.testing.assert_close(found, distances, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-6)


@everywhere
def test_other_constants(net, norm):
    x, y = right(net, 4)
    constants = {"eta": 1.2, "alpha_max": 0.3, "beta": 0.7}
    _, found = FAB(norm=norm, steps=6, **constants).closest(net, x, y)
    _, expected = written_out(net, x, y, norm, 6, **constants)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@everywhere
def test_distance_to_the_boundary_of_a_linear_model(norm):
    torch.manual_seed(0)
    net = nn.Linear(20, 4).double()
    x = torch.full((8, 20), 0.5, dtype=torch.float64) + 0.05 * torch.rand(8, 20, dtype=torch.float64)
    y = predicted(net, x)
    logits, weight = net(x).detach(), net.weight.detach()
    gaps = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], math.inf)
    slopes = torch.linalg.vector_norm(weight - weight[y][:, None], NORMS[norm][1], dim=2)
    exact = (gaps / slopes.clamp(min=1e-12)).amin(1)
    inside = exact < (0.4 if norm != "l1" else 0.3)  # so near that no pixel is at its bound
    assert int(inside.sum()) >= 4
    _, found = FAB(norm=norm, steps=30).closest(net, x, y)
    assert bool((found >= exact * (1 - 1e-9)).all())
    torch.testing.assert_close(found[inside], exact[inside], rtol=0.01, atol=0)


@everywhere
@pytest.mark.parametrize("steered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_returns_points_that_fool_within_the_budget_or_the_clean_images(norm, steered, dtype):
    net = CountingNet().to(dtype).eval()
    x, y = right(net, 20, dtype=dtype)
    x_adv = FAB(eps=EPS[norm], norm=norm, steps=10)(net, x, y, towards=others(net, x) if steered else None)
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, dtype, False)
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    size = length(x_adv.double() - x.double(), norm)
    assert bool((size <= EPS[norm] * (1 + 1e-6)).all())
    moved = size > 0
    assert torch.equal(predicted(net, x_adv) != y, moved)
    assert 0 < int(moved.sum()) < len(x)


@everywhere
def test_finds_what_lies_within_the_budget_and_stops_there(net, norm):
    x, y = right(net, 20)
    _, found = FAB(norm=norm, steps=15).closest(net, x, y)
    eps = float(found.median()) * 1.001
    x_adv = FAB(eps=eps, norm=norm, steps=15)(net, x, y)
    assert torch.equal(predicted(net, x_adv) != y, found <= eps)
    assert bool((length(x_adv - x, norm) >= found - 1e-12)[found <= eps].all())


@everywhere
def test_minimum_norm_ignores_the_budget(net, norm):
    x, y = right(net)
    attack = FAB(eps=0, norm=norm, steps=10, minimum_norm=True)
    x_adv = attack(net, x, y)
    points, found = FAB(norm=norm, steps=10).closest(net, x, y)
    assert torch.equal(x_adv, points)
    torch.testing.assert_close(length(points - x, norm), found)
    assert bool((predicted(net, points) != y).all())


@everywhere
def test_wrong_samples_stay_and_their_distance_is_zero(net, norm):
    x, y = right(net)
    wrong = torch.arange(len(x)) % 3 == 0
    y = torch.where(wrong, others(net, x), y)
    points, found = FAB(norm=norm, steps=5).closest(net, x, y)
    assert torch.equal(points[wrong], x[wrong])
    assert bool((found[wrong] == 0).all() and (found[~wrong] > 0).all())
    assert torch.equal(FAB(eps=0, norm=norm, steps=5)(net, x, y), x)


def test_no_steps_find_nothing(net):
    x, y = right(net)
    points, found = FAB(steps=0).closest(net, x, y)
    assert torch.equal(points, x)
    assert bool(found.isinf().all())
    assert torch.equal(FAB(steps=0)(net, x, y), x)


class Counted(nn.Module):
    """A network that counts its forwards and input-backwards."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x):
        self.forwards += 1
        if x.requires_grad:
            x = x.clone()
            x.register_hook(self.count)
        return self.net(x)

    def count(self, gradient):
        self.backwards += 1


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("restarts", [1, 3])
def test_number_of_passes(classes, restarts):
    x, y = right(CountingNet(classes).double().eval())
    for steered in (True, False):
        net = Counted(CountingNet(classes).double().eval())
        y = predicted(net, x)
        net.forwards = 0
        attack = FAB(eps=1e-9, steps=7, restarts=restarts)  # nothing falls
        attack(net, x, y, towards=(y + 1) % classes if steered else None)
        assert net.forwards == 1 + 14 * restarts
        assert net.backwards == 7 * restarts * (1 if steered else classes - 1)
        if steered:
            assert attack.passes == (net.forwards + net.backwards) / 2


def test_fooled_samples_leave(net):
    x, y = right(net)
    net.batches.clear()
    FAB(eps=1.0, steps=50)(net, x, y)
    assert len(net.batches) < 20
    assert net.batches[0] == len(x)
    y[0] = (y[0] + 1) % 4
    net.batches.clear()
    FAB(eps=1e-9, steps=1)(net, x, y)
    assert net.batches == [len(x), len(x) - 1, len(x) - 1]


@everywhere
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_and_the_last_one(norm, classes):
    net = CountingNet(classes).double().eval()
    x, y = right(net)
    for towards in (None, torch.where(y == classes - 1, 0, classes - 1)):
        points, found = FAB(norm=norm, steps=20).closest(net, x, y, towards=towards)
        assert bool(found.isfinite().all())
        assert bool((predicted(net, points) != y).all())


class Logits(nn.Module):
    """Logits as a function of flat images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


DEGENERATE = {
    "no gradient": lambda x: torch.stack([1 + 0 * x.sum(1), 0 * x.sum(1), -1 + 0 * x.sum(1)], 1),
    "equal logits": lambda x: torch.stack([x.sum(1), x.sum(1), x.sum(1)], 1),
    "unreachable": lambda x: torch.stack([100 + x[:, 0], x[:, 1], x[:, 2]], 1),
    "gradient of one class only": lambda x: torch.stack([1 + x[:, 0], 1.5 * x[:, 1], x[:, 0] + 0.9], 1),
    "tiny gradients": lambda x: 1e-30 * torch.stack([1 + x[:, 0], 2 * x[:, 1], x[:, 2]], 1),
    "huge gradients": lambda x: 1e25 * torch.stack([1 + x[:, 0], 3 * x[:, 1], x[:, 2]], 1),
}


@everywhere
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("steered", [True, False])
def test_degenerate_models_give_finite_points(norm, kind, steered):
    net = Logits(DEGENERATE[kind])
    x = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(2)) * 0.4
    y = torch.zeros(5, dtype=torch.int64)
    points, found = FAB(norm=norm, steps=10).closest(net, x, y, towards=torch.full((5,), 1) if steered else None)
    assert bool(points.isfinite().all())
    assert not bool(found.isnan().any())
    if kind in ("no gradient", "equal logits", "unreachable"):
        assert torch.equal(points, x)
        assert bool(found.isinf().all())
    else:  # a pixel has to grow; with tiny gradients as well as with large ones
        assert bool((predicted(net, points) == 1).all())


@everywhere
def test_scale_of_the_logits_does_not_matter(net, norm):
    x, y = right(net)
    reference = FAB(norm=norm, steps=5).closest(net, x, y)[1]
    for factor in (1e-200, 1e100):
        scaled = Logits(lambda z, factor=factor: factor * net(z.view_as(x[: len(z)])))
        torch.testing.assert_close(FAB(norm=norm, steps=5).closest(scaled, x, y)[1], reference)


@everywhere
def test_restarts_begin_at_half_the_budget(norm):
    x, eps = torch.full((50, 1, 4, 4), 0.5, dtype=torch.float64), {"linf": 0.9, "l2": 0.8, "l1": 1.0}[norm]
    attack = FAB(eps=eps, norm=norm)
    with attack.posed(Logits(lambda x: x), x, torch.zeros(50, dtype=torch.int64)) as problem:
        start = attack.draw_start(x, problem.draws)
    torch.testing.assert_close(length(start - x, norm), torch.full((50,), eps / 2, dtype=torch.float64))
    assert bool(((start > x).double().mean((1, 2, 3)) - 0.5).abs().mean() < 0.2)


@everywhere
def test_restarts_get_away_from_a_flat_place(norm):
    net = Logits(lambda x: torch.stack([torch.full_like(x[:, 0], 0.5), 10 * (x - 0.6).relu().sum(1)], 1))
    x, y = torch.full((10, 1, 3, 3), 0.55, dtype=torch.float64), torch.zeros(10, dtype=torch.int64)
    options = {"eps": {"linf": 0.4, "l2": 2.0, "l1": 6.0}[norm], "norm": norm, "steps": 20}
    assert bool(FAB(**options).closest(net, x, y)[1].isinf().all())
    few = FAB(**options, restarts=2).closest(net, x, y, indices=torch.arange(10))[1]
    more = FAB(**options, restarts=6).closest(net, x, y, indices=torch.arange(10))[1]
    assert bool(more.isfinite().all() and (more <= few).all() and (more < few).any())


@everywhere
@pytest.mark.parametrize("steered", [True, False])
def test_result_depends_on_the_sample_and_its_index_alone(net, norm, steered):
    x, y = right(net)
    towards, index = others(net, x) if steered else None, torch.arange(100, 100 + len(x))
    attack = FAB(eps=EPS[norm], norm=norm, steps=6, restarts=3)
    together = attack(net, x, y, indices=index, towards=towards)
    order = torch.randperm(len(x))
    for rows in (*order.split(5), *order[:3].split(1)):
        part = attack(net, x[rows], y[rows], indices=index[rows], towards=None if towards is None else towards[rows])
        torch.testing.assert_close(part, together[rows], rtol=0, atol=1e-7)


def test_a_start_is_used_as_it_is(net):
    x, y = right(net)
    start = FAB(steps=20, minimum_norm=True)(net, x, y)
    # an adversarial start counts, so one step from it is never farther
    x_adv = FAB(steps=1, minimum_norm=True)(net, x, y, start=start)
    assert bool((length(x_adv - x, "linf") <= length(start - x, "linf") + 1e-12).all())


def test_empty_batch(net):
    x, y = right(net)
    assert FAB()(net, x[:0], y[:0]).shape == (0, 3, 6, 6)
    points, found = FAB().closest(net, x[:0], y[:0])
    assert (points.shape, found.shape) == ((0, 3, 6, 6), (0,))


@everywhere
def test_normalised_images_are_measured_in_pixels(net, norm):
    x, y = right(net)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    shift, scale = (torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1) for value in (mean, std))
    inner = Logits(lambda z: net(z.view(-1, *x.shape[1:]) * scale + shift))
    points, found = FAB(norm=norm, steps=6).closest(net, x, y)
    attack = FAB(norm=norm, steps=6, mean=mean, std=std)
    normalised, distances = attack.closest(inner, (x - shift) / scale, y)
    torch.testing.assert_close(distances, found, rtol=1e-7, atol=0)
    torch.testing.assert_close(normalised * scale + shift, points, rtol=0, atol=1e-7)


def test_other_bounds(net):
    x, y = right(net)
    wide = Logits(lambda z: net(z.view(-1, *x.shape[1:]) / 255))
    _, found = FAB(steps=6).closest(net, x, y)
    points, distances = FAB(steps=6, bounds=(0.0, 255.0)).closest(wide, 255 * x, y)
    torch.testing.assert_close(distances / 255, found)
    assert bool(((points >= 0) & (points <= 255)).all())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_leaves_the_model_and_its_gradients_alone(context):
    net = CountingNet(dropout=0.3)
    x, y = images()
    nn.functional.cross_entropy(net(x), y).backward()
    before, state = snapshot(net), torch.get_rng_state()
    for towards in (None, (y + 1) % 4):
        expected = FAB(steps=3, restarts=2)(net, x, y, towards=towards)
        with context():
            attacked = FAB(steps=3, restarts=2)(net, x.clone(), y.clone(), towards=towards)
        assert torch.equal(attacked, expected)
    FAB(steps=3).closest(net, x, y)
    assert differences(net, before) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_soft_labels_count_by_their_largest_class(net):
    x, y = right(net)
    soft = nn.functional.one_hot(y, 4) * 0.7 + 0.075
    assert torch.equal(FAB(steps=4)(net, x, soft.double()), FAB(steps=4)(net, x, y))


def test_every_target_in_turn_is_fab_t(net):
    x, y = right(net)
    found = torch.stack([FAB(steps=20).closest(net, x, y, towards=(y + k) % 4)[1] for k in (1, 2, 3)]).amin(0)
    eps = float(found.median()) * 1.001
    x_adv = MultiTargeted(FAB(eps=eps, steps=20))(net, x, y)
    assert torch.equal(predicted(net, x_adv) != y, found <= eps)


def test_repr_can_be_evaluated():
    attack = FAB(eps=0.1, norm="l2", steps=3, minimum_norm=True)
    assert repr(eval(repr(attack))) == repr(attack) == "FAB(eps=0.1, norm='l2', steps=3, minimum_norm=True)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l0"}, "Expected `norm` to be one of 'linf', 'l2', 'l1'"),
        ({"steps": -1}, "Expected `steps` to be an integer >= 0"),
        ({"eta": 0}, "Expected `eta` to be a finite number > 0"),
        ({"alpha_max": 1.1}, r"Expected `alpha_max` to be in \[0, 1\]"),
        ({"beta": -0.1}, r"Expected `beta` to be in \[0, 1\]"),
        ({"eps": -1}, "Expected `eps`"),
        ({"restarts": 0}, "Expected `restarts`"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FAB(**options)


def test_refuses_a_budget_per_sample(net):
    x, y = right(net)
    with pytest.raises(ValueError, match="FAB has one budget for all samples"):
        FAB()(net, x, y, scale=torch.ones(len(x)))
    with pytest.raises(ValueError, match="Expected images"):
        FAB().closest(net, x, y[:3])
