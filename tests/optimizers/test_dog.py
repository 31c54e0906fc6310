import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_robust.optimizers import DoG, PolynomialAverage, distance_over_gradients


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=dtype))]


def gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in [(4, 3), (5,)]]


def take(optimizer, parameters, step, dtype=torch.float64):
    for parameter, gradient in zip(parameters, gradients(step, dtype), strict=True):
        parameter.grad = gradient
    optimizer.step()


def naive(blocks, steps, *, reps_rel, lr, weight_decay, eps):
    """Blocks are lists of indices that share a step size; returns the weights."""
    w = [parameter.detach().clone() for parameter in problem()]
    start = [each.clone() for each in w]
    distance, squares = {}, {}
    for step in range(steps):
        g = [each + weight_decay * weight for each, weight in zip(gradients(step), w, strict=True)]
        for number, block in enumerate(blocks):
            moved = sum(((w[i] - start[i]) ** 2).sum() for i in block).sqrt()
            if number not in distance:
                distance[number] = reps_rel * (1 + sum((w[i] ** 2).sum() for i in block).sqrt())
                squares[number] = eps
            distance[number] = max(distance[number], moved)
            squares[number] = squares[number] + sum((g[i] ** 2).sum() for i in block)
            eta = lr * distance[number] / squares[number] ** 0.5
            for i in block:
                w[i] = w[i] - eta * g[i]
    return w


@pytest.mark.parametrize("options", [{"reps_rel": 0.1}, {"reps_rel": 0.01, "lr": 2.0, "weight_decay": 0.3, "eps": 0.5}])
@pytest.mark.parametrize("layer_wise", [False, True])
def test_equals_the_naive_loop(layer_wise, options):
    parameters = problem()
    optimizer = DoG(parameters, layer_wise=layer_wise, **options)
    for step in range(6):
        take(optimizer, parameters, step)
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients(step), strict=True))  # no decay in them
    blocks = [[0], [1]] if layer_wise else [[0, 1]]
    expected = naive(blocks, 6, **{"lr": 1.0, "weight_decay": 0.0, "eps": 1e-8, **options})
    torch.testing.assert_close([parameter.data for parameter in parameters], expected, rtol=1e-12, atol=1e-13)


def test_groups_have_step_sizes_of_their_own():
    parameters = problem()
    optimizer = DoG([{"params": [parameters[0]], "reps_rel": 0.1}, {"params": [parameters[1]]}], reps_rel=0.2)
    take(optimizer, parameters, 0)
    first, second = optimizer.step_sizes()
    size = [float(g.norm()) for g in gradients(0)]
    start = [float(p.detach().norm()) for p in problem()]
    assert float(first) == pytest.approx(0.1 * (1 + start[0]) / size[0])
    assert float(second) == pytest.approx(0.2 * (1 + start[1]) / size[1])
    assert float(distance_over_gradients(torch.tensor(2.0), torch.tensor(16.0), 3.0)) == 1.5


@pytest.mark.parametrize("layer_wise", [False, True])
def test_parameters_without_gradient_do_not_count(layer_wise):
    parameters = problem()
    idle, late = nn.Parameter(torch.full((3,), 50.0).double()), nn.Parameter(torch.full((2,), 2.0).double())
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    problem_copy = problem()
    alone = DoG(problem_copy, layer_wise=layer_wise, reps_rel=0.1)
    crowd = DoG([*parameters, idle, frozen, late], layer_wise=layer_wise, reps_rel=0.1)
    for step in range(3):
        take(alone, problem_copy, step)
        take(crowd, parameters, step)
    assert all(torch.equal(a, b) for a, b in zip(problem_copy, parameters, strict=True))
    assert len(crowd.step_sizes()) == 2
    late.grad = torch.ones_like(late)
    take(crowd, parameters, 3)
    assert len(crowd.step_sizes()) == 3
    assert bool((late < 2).all())
    assert torch.equal(idle.data, torch.full((3,), 50.0).double())
    if layer_wise:
        assert float(crowd.step_sizes()[2]) == pytest.approx(0.1 * (1 + 8**0.5) / 2**0.5)


def test_a_step_without_any_gradient_is_nothing():
    parameters = problem()
    optimizer = DoG(parameters)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, problem(), strict=True))
    assert optimizer.step_sizes() == []


def test_zero_gradients_are_no_division_by_zero():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = DoG([weight])
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(weight.data, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_wise", [False, True])
def test_resume_is_exact(layer_wise, dtype, tmp_path):
    whole = problem(dtype)
    one = DoG(whole, reps_rel=0.1, layer_wise=layer_wise)
    for step in range(3):
        take(one, whole, step, dtype)
    torch.save({"weights": [p.data for p in whole], "optimizer": one.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    untouched = copy.deepcopy(saved["optimizer"])
    resumed = [nn.Parameter(value.clone()) for value in saved["weights"]]
    two = DoG(resumed, reps_rel=0.1, layer_wise=layer_wise)
    two.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        take(one, whole, step, dtype)
        take(two, resumed, step, dtype)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.step_sizes(), two.step_sizes(), strict=True))
    assert one.step_sizes()[0].dtype == torch.float32
    torch.testing.assert_close(saved["optimizer"], untouched, rtol=0, atol=0)


def test_the_closure_runs_once_with_gradients():
    weight = nn.Parameter(torch.ones(2))
    optimizer = DoG([weight])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).detach() == 2.0
    assert calls == [True]


def test_sparse_and_complex_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="DoG does not support sparse gradients"):
        DoG(embedding.parameters()).step()
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.abs().sum().backward()
    with pytest.raises(RuntimeError, match=r"complex gradients.*another optimizer"):
        DoG([wave]).step()


@pytest.mark.parametrize("name", ["reps_rel", "lr", "weight_decay", "eps"])
def test_refusals(name):
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        DoG(problem(), **{name: -1.0})


@pytest.mark.parametrize("gamma", [0.0, 3.0, 8.0])
def test_average_is_the_polynomial_one(gamma):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    averaged = AveragedModel(net, avg_fn=PolynomialAverage(gamma=gamma), use_buffers=True)
    seen = []
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
            net[1].num_batches_tracked.fill_(step)
        seen.append(net[0].weight.detach().clone())
        averaged.update_parameters(net)
    # the weight of the iterate t is that of its own average times what the later ones leave of it
    shares = [(1 + gamma) / (t + gamma) for t in range(1, 7)]
    expected = torch.zeros_like(seen[0])
    for share, value in zip(shares, seen, strict=True):
        expected = (1 - share) * expected + share * value
    torch.testing.assert_close(averaged.module[0].weight.data, expected)
    if gamma == 0:
        torch.testing.assert_close(averaged.module[0].weight.data, torch.stack(seen).mean(0))
    assert averaged.module[1].num_batches_tracked == 6


def test_average_refuses_a_negative_gamma():
    with pytest.raises(ValueError, match="Expected `gamma`"):
        PolynomialAverage(gamma=-1)
    assert repr(PolynomialAverage()) == "PolynomialAverage(gamma=8.0)"
