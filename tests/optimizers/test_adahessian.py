import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.optimizers import AdaHessian, hessian_diagonal, rademacher

create_graph = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")


class Net(nn.Module):
    """Tensors of 1 to 4 dimensions."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.sequence = nn.Conv1d(2, 3, 3)
        self.image = nn.Conv2d(3, 2, 2)
        self.linear = nn.Linear(2, 3)
        self.to(dtype)

    def forward(self, x):
        hidden = torch.tanh(self.sequence(x)).view(len(x), 3, 2, 2)
        return self.linear(torch.tanh(self.image(hidden)).flatten(1))


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 2, 6, generator=generator, dtype=dtype), torch.randint(3, (7,), generator=generator)


def differentiate(net, seed=0, graph=True, dtype=torch.float64):
    x, y = batch(seed, dtype)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=graph)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def full_hessian(net, seed=0):
    """Gradient and Hessian as one vector and one matrix."""
    x, y = batch(seed)
    names, parameters = zip(*net.named_parameters(), strict=True)
    sizes = [parameter.numel() for parameter in parameters]

    def loss(vector):
        parts = [part.view_as(p) for part, p in zip(vector.split(sizes), parameters, strict=True)]
        logits = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (x,))
        return F.cross_entropy(logits, y)

    vector = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(vector), vector)
    return gradient, torch.autograd.functional.hessian(loss, vector.detach()), sizes


@pytest.mark.parametrize("conv", [True, False], ids=["kernels", "entries"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hessian_power": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9)},
        {"n_samples": 3, "lr": 0.02, "eps": 1e-2},
        {"n_samples": 2, "update_each": 2, "hessian_power": 0.0, "weight_decay": 0.01},
    ],
    ids=["defaults", "power", "samples", "momentum-sgd"],
)
def test_equals_a_loop_with_the_full_hessian(options, conv):
    net = Net()
    drawn = []

    def probe(parameters):
        drawn.append([torch.randint(0, 2, each.shape).double() * 2 - 1 for each in parameters])
        return drawn[-1]

    optimizer = AdaHessian(net.parameters(), probe=probe, average_conv_kernel=conv, **options)
    lr, eps, decay = options.get("lr", 0.15), options.get("eps", 1e-4), options.get("weight_decay", 0.0)
    first, second = options.get("betas", (0.9, 0.999))
    power, samples, every = (options.get(name, 1) for name in ("hessian_power", "n_samples", "update_each"))
    w = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(4):
        gradient, hessian, sizes = full_hessian(net, step)
        differentiate(net, step)
        optimizer.step()
        if step % every == 0:
            signs = [torch.cat([each.flatten() for each in draw]) for draw in drawn[-samples:]]
            estimate = torch.stack([z * (hessian @ z) for z in signs]).mean(0).abs()
            parts = [part.view_as(p) for part, p in zip(estimate.split(sizes), net.parameters(), strict=True)]
            if conv:
                parts = [p.flatten(2).mean(2)[..., None].expand(*p.shape[:2], -1) if p.ndim > 2 else p for p in parts]
                parts = [
                    part.repeat_interleave(p[0, 0].numel(), 2) if p.ndim > 2 else part
                    for part, p in zip(parts, net.parameters(), strict=True)
                ]
            diagonal = torch.cat([part.flatten() for part in parts])
        m = first * m + (1 - first) * gradient
        v = second * v + (1 - second) * diagonal**2
        denominator = (v / (1 - second ** (step + 1))) ** (power / 2) + eps
        w = (1 - lr * decay) * w - lr * m / (1 - first ** (step + 1)) / denominator
        ours = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        torch.testing.assert_close(ours, w, rtol=1e-8, atol=1e-10)
    assert len(drawn) == samples * len(range(0, 4, every))


def test_all_signs_together_give_the_exact_diagonal():
    w = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64, requires_grad=True)
    u = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(w, u):
        return (w.prod() * u).sin() + (w**4).sum() * u**2

    signs = [
        [torch.tensor(each[:3], dtype=torch.float64), torch.tensor(each[3], dtype=torch.float64)]
        for each in itertools.product((-1.0, 1.0), repeat=4)
    ]
    gradients = torch.autograd.grad(loss(w, u), [w, u], create_graph=True)
    diagonal = hessian_diagonal(gradients, [w, u], signs)
    exact = torch.autograd.functional.hessian(loss, (w.detach(), u.detach()))
    torch.testing.assert_close(diagonal, [exact[0][0].diagonal(), exact[1][1]])


def test_the_signs_are_ours_alone():
    parameters = [torch.zeros(50, 3), torch.zeros(7)]
    state = torch.get_rng_state()
    first = rademacher(parameters, seed=3, draw=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = rademacher(parameters, seed=3, draw=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(bool((each.abs() == 1).all()) for each in first)
    assert abs(float(first[0].mean())) < 0.3
    for other in ({"seed": 4, "draw": 5}, {"seed": 3, "draw": 6}):
        assert not torch.equal(first[0], rademacher(parameters, **other)[0])


@pytest.mark.parametrize("update_each", [1, 3])
def test_resume_is_exact(update_each, tmp_path):
    def make(net):
        return AdaHessian(net.parameters(), lr=0.01, update_each=update_each, n_samples=2, seed=7)

    whole, part = Net(torch.float32), Net(torch.float32)
    one, two = make(whole), make(part)
    for step in range(5):
        differentiate(whole, step, dtype=torch.float32)
        one.step()
        if step < 2:
            differentiate(part, step, dtype=torch.float32)
            two.step()
    torch.save({"net": part.state_dict(), "optimizer": two.state_dict()}, tmp_path / "saved.pt")
    resumed = Net(torch.float32)
    third = make(resumed)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["net"])
    third.load_state_dict(saved["optimizer"])
    for step in range(2, 5):
        torch.manual_seed(step)  # of no importance
        differentiate(resumed, step, dtype=torch.float32)
        third.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert bool(saved["optimizer"]["state"][0]["step"] == 2)  # the caller's dictionary stays as it was


def test_a_copy_goes_on_as_the_original():
    net = Net()
    optimizer = AdaHessian(net.parameters(), lr=0.01, update_each=2)
    differentiate(net)
    optimizer.step()
    net.zero_grad()
    other, twin = copy.deepcopy((net, optimizer))
    for module, each in ((net, optimizer), (other, twin)):
        for step in (1, 2):
            differentiate(module, step)
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_only_steps_that_estimate_need_a_graph():
    net = Net()
    optimizer = AdaHessian(net.parameters(), update_each=3, lr=1e-3)
    asked = []
    for step in range(7):
        asked.append(optimizer.needs_graph)
        differentiate(net, step, graph=optimizer.needs_graph)
        optimizer.step()
        assert not any(parameter.grad.requires_grad for parameter in net.parameters())  # the graph is gone
    assert asked == [True, False, False, True, False, False, True]


@create_graph
def test_closure_and_backward():
    net, reference = Net(), Net()
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward(create_graph=True)
        return loss

    optimizer, other = (AdaHessian(each.parameters(), lr=0.01) for each in (net, reference))
    loss = optimizer.step(closure)
    differentiate(reference)
    other.step()
    torch.testing.assert_close(loss, F.cross_entropy(Net()(x), y))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))


def test_hooks_on_parameters_do_not_scale_the_curvature():
    net, hooked = Net(), Net()
    for each in (net, hooked):
        differentiate(each)
    for parameter in hooked.parameters():
        parameter.register_hook(lambda gradient: 100 * gradient)
    for each in (net, hooked):
        AdaHessian(each.parameters(), lr=0.01).step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), hooked.parameters(), strict=True))


def test_a_linear_parameter_has_no_curvature_and_an_unused_one_stays():
    w, linear, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = AdaHessian([w, linear, unused], lr=0.1, eps=1.0)
    gradients = torch.autograd.grad((w**2).sum() + linear.sum(), [w, linear], create_graph=True)
    w.grad, linear.grad = gradients
    optimizer.step()
    torch.testing.assert_close(w.data, torch.full((2,), 1 - 0.1 * 2 / (2 + 1)))
    torch.testing.assert_close(linear.data, torch.full((2,), 1 - 0.1))
    assert torch.equal(unused.data, torch.ones(2))
    assert not optimizer.state[unused]


def test_kernels_of_a_group_can_be_left_alone():
    position = nn.Parameter(torch.arange(1.0, 7).view(1, 2, 3))
    optimizer = AdaHessian([{"params": [position], "average_conv_kernel": False}], lr=1.0, eps=0.0)
    (position.grad,) = torch.autograd.grad((position**4).sum(), [position], create_graph=True)
    before = position.detach().clone()
    optimizer.step()
    torch.testing.assert_close(position.data, before * (1 - 4 / 12))  # Newton's step of each entry


def test_gradients_without_graph_are_refused():
    net = Net()
    differentiate(net, graph=False)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*manual optimization.*SharpnessAware"):
        AdaHessian(net.parameters()).step()


@create_graph
def test_loss_scaling_is_refused():
    w = nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([w])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((w**2).sum()).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be used with a GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    (w.grad,) = torch.autograd.grad((w**2).sum(), [w], create_graph=True)
    optimizer.step()  # the refusal left nothing behind


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"AdaHessian does not support sparse gradients.*\(4, 2\).*sparse=False"):
        AdaHessian(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "Expected `lr`"),
        ({"eps": -1}, "Expected `eps`"),
        ({"weight_decay": -1}, "Expected `weight_decay`"),
        ({"hessian_power": 1.5}, r"Expected `hessian_power` to be in \[0.0, 1.0\]"),
        ({"n_samples": 0}, "Expected `n_samples` to be an integer >= 1"),
        ({"update_each": 0}, "Expected `update_each`"),
        ({"seed": -1}, "Expected `seed`"),
        ({"betas": (0.9, 1.0)}, r"Expected `betas` to be in \[0, 1\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        AdaHessian([nn.Parameter(torch.zeros(1))], **options)
