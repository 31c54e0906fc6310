import math

import pytest
import torch
from torch import nn

from lightning_robust.optimizers import ExactOptimizer, SubsetNorm, subset_layout, subset_second_moment


def gradients(step, shape=(6, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def train(optimizer, weight, steps, start=0):
    for step in range(start, start + steps):
        weight.grad = gradients(step, weight.shape, weight.dtype)
        optimizer.step()
    return weight.detach().clone()


def weight(shape=(6, 8), dtype=torch.float64):
    return nn.Parameter(torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
def test_subsets_of_one_entry_are_adam(betas):
    ours, theirs = weight(), weight()
    train(SubsetNorm([ours], lr=0.1, betas=betas, eps=0.0, subset_size=1), ours, 5)
    train(torch.optim.Adam([theirs], lr=0.1, betas=betas, eps=0.0), theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_sums_are_adagrad(bias_correction):
    ours, theirs = weight(), weight()
    options = {"betas": (0.0, 1.0), "subset_size": 1, "eps": 1e-3, "bias_correction": bias_correction}
    train(SubsetNorm([ours], lr=0.1, **options), ours, 5)
    train(torch.optim.Adagrad([theirs], lr=0.1, eps=1e-3), theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "size", "groups"),
    [
        ((6, 8), "heuristics", lambda i, n: i % 8),  # the smaller dimension is summed: one value per column
        ((8, 6), "heuristics", lambda i, n: i // 6),
        ((4, 4), "heuristics", lambda i, n: i // 4),
        ((5,), "heuristics", lambda i, n: i),
        ((), "heuristics", lambda i, n: i),
        ((2, 3, 2, 2), "heuristics", lambda i, n: i % 12),
        ((6, 8), 4, lambda i, n: i // 4),
        ((6, 8), 7, lambda i, n: i // 6),  # 6 is the nearest smaller divisor of 48
        ((6, 8), 1000, lambda i, n: 0),
        ((6, 8), -1, lambda i, n: i // 6),  # sqrt(48) = 6.9
        ((6, 8), -2, lambda i, n: i // 3),
        ((5,), -3, lambda i, n: i),
    ],
)
@pytest.mark.parametrize("second", [0.9, 1.0])
def test_equals_the_naive_loop(shape, size, groups, second):
    parameter = weight(shape)
    optimizer = SubsetNorm([parameter], lr=0.1, betas=(0.8, second), eps=1e-3, weight_decay=0.2, subset_size=size)
    w, n = parameter.detach().flatten().clone(), parameter.numel()
    m, v = torch.zeros_like(w), {}
    for step in range(1, 5):
        g = gradients(step - 1, shape).flatten()
        squares = {}
        for i in range(n):
            squares[groups(i, n)] = squares.get(groups(i, n), 0) + float(g[i]) ** 2
        factor = 1 - second if second < 1 else 1
        v = {key: (second if second < 1 else 1) * v.get(key, 0) + factor * value for key, value in squares.items()}
        m = 0.8 * m + 0.2 * g
        size_of_step = 0.1 / (1 - 0.8**step) * (math.sqrt(1 - second**step) if second < 1 else 1)
        for i in range(n):
            w[i] -= size_of_step * m[i] / (math.sqrt(v[groups(i, n)]) + 1e-3)
        w *= 1 - 0.1 * 0.2
    train(optimizer, parameter, 4)
    torch.testing.assert_close(parameter.detach().flatten(), w, rtol=1e-10, atol=1e-12)
    expected = torch.tensor([math.sqrt(v[key]) + 1e-3 for key in sorted(v)], dtype=torch.float64)
    torch.testing.assert_close(optimizer.denominator(parameter).flatten(), expected)
    assert optimizer.state[parameter]["exp_avg_sq"].numel() == len(v)


def test_memory_of_momentum_is_spared_when_there_is_none():
    parameter = weight()
    optimizer = SubsetNorm([parameter], betas=(0.0, 0.999))
    train(optimizer, parameter, 1)
    assert set(optimizer.state[parameter]) == {"step", "exp_avg_sq"}


def test_channels_last_and_half_precision():
    values = torch.randn(4, 3, 2, 2)
    plain, strided = nn.Parameter(values.clone()), nn.Parameter(values.to(memory_format=torch.channels_last))
    for parameter in (plain, strided):
        train(SubsetNorm([parameter], lr=0.1, subset_size=6), parameter, 3)
    torch.testing.assert_close(plain, strided)
    half = weight(dtype=torch.bfloat16)
    optimizer = SubsetNorm([half], lr=0.1)
    train(optimizer, half, 2)
    assert optimizer.denominator(half).dtype == torch.float32
    assert half.isfinite().all()
    assert not torch.equal(half, weight(dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype, tmp_path):
    whole = weight(dtype=dtype)
    one = SubsetNorm([whole], lr=0.1)
    middle = train(one, whole, 3)
    torch.save(one.state_dict(), tmp_path / "saved.pt")
    resumed = nn.Parameter(middle)
    two = SubsetNorm([resumed], lr=0.1)
    two.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert torch.equal(train(one, whole, 3, 3), train(two, resumed, 3, 3))


def test_loading_keeps_the_callers_state():
    parameter = weight()
    one = SubsetNorm([parameter])
    train(one, parameter, 1)
    saved = one.state_dict()
    before = saved["state"][0]["exp_avg_sq"].clone()
    two = SubsetNorm([parameter])
    two.load_state_dict(saved)
    train(two, parameter, 2)
    assert torch.equal(saved["state"][0]["exp_avg_sq"], before)


def test_idle_parameters_stay_and_an_unstepped_one_has_no_denominator():
    idle, busy = weight(), weight()
    optimizer = SubsetNorm([idle, busy])
    train(optimizer, busy, 1)
    assert torch.equal(idle, weight())
    with pytest.raises(KeyError, match="no step yet"):
        optimizer.denominator(idle)


def test_the_function_and_the_layout():
    moment = subset_second_moment(torch.ones(6, 8, dtype=torch.bfloat16), -1)
    assert moment.dtype == torch.float32
    assert torch.equal(moment, torch.full((8, 1), 6.0))
    assert subset_layout((0, 3), "heuristics") == ((0, 1), 1)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SubsetNorm does not support sparse gradients"):
        SubsetNorm(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Expected `lr`"),
        ({"eps": -1.0}, "Expected `eps`"),
        ({"weight_decay": -1.0}, "Expected `weight_decay`"),
        ({"betas": (1.0, 0.9)}, r"Expected `betas` to be in \[0, 1\) and \[0, 1\]"),
        ({"betas": (0.9, 1.1)}, "Expected `betas`"),
        ({"subset_size": 0}, "Expected `subset_size` to be 'heuristics' or an integer other than 0 but got 0"),
        ({"subset_size": "rows"}, "Expected `subset_size`"),
        ({"subset_size": 2.5}, "Expected `subset_size`"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SubsetNorm([weight()], **options)
    with pytest.raises(ValueError, match=message):
        SubsetNorm([{"params": [weight()], **options}])


def test_the_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        ExactOptimizer([weight()], {}).step()
