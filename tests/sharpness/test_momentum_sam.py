"""Momentum-SAM against explicit vectors over several steps, and what it asks of the optimizer."""

import copy

import pytest
import torch

from lightning_robust.schedules import Linear
from lightning_robust.sharpness import MSAM, ParameterSelection, sharp_backward
from support.explicit import Problem, flat, identical, norm, plus, same, through_file
from support.sharp_loop import follows_the_loop


def ahead(buffers, rho):
    """The perturbation; rho by name, of the perturbed weights only."""
    length = norm({name: buffers[name] for name in rho})
    return {name: -radius * buffers[name] / (length + 1e-12) for name, radius in rho.items()}


def everywhere(problem, value):
    return dict.fromkeys(problem.weights, value)


def step(problem, method, optimizer, index, **options):
    optimizer.zero_grad()
    sharp_backward(problem.closure(index), method, optimizer, module=problem.net, **options)
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"dampening": 0.3}, {"maximize": True}],
    ids=["plain", "nesterov", "damp", "max"],
)
@pytest.mark.parametrize("decayed", [True, False], ids=["perturbed", "clean"])
def test_steps_of_sgd_are_the_formula(options, decayed):
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.05, momentum=0.8, weight_decay=0.1, **options)
    method = MSAM(rho=0.7, decay_at_perturbed=decayed)
    assert method.extra_passes == 0
    weights = problem.weights
    buffers = {name: torch.zeros_like(value) for name, value in weights.items()}
    for index in range(5):
        offsets = ahead(buffers, everywhere(problem, 0.7))
        moved = plus(weights, offsets)
        g = problem.gradient(moved, index)
        if "maximize" in options:
            g = {name: -value for name, value in g.items()}
        g = plus(g, moved if decayed else weights, 0.1)
        damp = 0.0 if index == 0 else options.get("dampening", 0.0)
        buffers = {name: 0.8 * buffers[name] + (1 - damp) * value for name, value in g.items()}
        used = plus(g, buffers, 0.8) if "nesterov" in options else buffers
        weights = plus(weights, used, -0.05)
        step(problem, method, optimizer, index)
        assert len(problem.passes) == 1
        same(problem.passes[0], moved)
        same(problem.weights, weights)  # between steps the weights are the unperturbed ones


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_of_adam_are_the_formula(kind, decay):
    problem = Problem()
    optimizer = kind(problem.net.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-4, weight_decay=decay)
    method = MSAM(rho=0.7)
    weights = problem.weights
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = copy.deepcopy(first)
    for index in range(4):
        moved = plus(weights, ahead(first, everywhere(problem, 0.7)))
        g = problem.gradient(moved, index)
        if kind is torch.optim.Adam:
            g = plus(g, moved, decay)
        else:
            weights = {name: (1 - 0.01 * decay) * value for name, value in weights.items()}
        first = {name: 0.8 * first[name] + 0.2 * value for name, value in g.items()}
        second = {name: 0.9 * second[name] + 0.1 * value**2 for name, value in g.items()}
        for name in weights:
            m, v = first[name] / (1 - 0.8 ** (index + 1)), second[name] / (1 - 0.9 ** (index + 1))
            weights[name] = weights[name] - 0.01 * m / (v.sqrt() + 1e-4)
        step(problem, method, optimizer, index)
        same(problem.passes[0], moved)
        same(problem.weights, weights)


def test_the_first_step_is_a_plain_one():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    loss = sharp_backward(problem.closure(0), MSAM(rho=5.0), optimizer, module=problem.net)
    assert identical(problem.passes[0], problem.weights)
    same(problem.grads(), problem.gradient(problem.weights, 0))
    assert loss.isfinite()


def test_groups_have_their_own_radius_and_decay():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD(
        [{"params": biases, "rho": 0.2}, {"params": others, "weight_decay": 0.3}], lr=0.1, momentum=0.9
    )
    method = MSAM(rho=0.5)
    step(problem, method, optimizer, 0)
    weights = problem.weights
    buffers = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in problem.net.named_parameters()}
    offsets = ahead(buffers, {name: 0.2 if "bias" in name else 0.5 for name in weights})
    found = method.offsets(optimizer)
    same({name: found[p] for name, p in problem.net.named_parameters()}, offsets)
    optimizer.zero_grad()
    sharp_backward(problem.closure(1), method, optimizer, module=problem.net)
    expected = problem.gradient(plus(weights, offsets), 1)
    decays = {name: 0.3 * value for name, value in offsets.items() if "bias" not in name}
    same(problem.grads(), plus(expected, decays))


def test_only_chosen_weights_move_and_count():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    method, perturb = MSAM(rho=0.5), ParameterSelection(include=["first.weight", "last.weight"])
    step(problem, method, optimizer, 0)
    weights = problem.weights
    buffers = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in problem.net.named_parameters()}
    offsets = ahead(buffers, {"first.weight": 0.5, "last.weight": 0.5})
    optimizer.zero_grad()
    sharp_backward(problem.closure(1), method, optimizer, module=problem.net, perturb=perturb)
    same(problem.passes[0], plus(weights, offsets))
    same(problem.grads(), plus(problem.gradient(plus(weights, offsets), 1), offsets, 0.2))


def test_a_weight_that_joins_later_begins_without_perturbation():
    problem = Problem()
    problem.net.last.requires_grad_(False)
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    step(problem, MSAM(rho=0.5), optimizer, 0)
    problem.net.last.requires_grad_(True)
    before = problem.weights
    step(problem, MSAM(rho=0.5), optimizer, 1)
    for name, value in before.items():
        assert torch.equal(problem.passes[0][name], value) == name.startswith("last")


def test_the_radius_may_be_a_schedule():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    method = MSAM(rho=Linear(start=0.1, end=0.3))
    step(problem, method, optimizer, 0, step=0, total_steps=3)
    weights = problem.weights
    assert norm(dict(enumerate(method.offsets(optimizer, step=1, total_steps=3).values()))) == pytest.approx(0.2)
    step(problem, method, optimizer, 1, step=1, total_steps=3)
    assert norm(plus(problem.passes[0], weights, -1.0)) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="needs to know the step"):
        method.offsets(optimizer)


def test_accumulated_batches_see_one_perturbation():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    method = MSAM(rho=0.5)
    step(problem, method, optimizer, 0)
    offsets = {name: method.offsets(optimizer)[p] for name, p in problem.net.named_parameters()}
    moved = plus(problem.weights, offsets)
    expected = {name: (problem.gradient(moved, 1)[name] + problem.gradient(moved, 2)[name]) / 2 for name in moved}
    optimizer.zero_grad()
    for index in (1, 2):
        sharp_backward(problem.closure(index), method, optimizer, module=problem.net, accumulate=2)
        same(problem.passes[0], moved)
    same(problem.grads(), plus(expected, offsets, 0.2))


def test_nothing_but_the_optimizer_remembers():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    method = MSAM(rho=0.5)
    for index in range(3):
        step(problem, method, optimizer, index)
    assert method.state_dict() == {}
    resumed = Problem()
    resumed.net.load_state_dict(problem.net.state_dict())
    other = torch.optim.SGD(resumed.net.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(through_file(optimizer.state_dict()))
    step(problem, method, optimizer, 3)
    step(resumed, MSAM(rho=0.5), other, 3)
    assert identical(problem.weights, resumed.weights)


def test_the_one_pass_moves_the_statistics_of_the_perturbed_weights():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    method = MSAM(rho=0.5)
    step(problem, method, optimizer, 0)
    perturbed = copy.deepcopy(problem.net)
    with torch.no_grad():
        for parameter, offset in zip(perturbed.parameters(), method.offsets(optimizer).values(), strict=True):
            parameter += offset
    perturbed(problem.batches[1][0])
    sharp_backward(problem.closure(1), method, optimizer, module=problem.net)
    torch.testing.assert_close(problem.net.batch_norm.running_mean, perturbed.batch_norm.running_mean)
    assert problem.net.batch_norm.num_batches_tracked == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_trainer_it_is_the_plain_loop(accumulate):
    follows_the_loop(MSAM(rho=0.3), accumulate=accumulate)


def test_other_optimizers_are_refused():
    problem = Problem()
    with pytest.raises(
        ValueError, match="MSAM perturbs along the momentum of the optimizer, but there is no optimizer"
    ):
        sharp_backward(problem.closure(0), MSAM(), problem.net)
    adagrad = torch.optim.Adagrad(problem.net.parameters())
    with pytest.raises(ValueError, match="but that of Adagrad is not known; give SGD with momentum, Adam or AdamW"):
        sharp_backward(problem.closure(0), MSAM(), adagrad)
    with pytest.raises(ValueError, match="that of Adagrad is not known"):
        MSAM().offsets(adagrad)


def test_sgd_without_momentum_is_refused_for_weights_that_move():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    with pytest.raises(ValueError, match=r"SGD has momentum=0; set momentum=0\.9, or leave out groups"):
        sharp_backward(problem.closure(0), MSAM(), torch.optim.SGD(problem.net.parameters(), lr=0.1))
    groups = [{"params": biases, "momentum": 0.0, "perturb": False}, {"params": others, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    method = MSAM(rho=0.5)
    step(problem, method, optimizer, 0)
    step(problem, method, optimizer, 1)
    assert set(method.offsets(optimizer)) == set(others)
    assert flat({str(i): value for i, value in enumerate(method.offsets(optimizer).values())}).norm() == pytest.approx(
        0.5
    )


def test_bad_numbers_are_refused():
    for name in ("rho", "norm_eps"):
        with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0 but got 0"):
            MSAM(**{name: 0.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    problem, exact = Problem(dtype=dtype), Problem()
    optimizers = [
        torch.optim.SGD(each.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for each in (problem, exact)
    ]
    step(problem, MSAM(rho=0.5), optimizers[0], 0)
    exact.net.load_state_dict(problem.net.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for each, optimizer in zip((problem, exact), optimizers, strict=True):
        optimizer.zero_grad()
        sharp_backward(each.closure(3), MSAM(rho=0.5), optimizer, module=each.net)
    rough, precise = flat(problem.grads()).double(), flat(exact.grads())
    assert problem.grads()["first.weight"].dtype == dtype
    assert (rough - precise).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * precise.norm()
