"""Orthogonal gradients against the formula, and in a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.sharpness import (
    ParameterSelection,
    attach_orthogonal_gradients,
    orthogonal_gradients,
    orthogonalize,
)


def formula(w, g):
    w, g = w.flatten().double(), g.flatten().double()
    rest = g - (w @ g) / (w @ w + 1e-30) * w
    return rest * g.norm() / (rest.norm() + 1e-30)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (2, 3, 2, 2)]
    pairs = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2)]
    return pairs[0], pairs[1]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_equals_the_formula(dtype, tolerance):
    weights, gradients = tensors(dtype)
    before = [gradient.clone() for gradient in gradients]
    projected = orthogonal_gradients(weights, gradients)
    for w, g, ours in zip(weights, gradients, projected, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == g.shape
        torch.testing.assert_close(ours.flatten().double(), formula(w, g), rtol=tolerance, atol=tolerance)
        assert abs(float(torch.dot(ours.flatten().double(), w.flatten().double()))) < 30 * tolerance
        assert float(ours.double().norm()) == pytest.approx(float(g.double().norm()), rel=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


def test_mixed_types_and_layouts():
    w, g = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    wide = torch.randn(3, dtype=torch.float64)
    first, second = orthogonal_gradients([w, wide], [g, wide.flip(0)])
    torch.testing.assert_close(first.flatten().double(), formula(w, g.contiguous()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, formula(wide, wide.flip(0)), rtol=1e-5, atol=1e-6)


def test_zero_weights_and_zero_gradients_change_nothing():
    g = torch.tensor([1.0, -2.0])
    projected = orthogonal_gradients(
        [torch.zeros(2), torch.ones(2), torch.zeros(0)], [g, torch.zeros(2), torch.zeros(0)]
    )
    torch.testing.assert_close(projected[0], g)
    assert torch.equal(projected[1], torch.zeros(2))
    assert projected[2].numel() == 0
    assert orthogonal_gradients([], []) == []


def test_rounding_errors_are_not_blown_up():
    w = torch.randn(1000)
    (projected,) = orthogonal_gradients([w], [0.3 * w])
    assert float(projected.norm()) < 1e-4 * float(w.norm())  # the published rule returns noise of full length
    assert float(formula(w.float(), 0.3 * w).norm()) > 0


def test_single_entries_keep_their_gradient():
    scale, shift = torch.tensor(2.0), torch.tensor([3.0])
    gradients = [torch.tensor(0.5), torch.tensor([-1.0])]
    assert orthogonal_gradients([scale, shift], gradients) == gradients


def test_large_and_infinite_gradients():
    w, g = torch.randn(8), torch.randn(8)
    (scaled,) = orthogonal_gradients([w], [g * 2.0**24])  # a loss scale does not matter
    torch.testing.assert_close(scaled / 2.0**24, orthogonal_gradients([w], [g])[0])
    g[3] = float("inf")
    assert not orthogonal_gradients([w], [g])[0].isfinite().all()


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))
    x, y = torch.randn(10, 6), torch.randint(4, (10,))
    return net, lambda: F.cross_entropy(net(x), y)


def test_attached_to_an_optimizer_it_projects_every_step():
    net, closure = problem()
    reference = copy.deepcopy(net)
    optimizer, other = (torch.optim.AdamW(each.parameters(), lr=0.01) for each in (net, reference))
    handle = attach_orthogonal_gradients(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        closure().backward()
        for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
            theirs.grad = orthogonal_gradients([theirs.detach()], [ours.grad])[0]
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))
    handle.remove()
    gradient = torch.randn(8, 6)
    net[0].weight.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(net[0].weight.grad, gradient)


def test_with_a_gradient_scaler():
    results = []
    for enabled in (False, True):
        net, closure = problem()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        attach_orthogonal_gradients(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        scaler.scale(closure()).backward()
        scaler.step(optimizer)
        results.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_would_come_too_late(keyword):
    net, closure = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach_orthogonal_gradients(optimizer)
    with pytest.raises(
        RuntimeError, match=r"optimizer.step\(closure\).*nothing would be projected.*OrthogonalGradient"
    ):
        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    optimizer.step(None)


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (None, {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}),
        (ParameterSelection(min_ndim=2), {"0.weight", "3.weight"}),
        (ParameterSelection(include=r"^3\."), {"3.weight", "3.bias"}),
        (ParameterSelection(norm=False, bias=False), {"0.weight", "3.weight"}),
    ],
    ids=["all", "matrices", "last layer", "neither bias nor norm"],
)
def test_chosen_parameters(selection, chosen):
    net, closure = problem()
    closure().backward()
    before = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    orthogonalize(torch.optim.SGD(net.parameters(), lr=0.1), parameters=selection, module=net)
    changed = {name for name, parameter in net.named_parameters() if not torch.equal(parameter.grad, before[name])}
    # the bias of LayerNorm is zero at first: nothing to project
    assert changed | {"2.bias"} == chosen | {"2.bias"}


def test_parameters_without_gradient_are_passed_over():
    net, closure = problem()
    net[0].requires_grad_(False)
    closure().backward()
    orthogonalize(torch.optim.SGD(net.parameters(), lr=0.1))
    assert net[0].weight.grad is None
    orthogonalize(torch.optim.SGD(problem()[0].parameters(), lr=0.1))


def test_sparse_gradients_are_refused_unless_left_out():
    net = nn.ModuleDict({"embedding": nn.Embedding(4, 3, sparse=True), "linear": nn.Linear(3, 2)})
    net["linear"](net["embedding"](torch.tensor([1]))).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) is sparse.*exclude.*sparse=False"):
        orthogonalize(optimizer)
    orthogonalize(optimizer, parameters=ParameterSelection(exclude="embedding"), module=net)
    with pytest.raises(ValueError, match="names are not known"):
        orthogonalize(optimizer, parameters=ParameterSelection(exclude="embedding"))
