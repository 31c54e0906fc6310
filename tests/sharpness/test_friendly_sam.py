"""Friendly-SAM against explicit vectors over several steps; what enters its memory and what does not."""

import pytest
import torch

from lightning_robust.schedules import Piecewise
from lightning_robust.sharpness import SAM, FriendlySAM, ParameterSelection, sharp_backward
from support.explicit import Problem, identical, norm, plus, same, through_file


def stated(weights, gradient, mean, rho, sigma, adaptive=False):
    """The perturbation; rho by name."""
    u = {name: gradient[name] if mean is None else gradient[name] - sigma * mean[name] for name in rho}
    scale = {name: weights[name].abs() if adaptive else torch.ones_like(weights[name]) for name in rho}
    length = norm({name: scale[name] * value for name, value in u.items()})
    return {name: rho[name] * scale[name] ** 2 * value / (length + 1e-12) for name, value in u.items()}


def learn(mean, gradient, lmbda):
    if mean is None:
        return gradient
    return {name: lmbda * value + (1 - lmbda) * gradient[name] for name, value in mean.items()}


def constant(problem, rho):
    return dict.fromkeys(problem.weights, rho)


def memory(method):
    return {key.removeprefix("mean/"): value for key, value in method.state_dict().items()}


@pytest.mark.parametrize(
    ("sigma", "lmbda", "adaptive"), [(1.0, 0.6, False), (0.5, 0.95, False), (1.0, 0.0, False), (1.0, 0.6, True)]
)
def test_steps_are_the_formula(sigma, lmbda, adaptive):
    problem = Problem()
    method = FriendlySAM(rho=0.1, sigma=sigma, lmbda=lmbda, adaptive=adaptive)
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    mean = None
    for index in range(len(problem.batches)):
        weights = problem.weights
        gradient = problem.gradient(weights, index)
        offsets = stated(weights, gradient, mean, constant(problem, 0.1), sigma, adaptive)
        expected = problem.gradient(plus(weights, offsets), index)
        mean = learn(mean, gradient, lmbda)
        optimizer.zero_grad()
        sharp_backward(problem.closure(index), method, optimizer, module=problem.net)
        same(problem.offsets(), offsets)
        same(problem.grads(), expected)
        same(memory(method), mean)
        optimizer.step()


def test_without_sigma_it_is_sam():
    for index in range(3):
        ours, theirs = Problem(), Problem()
        method = FriendlySAM(rho=0.1, sigma=0.0)
        sharp_backward(ours.closure(index), method, ours.net)
        sharp_backward(theirs.closure(index), SAM(rho=0.1), theirs.net)
        assert identical(ours.grads(), theirs.grads())


def test_groups_have_their_own_radius():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD([{"params": biases, "rho": 0.0}, {"params": others, "rho": 0.4}], lr=0.1)
    method = FriendlySAM(rho=9.0)
    first, second = (problem.gradient(problem.weights, index) for index in (0, 1))
    rho = {name: 0.0 if "bias" in name else 0.4 for name in problem.weights}
    for index, gradient, mean in ((0, first, None), (1, second, first)):
        sharp_backward(problem.closure(index), method, optimizer, module=problem.net)
        same(problem.offsets(), stated(problem.weights, gradient, mean, rho, 1.0))


def test_only_chosen_parameters_move_count_and_are_remembered():
    problem = Problem()
    method, perturb = FriendlySAM(rho=0.3), ParameterSelection(include=["first.weight", "last.weight"])
    chosen = dict.fromkeys(["first.weight", "last.weight"], 0.3)
    mean = None
    for index in range(3):
        gradient = problem.gradient(problem.weights, index)
        offsets = stated(problem.weights, gradient, mean, chosen, 1.0)
        sharp_backward(problem.closure(index), method, problem.net, perturb=perturb)
        found = problem.offsets()
        same({name: found[name] for name in chosen}, offsets)
        assert not any(value.any() for name, value in found.items() if name not in chosen)
        mean = learn(mean, {name: gradient[name] for name in chosen}, 0.6)
        same(memory(method), mean)


def test_the_radius_may_be_a_schedule():
    method = FriendlySAM(rho=Piecewise(values={0: 0.1, 5: 0.2}))
    problem = Problem()
    for step, rho in ((4, 0.1), (5, 0.2)):
        method.reset()
        sharp_backward(problem.closure(0), method, problem.net, step=step)
        assert norm(problem.offsets()) == pytest.approx(rho)


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_unusable_gradients_do_not_enter_the_memory(factor):
    problem = Problem()
    method = FriendlySAM()
    first, last = problem.gradient(problem.weights, 0), problem.gradient(problem.weights, 2)
    sharp_backward(problem.closure(1, factor), method, problem.net)  # nothing is known yet
    assert not any(value.any() for value in memory(method).values())
    sharp_backward(problem.closure(0), method, problem.net)
    same(memory(method), first)
    before = {name: value.clone() for name, value in memory(method).items()}
    problem.net.zero_grad()
    sharp_backward(problem.closure(1, factor), method, problem.net)
    assert identical(memory(method), before)
    assert all(value.isfinite().all() == (factor == 0) for value in problem.grads().values())
    sharp_backward(problem.closure(2), method, problem.net)
    same(memory(method), learn(first, last, 0.6))


def test_a_weight_that_joins_later_begins_with_its_own_gradient():
    problem = Problem()
    method = FriendlySAM()
    problem.net.last.requires_grad_(False)
    sharp_backward(problem.closure(0), method, problem.net)
    problem.net.last.requires_grad_(True)
    first, second = (problem.gradient(problem.weights, index) for index in (0, 1))
    mean = {name: 0 * value if "last" in name else value for name, value in first.items()}
    offsets = stated(problem.weights, second, mean, constant(problem, 0.2), 1.0)
    sharp_backward(problem.closure(1), method, problem.net)
    same(problem.offsets(), offsets)
    expected = learn(first, second, 0.6) | {name: value for name, value in second.items() if "last" in name}
    same(memory(method), expected)


def test_the_memory_survives_a_checkpoint():
    problem = Problem()
    method = FriendlySAM()
    for index in range(3):
        sharp_backward(problem.closure(index), method, problem.net)
    state = through_file(method.state_dict())
    kept = through_file(state)
    resumed, forgetful = FriendlySAM(), FriendlySAM()
    resumed.load_state_dict(state)
    grads = []
    for each in (method, resumed, forgetful):
        problem.net.zero_grad()
        for index in (3, 4):
            sharp_backward(problem.closure(index), each, problem.net)
        grads.append({name: value.clone() for name, value in problem.grads().items()})
    assert identical(grads[0], grads[1])
    assert not identical(grads[0], grads[2])
    assert identical(state, kept)  # what was loaded is not written to
    resumed.reset()
    assert not resumed.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    problem, exact = Problem(dtype=dtype), Problem()
    exact.net.load_state_dict(problem.net.state_dict())
    methods = FriendlySAM(rho=0.5), FriendlySAM(rho=0.5)
    for index in range(3):
        for each, method in zip((problem, exact), methods, strict=True):
            each.net.zero_grad()
            sharp_backward(each.closure(index), method, each.net)
    assert all(value.dtype == dtype for value in memory(methods[0]).values())
    pairs = ((memory(methods[0]), memory(methods[1])), (problem.grads(), exact.grads()))
    for rough, precise in pairs:
        assert norm(plus(rough, precise, -1.0)) < (0.1 if dtype == torch.bfloat16 else 0.01) * norm(precise)


@pytest.mark.parametrize(("name", "value"), [("rho", 0.0), ("norm_eps", 0.0), ("rho", float("nan"))])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0"):
        FriendlySAM(**{name: value})


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="Expected `sigma` to be a finite number >= 0 but got -1"):
        FriendlySAM(sigma=-1)
    with pytest.raises(ValueError, match=r"Expected `lmbda` to be in \[0.0, 1.0\] but got 1.1"):
        FriendlySAM(lmbda=1.1)


def test_sparse_gradients_are_refused():
    net = torch.nn.Embedding(4, 2, sparse=True)
    with pytest.raises(
        ValueError, match=r"FriendlySAM needs dense gradients, but that of 'weight' is sparse; use Embedding"
    ):
        sharp_backward(lambda: net(torch.tensor([1])).sum(), FriendlySAM(), net, step=0)
