"""Curvature of a loss against the full Hessian in float64, and nothing left changed."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_robust.sharpness import (
    LossSurface,
    epsilon_sharpness,
    gradient_norm,
    hutchinson_trace,
    lanczos,
    power_iteration,
    stability_ratio,
)

METHODS = ["double-backward", "finite-difference"]


def problem(seed=0, dtype=torch.float64, samples=12):
    """A smooth network at random weights, whose Hessian has both signs."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(samples, 5, dtype=dtype), torch.randint(3, (samples,))
    return net, x, y


def surface_of(net, x, y, **options):
    return LossSurface(lambda: F.cross_entropy(net(x), y), net, **options)


def full_hessian(net, loss):
    """The whole matrix, of the loss as a function of one flat vector."""
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)

    def function(flat):
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return loss({name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)})

    return hessian(function, nn.utils.parameters_to_vector(net.parameters()).detach())


@pytest.fixture
def known():
    net, x, y = problem()
    return net, x, y, full_hessian(net, lambda weights: F.cross_entropy(functional_call(net, weights, (x,)), y))


def quadratic(scales, at=0.0):
    """The loss 0.5 * sum(scales * w**2), with the weights in two tensors of different shapes."""
    scales = torch.as_tensor(scales, dtype=torch.float64)
    weights = [
        torch.full((1, 2), at, dtype=torch.float64, requires_grad=True),
        torch.full((len(scales) - 2,), at, dtype=torch.float64, requires_grad=True),
    ]
    return lambda: 0.5 * (scales * torch.cat([w.flatten() for w in weights]) ** 2).sum(), weights


@pytest.mark.parametrize(("method", "tolerance"), [("double-backward", 1e-12), ("finite-difference", 3e-4)])
def test_product(known, method, tolerance):
    net, x, y, full = known
    surface = surface_of(net, x, y, method=method)
    vectors = torch.randn(3, surface.size, dtype=torch.float64) * torch.tensor([[1.0], [1e-3], [50.0]])
    for vector in vectors:
        error = surface.product(vector) - full @ vector
        assert error.norm() <= tolerance * (full @ vector).norm()
    assert surface.products_used == 3
    assert torch.equal(surface.product(torch.zeros(surface.size, dtype=torch.float64)), vectors[0] * 0)


def test_finite_differences_are_of_second_order(known):
    net, x, y, full = known
    vector = torch.randn(len(full), dtype=torch.float64)
    vector /= vector.norm()
    errors = [
        (surface_of(net, x, y, method="finite-difference", step=step).product(vector) - full @ vector).norm().item()
        for step in (0.2, 0.1)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_lanczos_finds_both_ends(known):
    net, x, y, full = known
    exact = torch.linalg.eigvalsh(full)
    found = lanczos(surface_of(net, x, y), top=3, bottom=2, tolerance=1e-9)
    torch.testing.assert_close(found.values, exact[[-1, -2, -3, 0, 1]], rtol=1e-12, atol=1e-12)
    assert found.converged
    assert found.products < len(full)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert vector.norm() == pytest.approx(1, abs=1e-12)
        actual = (full @ vector - value * vector).norm()
        assert actual <= 1e-9 * exact.abs().max() * 1.001
        assert actual == pytest.approx(residual.item(), abs=1e-12)


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-4])
def test_lanczos_keeps_its_tolerance(known, tolerance):
    net, x, y, full = known
    exact = torch.linalg.eigvalsh(full)
    found = lanczos(surface_of(net, x, y), tolerance=tolerance)
    assert found.converged
    assert (exact - found.values).abs().min() <= tolerance * exact.abs().max()
    assert (full @ found.vectors[0] - found.values * found.vectors[0]).norm() <= tolerance * exact.abs().max() * 1.001


def test_all_eigenvalues(known):
    net, x, y, full = known
    found = lanczos(surface_of(net, x, y), top=len(full), tolerance=1e-12)
    torch.testing.assert_close(found.values.flip(0), torch.linalg.eigvalsh(full), rtol=0, atol=1e-12)
    assert found.products == len(full)


SCALES = [-5.0, 3.0, 2.0, 0.5, -1.0, 0.0]


def test_the_most_negative_eigenvalue_does_not_hide_the_largest():
    closure, weights = quadratic(SCALES)
    by_magnitude = power_iteration(LossSurface(closure, weights), top=3, tolerance=1e-10, max_products=1000)
    torch.testing.assert_close(by_magnitude.values, torch.tensor([-5.0, 3.0, 2.0], dtype=torch.float64))
    assert by_magnitude.converged
    found = lanczos(LossSurface(closure, weights), tolerance=1e-8)
    assert found.values.tolist() == pytest.approx([3.0])
    assert lanczos(LossSurface(closure, weights), top=0, bottom=1).values.tolist() == pytest.approx([-5.0])


def test_power_iteration(known):
    net, x, y, full = known
    exact = torch.linalg.eigvalsh(full)
    exact = exact[exact.abs().argsort(descending=True)]
    surface = surface_of(net, x, y)
    found = power_iteration(surface, top=3, tolerance=1e-13, max_products=10_000)
    torch.testing.assert_close(found.values, exact[:3], rtol=1e-6, atol=0)
    assert found.converged
    assert found.products == surface.products_used
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-7, rtol=0)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert (full @ vector - value * vector).norm() == pytest.approx(residual.item(), abs=1e-12)
    coarse = power_iteration(surface_of(net, x, y))
    assert coarse.products < found.products
    assert coarse.values.item() == pytest.approx(exact[0].item(), rel=0.05)


def test_a_budget_that_is_too_small(known):
    net, x, y, _ = known
    for search, products in ((lanczos, 3), (power_iteration, 3)):
        surface = surface_of(net, x, y)
        found = search(surface, tolerance=1e-9, max_products=3)
        assert not found.converged
        assert found.products == surface.products_used == products
    assert power_iteration(surface_of(net, x, y), top=2, tolerance=1e-9, max_products=3).products == 6
    trace = hutchinson_trace(surface_of(net, x, y), max_products=3)
    assert (trace.products, trace.converged) == (3, False)


def test_a_hessian_with_few_different_eigenvalues():
    closure, weights = quadratic([2.0] * 5)
    found = lanczos(LossSurface(closure, weights))
    assert (found.values.tolist(), found.products, found.converged) == (pytest.approx([2.0]), 1, True)
    # the vectors of one start span one eigenvector only; others are looked for beside it
    assert lanczos(LossSurface(closure, weights), top=2, bottom=1).values.tolist() == pytest.approx([2.0, 2.0, 2.0])


def test_no_curvature():
    weight = torch.ones(4, requires_grad=True)
    surface = LossSurface(lambda: weight.sum(), [weight])
    for search in (lanczos, power_iteration):
        found = search(surface)
        assert (found.values.tolist(), found.products <= 2, found.converged) == ([0.0], True, True)
    trace = hutchinson_trace(surface)
    assert (trace.value, trace.standard_error, trace.converged) == (0.0, 0.0, True)
    assert gradient_norm(surface) == 2.0


def test_trace(known):
    net, x, y, full = known
    exact = full.trace().item()
    found = hutchinson_trace(surface_of(net, x, y), tolerance=0.0, max_products=400)
    assert (found.products, found.converged) == (400, False)
    assert abs(found.value - exact) < 4 * found.standard_error
    # the variance of the estimator is twice the sum of the squared entries beside the diagonal
    deviation = (2 * (full.square().sum() - full.diagonal().square().sum())).sqrt().item()
    assert found.standard_error == pytest.approx(deviation / 20, rel=0.15)
    stopped = hutchinson_trace(surface_of(net, x, y), tolerance=0.2, max_products=400)
    assert stopped.converged
    assert stopped.standard_error <= 0.2 * abs(stopped.value)
    assert 8 <= stopped.products < 400
    single = hutchinson_trace(surface_of(net, x, y), max_products=1)
    assert np.isnan(single.standard_error)


def test_epsilon_sharpness():
    """On a quadratic, the maximum on the sphere solves (mu - H) e = g with |e| = radius."""
    scales = torch.tensor([4.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    closure, weights = quadratic(scales, at=0.3)
    radius = 0.2
    low, high = scales.max().item() + 1e-9, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        offset = scales * 0.3 / (middle - scales)
        low, high = (middle, high) if offset.norm() > radius else (low, middle)
    value = (0.5 * scales * (0.3 + offset) ** 2).sum().item()
    loss = closure().item()
    results = [epsilon_sharpness(LossSurface(closure, weights), radius=radius, steps=steps) for steps in (1, 3, 100)]
    assert [result.passes for result in results] == [2, 4, 101]
    assert results[0].absolute < results[1].absolute < results[2].absolute
    assert results[2].absolute == pytest.approx(value - loss, rel=1e-8)
    assert results[2].loss == pytest.approx(loss)
    assert results[2].relative == pytest.approx(100 * (value - loss) / (1 + loss), rel=1e-8)
    # one step is SAM's
    gradient = scales * 0.3
    ascended = (0.5 * scales * (0.3 + radius * gradient / gradient.norm()) ** 2).sum().item()
    assert results[0].absolute == pytest.approx(ascended - loss)
    small = epsilon_sharpness(LossSurface(closure, weights), radius=radius, steps=1, step_size=0.1)
    assert small.absolute < results[0].absolute


def test_epsilon_sharpness_at_a_stationary_point():
    closure, weights = quadratic(SCALES)
    found = epsilon_sharpness(LossSurface(closure, weights))
    assert (found.absolute, found.passes) == (0.0, 1)


def test_gradient_norm(known):
    net, x, y, _ = known
    F.cross_entropy(net(x), y).backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    assert gradient_norm(surface_of(net, x, y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ascent", [0.0, 0.5])
@pytest.mark.parametrize(("factor", "grows"), [(0.98, False), (1.02, True)])
def test_descent_is_stable_up_to_a_ratio_of_one(ascent, factor, grows):
    eigenvalue = 3.0
    lr = factor / stability_ratio(eigenvalue, 1.0, ascent=ascent)
    w = 1.0
    for _ in range(200):
        w -= lr * eigenvalue * (w + ascent * eigenvalue * w)
    assert (abs(w) > 1) == grows


# counting


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.net(x)


def test_forwards_of_a_closure():
    net, x, y = problem()
    net = Counting(net)
    assert lanczos(surface_of(net, x, y), tolerance=1e-9, max_products=5).products == 5
    assert net.calls == [12]
    net.calls.clear()
    lanczos(surface_of(net, x, y, method="finite-difference"), tolerance=1e-9, max_products=5)
    assert net.calls == [12] * 10
    net.calls.clear()
    assert epsilon_sharpness(surface_of(net, x, y), steps=3).passes == len(net.calls) == 4


@pytest.mark.parametrize("method", METHODS)
def test_several_closures_add_up(method):
    net, x, y = problem()
    net = Counting(net)
    parts = [
        lambda a=a, b=b: F.cross_entropy(net(a), b, reduction="sum") / len(x)
        for a, b in zip(x.split(5), y.split(5), strict=True)
    ]
    whole, split = surface_of(net, x, y, method=method), LossSurface(parts, net, method=method)
    for compute in (
        lambda s: lanczos(s, top=2, bottom=1).values,
        lambda s: torch.tensor(hutchinson_trace(s, max_products=4).value),
        lambda s: torch.tensor(epsilon_sharpness(s).absolute),
        lambda s: s.value_and_gradient()[1],
        lambda s: s.value(),
    ):
        torch.testing.assert_close(compute(split), compute(whole), rtol=1e-9, atol=1e-12)
    net.calls.clear()
    split.product(torch.ones(split.size, dtype=torch.float64))
    assert net.calls == [5, 5, 2] * {"double-backward": 1, "finite-difference": 2}[method]


@pytest.mark.parametrize("method", METHODS)
def test_sum_over_processes(method):
    """As if another process had the same samples."""
    net, x, y = problem()
    halves = LossSurface(
        lambda: F.cross_entropy(net(x), y) / 2, net, method=method, reduce=lambda tensor: 2 * tensor.clone()
    )
    for compute in (
        lambda s: lanczos(s, bottom=1).values,
        lambda s: power_iteration(s).values,
        lambda s: torch.tensor(hutchinson_trace(s, max_products=4).value),
        lambda s: torch.tensor(epsilon_sharpness(s).absolute),
    ):
        torch.testing.assert_close(compute(halves), compute(surface_of(net, x, y, method=method)), rtol=1e-9, atol=0)
    none = LossSurface([], net, method=method, reduce=lambda tensor: tensor)
    assert none.value_and_gradient()[1].norm() == none.product(torch.ones(none.size, dtype=torch.float64)).norm() == 0


# deterministic, and in the precision of the weights


@pytest.mark.parametrize("search", [lanczos, power_iteration])
def test_deterministic(search):
    net, x, y = problem()
    first = search(surface_of(net, x, y))
    torch.randn(7)
    again, other = search(surface_of(net, x, y)), search(surface_of(net, x, y), seed=1)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.values, other.values)
    assert hutchinson_trace(surface_of(net, x, y)) == hutchinson_trace(surface_of(net, x, y))


@pytest.mark.parametrize(("method", "tolerance"), [("double-backward", 1e-5), ("finite-difference", 1e-3)])
def test_float32(known, method, tolerance):
    net, x, y, full = known
    exact = torch.linalg.eigvalsh(full)
    found = lanczos(surface_of(net.float(), x.float(), y, method=method), bottom=1, tolerance=1e-4)
    torch.testing.assert_close(found.values, exact[[-1, 0]], rtol=tolerance, atol=tolerance)
    assert found.vectors.dtype == torch.float32


# untouched


def noisy():
    """A network in training mode with everything that a forward pass can disturb."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
    net[1].momentum = 0.5
    net[4].bias.register_hook(lambda gradient: gradient * 100)
    net[4].weight.register_hook(lambda gradient: pytest.fail("a hook ran"))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    x, y = torch.randn(12, 5), torch.randint(3, (12,))

    def closure():
        random.random()
        np.random.rand()
        return F.cross_entropy(net(x), y)

    return net, closure


COMPUTATIONS = {
    "lanczos": lambda s: lanczos(s, max_products=4),
    "power_iteration": lambda s: power_iteration(s, max_products=4),
    "hutchinson_trace": lambda s: hutchinson_trace(s, max_products=4),
    "epsilon_sharpness": epsilon_sharpness,
    "gradient_norm": gradient_norm,
}


def everything(net):
    values = {f"value {name}": value.clone() for name, value in net.state_dict().items()}
    values |= {f"gradient {name}": p.grad.clone() for name, p in net.named_parameters()}
    values |= {"torch": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
    values["numpy"] = torch.from_numpy(np.random.get_state()[1].astype("int64"))
    return values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COMPUTATIONS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(method, name, fails):
    net, closure = noisy()
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        loss = closure()
        return loss * float("nan") if calls == 2 or (calls == 1 and name in ("gradient_norm",)) else loss

    before = everything(net)
    identities = [id(tensor) for tensor in (*net.parameters(), *net.buffers())]
    surface = LossSurface(failing if fails else closure, net, method=method)
    # double backward evaluates once, and would not see the second loss
    if fails and not (method == "double-backward" and name in ("lanczos", "power_iteration", "hutchinson_trace")):
        with pytest.raises(ValueError, match="so it has no curvature"):
            COMPUTATIONS[name](surface)
    else:
        COMPUTATIONS[name](surface)
    after = everything(net)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert identities == [id(tensor) for tensor in (*net.parameters(), *net.buffers())]
    assert all(child.training for child in net.modules())
    assert len(net[4].bias._backward_hooks) == 1


def test_every_evaluation_draws_the_same_masks():
    net, closure = noisy()
    surface, chunks = LossSurface(closure, net), LossSurface([closure, closure], net)
    first, _ = surface.value_and_gradient()
    torch.rand(3)
    assert torch.equal(first, surface.value())
    columns = torch.eye(surface.size)
    with surface.products() as product:
        matrix = torch.stack([product(column) for column in columns])
    torch.testing.assert_close(matrix, matrix.T, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(chunks.product(columns[0]), 2 * matrix[0])


def test_parts_of_a_model():
    """Frozen weights are left out; unused ones have no curvature; tied ones count once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)).double()
    net[2].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    surface = LossSurface(lambda: F.cross_entropy(net[:3](x), y), net)
    assert surface.size == 9 + 3 + 6 + 2
    product = surface.product(torch.ones(surface.size, dtype=torch.float64))
    assert product[:12].abs().min() > 0
    assert product[12:].abs().max() == 0
    optimizer = torch.optim.SGD([net[2].bias], lr=0.1)
    assert LossSurface(lambda: F.cross_entropy(net[:3](x), y), optimizer).size == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_whatever_surrounds_the_call(known, method, around):
    net, x, y, _ = known
    net, x = net.float(), x.float()
    expected = [compute(surface_of(net, x, y, method=method)) for compute in COMPUTATIONS.values()]
    with around():
        found = [compute(surface_of(net, x, y, method=method)) for compute in COMPUTATIONS.values()]
    assert torch.equal(found[0].values, expected[0].values)
    assert torch.equal(found[1].values, expected[1].values)
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_modules_run_eagerly(method):
    torch._dynamo.reset()  # what other tests have compiled counts against the limit of recompilations
    net, x, y = problem(dtype=torch.float32)
    expected = lanczos(surface_of(net, x, y, method=method))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend)
    F.cross_entropy(compiled(x), y).backward()
    count = len(graphs)
    found = lanczos(surface_of(compiled, x, y, method=method))
    assert torch.equal(found.values, expected.values)
    compiled(x)
    assert len(graphs) == count == 1


class Attention(nn.Module):
    def __init__(self, *backends):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head, self.backends = nn.Linear(8, 24), nn.Linear(8, 3), list(backends)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        if self.backends:
            with sdpa_kernel(self.backends):
                mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(mixed.mean((1, 2)))


def test_attention():
    x, y = torch.randn(5, 6, 8), torch.tensor([0, 1, 2, 0, 1])
    expected = lanczos(surface_of(Attention(SDPBackend.MATH), x, y)).values
    torch.testing.assert_close(lanczos(surface_of(Attention(), x, y)).values, expected)
    fused = Attention(SDPBackend.FLASH_ATTENTION)
    with pytest.raises(RuntimeError, match=r'without a second derivative .* use method="finite-difference"'):
        lanczos(surface_of(fused, x, y))
    found = lanczos(surface_of(fused, x, y, method="finite-difference")).values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return 3 * ctx.saved_tensors[0] ** 2 * upstream


def test_a_function_that_refuses_a_second_derivative():
    weight = torch.ones(3, requires_grad=True)

    def closure():
        return OnceOnly.apply(weight).sum() ** 2

    with pytest.raises(RuntimeError, match='use method="finite-difference"'):
        LossSurface(closure, [weight]).product(torch.ones(3))
    # 2 f' f'T + 2 f f'' on the diagonal, with f = 3, f' = 3 and f'' = 6
    product = LossSurface(closure, [weight], method="finite-difference").product(torch.ones(3))
    torch.testing.assert_close(product, torch.full((3,), 90.0), rtol=1e-3, atol=0)


def test_other_errors_of_a_model_stay_what_they_are():
    weight = torch.ones(3, requires_grad=True)
    other = torch.ones(2)
    with pytest.raises(RuntimeError, match="must match the size"):
        LossSurface(lambda: (weight * other).sum(), [weight]).product(torch.ones(3))


# refusals


def one():
    return torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "No trainable parameter was given"),
        ([torch.ones(2)], "No trainable parameter was given"),
        (
            [one().to(torch.bfloat16).detach().requires_grad_()],
            r"all in float64, but got .*bfloat16.*model\)\.float\(\)",
        ),
        ([one(), one().double().detach().requires_grad_()], r"got \['torch.float32', 'torch.float64'\]"),
        ([one(), torch.ones(2, device="meta", requires_grad=True)], r"on one device but got \['cpu', 'meta'\]"),
    ],
)
def test_refused_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        LossSurface(lambda: sum(w.sum() for w in weights), weights)


@pytest.mark.parametrize("method", METHODS)
def test_refused_losses(method):
    weight, other = one(), one()
    vector = torch.ones(3)
    for closure, message in [
        (lambda: weight * 2, r"Expected the loss to be a scalar but got shape \[3\]"),
        (lambda: other.sum(), "depends on none of the given parameters"),
        (lambda: weight.detach().sum(), "depends on none of the given parameters"),
        (lambda: weight.sum() * float("nan"), "The loss at the .*weights is nan, so it has no curvature"),
    ]:
        with pytest.raises(ValueError, match=message):
            LossSurface(closure, [weight], method=method).product(vector)
    surface = LossSurface(lambda: (weight**2).sum(), [weight], method=method)
    with pytest.raises(ValueError, match=r"Expected a flat vector of 3 entries but got shape \[2\]"):
        surface.product(torch.ones(2))
    with pytest.raises(ValueError, match="No closure was given"):
        LossSurface([], [weight])
    # an exception in the middle of a difference leaves the weights where they were
    assert torch.equal(weight, torch.ones(3))


def test_a_ball_that_reaches_too_far():
    weight = torch.tensor([1.0], requires_grad=True)
    surface = LossSurface(lambda: -torch.log(weight).sum(), [weight])
    with pytest.raises(ValueError, match=r"The loss at the moved weights is nan.* use a smaller radius or step"):
        epsilon_sharpness(surface, radius=2.0)
    assert weight.item() == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: LossSurface(one, [one()], method="exact"), "Expected `method` to be one of 'double-backward'"),
        (lambda s: LossSurface(one, [one()], step=0.0), "Expected `step` to be a finite number > 0"),
        (lambda s: lanczos(s, top=-1), "Expected `top` to be an integer >= 0"),
        (lambda s: lanczos(s, bottom=-1), "Expected `bottom` to be an integer >= 0"),
        (lambda s: lanczos(s, top=0), "from 1 to the 3 weights but got 0"),
        (lambda s: lanczos(s, top=2, bottom=2), "from 1 to the 3 weights but got 4"),
        (lambda s: lanczos(s, top=3, max_products=2), "Expected `max_products` to be >= `top` \\+ `bottom` = 3"),
        (lambda s: lanczos(s, max_products=0), "Expected `max_products` to be an integer >= 1"),
        (lambda s: lanczos(s, tolerance=0.0), "Expected `tolerance` to be a finite number > 0"),
        (lambda s: power_iteration(s, top=0), "Expected `top` to be an integer >= 1"),
        (lambda s: power_iteration(s, top=4), "Expected `top` to be at most the 3 weights but got 4"),
        (lambda s: power_iteration(s, tolerance=-1.0), "Expected `tolerance`"),
        (lambda s: power_iteration(s, max_products=0), "Expected `max_products`"),
        (lambda s: hutchinson_trace(s, tolerance=-1.0), "Expected `tolerance` to be a finite number >= 0"),
        (lambda s: hutchinson_trace(s, max_products=0), "Expected `max_products`"),
        (lambda s: epsilon_sharpness(s, radius=0.0), "Expected `radius`"),
        (lambda s: epsilon_sharpness(s, steps=0), "Expected `steps`"),
        (lambda s: epsilon_sharpness(s, step_size=0.0), "Expected `step_size`"),
        (lambda s: stability_ratio(1.0, -0.1), "Expected `lr`"),
        (lambda s: stability_ratio(1.0, 0.1, ascent=-1.0), "Expected `ascent`"),
    ],
)
def test_refused_arguments(call, message):
    weight = one()
    with pytest.raises(ValueError, match=message):
        call(LossSurface(lambda: (weight**2).sum(), [weight]))


def test_a_copy_is_enough_for_half_precision():
    net, x, y = problem(dtype=torch.bfloat16)
    copied = copy.deepcopy(net).float()
    assert lanczos(surface_of(copied, x.float(), y)).converged
