"""The Square attack: what it finds, what it costs, and who leaves when."""

import pytest
import torch
from torch import nn

from lightning_robust.attacks import Square, square_search
from lightning_robust.attacks import square as module
from support.attacked import CountingNet, images

BUDGETS = {"linf": 0.05, "l2": 0.5, "l1": 3.0}
NORMS = sorted(BUDGETS)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return CountingNet().eval()


def size(delta, norm):
    return torch.linalg.vector_norm(delta.flatten(1), {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


def linear(weight):
    """A classifier of two classes whose margin for class 0 is 10 + weight . x."""
    return lambda x: torch.stack([(x * weight).flatten(1).sum(1) + 10, torch.zeros(len(x), dtype=x.dtype)], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_it_nears_the_optimum_of_a_linear_model(norm):
    weight = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, y = torch.full((3, 1, 6, 6), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    eps = {"linf": 0.1, "l2": 0.4, "l1": 0.4}[norm]
    best = eps * {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}[norm]
    model = linear(weight)
    attacked = Square(eps=eps, norm=norm, queries=1000, rescale_schedule=True)(model, x, y)
    lowered = model(x)[:, 0] - model(attacked)[:, 0]
    assert bool((lowered <= best + 1e-9).all())
    assert bool((lowered >= {"linf": 0.97, "l2": 0.65, "l1": 0.6}[norm] * best).all()), lowered / best


def test_the_last_row_and_column_are_reached():
    weight = torch.zeros(1, 6, 6)
    weight[:, -1, :], weight[:, :, -1] = torch.tensor([1.0, -1, 1, 1, -1, 1]), torch.tensor([-1.0, 1, 1, -1, 1, 1])
    x, y = torch.full((2, 1, 6, 6), 0.5), torch.zeros(2, dtype=torch.int64)
    attacked = Square(eps=0.1, queries=600, rescale_schedule=True)(linear(weight), x, y)
    torch.testing.assert_close((attacked - x)[:, 0][:, weight[0] != 0].sign(), -weight[weight != 0].expand(2, -1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 24, 24), (3, 7, 16), (2, 16, 3), (5, 40), (30,), (1, 1, 1), (2, 2)])
def test_images_of_any_size_signals_and_vectors(norm, shape):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, *shape, generator=generator), torch.tensor([0, 1, 1])
    weight = torch.randn(x[0].numel(), 2, generator=generator)
    attack = Square(eps=BUDGETS[norm], norm=norm, queries=40)
    attacked = attack(lambda z: z.flatten(1) @ weight, x, y)
    assert attacked.shape == x.shape
    assert float(size(attacked - x, norm).max()) <= BUDGETS[norm] * (1 + 1e-5)
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1


def test_images_of_more_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"Expected images \[B, C, H, W\], signals .* but got \[2, 3, 4, 5, 6\]"):
        Square()(lambda x: x.flatten(1)[:, :3], torch.rand(2, 3, 4, 5, 6), torch.tensor([0, 1]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_budget_and_bounds_hold_in_every_type(norm, dtype):
    x, y = images(dtype=dtype)
    x[:4] = x[:4].round()
    weight = torch.randn(108, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attack = Square(eps=BUDGETS[norm], norm=norm, queries=60)
    attacked = attack(lambda z: z.double().flatten(1) @ weight, x, y)
    assert attacked.dtype == dtype
    assert float(size(attacked.double() - x.double(), norm).max()) <= BUDGETS[norm] * (1 + 1e-6)
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_is_needed(norm, net):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("backward")

    x, y = images()
    seen = []

    def model(z):
        seen.append(torch.is_grad_enabled())
        return net(NoBackward.apply(z)).detach()

    Square(eps=BUDGETS[norm], norm=norm, queries=20)(model, x, y)
    assert seen == [False] * len(seen)
    assert seen


def test_forwards_and_leaving(net):
    x, _ = images(40)
    y = net(x).argmax(1)
    net.batches.clear()
    attacked = Square(eps=0.03, queries=50)(net, x, y)
    robust = int((net(attacked).argmax(1) == y).sum())
    assert 0 < robust < 40
    assert net.batches[:2] == [40, 40]  # the start and the clean images
    queries = net.batches[2:-1]  # the last forward is this test's
    assert len(queries) <= 50
    assert sum(queries) < 0.9 * 50 * 40


def test_all_fooled_ends_the_search(net):
    x, _ = images(5)
    y = (net(x).argmax(1) + 1) % 4
    net.batches.clear()
    assert torch.equal(Square(queries=50)(net, x, y), x)  # misclassified from the start: nothing to do
    assert net.batches == [5, 5]


def test_cost_in_passes():
    assert Square(queries=98).passes == 50
    assert Square(queries=99, eot=2).passes == 100
    assert Square(queries=98, restarts=2).passes == 101


@pytest.mark.parametrize("norm", NORMS)
def test_several_queries_in_a_forward_change_nothing(norm, net, monkeypatch):
    net.double()
    x, _ = images(12, dtype=torch.float64)
    y = net(x).argmax(1)
    attack = Square(eps=BUDGETS[norm] / 2, norm=norm, queries=150)
    ahead = attack(net, x, y, indices=torch.arange(12))
    assert max(net.batches) > 12
    net.batches.clear()
    monkeypatch.setattr(square_search, "_MOST_AHEAD", 1)
    torch.testing.assert_close(attack(net, x, y, indices=torch.arange(12)), ahead, rtol=0, atol=1e-9)
    assert max(net.batches) == 12


@pytest.mark.parametrize("norm", NORMS)
def test_leaving_late_changes_nothing(norm, net, monkeypatch):
    x, _ = images(12)
    y = net(x).argmax(1)
    attack = Square(eps=BUDGETS[norm], norm=norm, queries=70)
    at_once = attack(net, x, y, indices=torch.arange(12))
    monkeypatch.setattr(module, "_leave_every", lambda x: 10)
    assert torch.equal(attack(net, x, y, indices=torch.arange(12)), at_once)


def test_two_windows_of_a_batch_differ(net):
    x, y = images(1)
    x, y = x.expand(6, -1, -1, -1).contiguous(), y.expand(6)
    attacked = Square(eps=0.05, queries=3, eot=2)(net, x, y)
    assert len({tuple(each.flatten().tolist()) for each in attacked}) == 6


def test_robust_samples_get_the_point_of_largest_loss(net):
    x, _ = images(12)
    y = net(x).argmax(1)
    levels = []
    for queries in (0, 30, 120):
        attacked = Square(eps=0.01, queries=queries)(net, x, y, indices=torch.arange(12))
        logits = net(attacked).detach()
        levels.append(logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1))
    assert bool((levels[1] <= levels[0]).all())
    assert bool((levels[2] <= levels[1]).all())
    assert float(levels[2].sum()) < float(levels[0].sum())


def test_no_query_returns_the_start(net):
    x, _ = images(6)
    y = net(x).argmax(1)
    attacked = Square(eps=0.01, queries=0)(net, x, y)
    delta = (attacked - x).view(6, 3, 6, 6)
    inside = (attacked > 0) & (attacked < 1)
    torch.testing.assert_close(delta.abs()[inside], torch.full_like(delta, 0.01)[inside])
    # stripes: one sign per column
    assert torch.equal(delta.sign(), delta[:, :, :1].sign().expand_as(delta))


def test_averaging_over_forwards_for_randomised_models(net):
    x, _ = images(6)
    y = net(x).argmax(1)
    net.batches.clear()
    attacked = Square(eps=0.05, queries=10, eot=3)(net, x, y, indices=torch.arange(6))
    assert net.batches == [6] * 33
    # of a model that is not random the mean is the loss; only nobody leaves
    single = Square(eps=0.05, queries=10)(net, x, y, indices=torch.arange(6))
    robust = net(single).argmax(1) == y
    assert 0 < int(robust.sum()) < 6
    torch.testing.assert_close(attacked[robust], single[robust])


def test_averaging_sees_through_noise():
    weight = torch.linspace(-1, 1, 36).view(1, 6, 6)

    def noisy(x):
        return linear(weight)(x) + 2 * torch.randn(len(x), 2)

    x, y = torch.full((8, 1, 6, 6), 0.5), torch.zeros(8, dtype=torch.int64)
    lowered = []
    for eot in (1, 30):
        attacked = Square(eps=0.1, queries=60, eot=eot)(noisy, x, y)
        lowered.append(float((10 - (linear(weight)(attacked)[:, 0] - (x * weight).flatten(1).sum(1))).mean()))
    assert lowered[1] > lowered[0] + 0.2


def test_restarts_keep_what_fools(net):
    x, _ = images(30)
    y = net(x).argmax(1)
    robust = [
        int((net(Square(eps=0.03, queries=10, restarts=restarts)(net, x, y)).argmax(1) == y).sum())
        for restarts in (1, 5)
    ]
    assert robust[1] < robust[0]


@pytest.mark.parametrize("loss", ["margin", "ce", "dlr", "prob-margin"])
def test_losses_and_both_meanings_of_a_target(net, loss):
    x, _ = images(10)
    y = net(x).argmax(1)
    wanted = (y + 1) % 4
    options = {"eps": 0.2, "queries": 60, "loss": loss}
    assert int((net(Square(**options)(net, x, y)).argmax(1) != y).sum()) >= 5
    assert int((net(Square(**options, targeted=True)(net, x, wanted)).argmax(1) == wanted).sum()) >= 3
    assert int((net(Square(**options)(net, x, y, towards=wanted)).argmax(1) != y).sum()) >= 3


def test_a_rescaled_schedule_ends_at_the_smallest_windows():
    assert Square(queries=64)._sizes(32, 32, 32)[-1] == (14, 14)
    assert Square(queries=64, rescale_schedule=True)._sizes(32, 32, 32)[-1] == (1, 1)
    assert len(Square(queries=40)._sizes(32, 32, 32)) == 8


def test_normalised_images_get_the_same_perturbation_as_pixels(net):
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)

    class Inside(nn.Module):
        def forward(self, x):
            return net((x - mean.to(x)) / std.to(x))

    net.double()
    x, _ = images(6, dtype=torch.float64)
    y = Inside()(x).argmax(1)
    for norm, eps in BUDGETS.items():
        options = {"eps": eps / 5, "norm": norm, "queries": 30}
        inside = Square(**options)(Inside(), x, y, indices=torch.arange(6))
        outside = Square(**options, mean=mean.flatten().tolist(), std=std.flatten().tolist())(
            net, (x - mean) / std, y, indices=torch.arange(6)
        )
        torch.testing.assert_close(outside * std + mean, inside, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l0"}, "Expected `norm` to be one of 'linf', 'l2', 'l1' but got 'l0'"),
        ({"queries": -1}, "Expected `queries` to be an integer >= 0 but got -1"),
        ({"eot": 0}, "Expected `eot` to be an integer >= 1 but got 0"),
        ({"p_init": 0}, "Expected `p_init` to be a finite number > 0 but got 0"),
        ({"p_init": 1.5}, r"Expected `p_init` to be in \[0, 1\] but got 1.5"),
        ({"loss": "kl"}, "Expected `loss` to be one of 'margin', 'ce', 'dlr', 'prob-margin' but got 'kl'"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Square(**arguments)
