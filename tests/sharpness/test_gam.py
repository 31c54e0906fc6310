"""GAM against explicit vectors: four passes, both forms of h_minus, radii, selection, memory."""

import gc

import pytest
import torch

from lightning_robust.schedules import Linear
from lightning_robust.sharpness import GAM, SAM, ParameterSelection, ProportionalToLR, sharp_backward
from support.explicit import Problem, flat, identical, norm, plus, same
from support.sharp_loop import follows_the_loop

XI = 1e-12
PLAIN = {"beta0": 0.5, "beta1": 0.6, "gamma": 0.03}
STRONG = {"beta0": 0.2, "beta1": 0.9, "gamma": 0.7}


def step(weights, gradient, rho, adaptive):
    """One ascent step from some weights; rho by name, of the perturbed weights only."""
    scale = {name: weights[name].abs() if adaptive else torch.ones_like(weights[name]) for name in rho}
    length = norm({name: scale[name] * gradient[name] for name in rho})
    return {name: rho[name] * scale[name] ** 2 * gradient[name] / (length + XI) for name in rho}


def stated(problem, grad_rho, grad_norm_rho, *, beta0, beta1, gamma, adaptive=False, paper=False, index=0):
    """The weights of the passes and the direction."""
    w = problem.weights
    g0 = problem.gradient(w, index)
    w1 = plus(w, step(w, g0, grad_rho, adaptive))
    g1 = problem.gradient(w1, index)
    w2 = plus(w, step(w, {name: g1[name] - g0[name] for name in g0}, grad_norm_rho, adaptive))
    g2 = problem.gradient(w2, index)
    w3 = plus(w2, step(w2, g2, grad_rho, adaptive))
    g3 = problem.gradient(w3, index)
    h_plus = beta1 * flat(g1) + (1 - beta1) * flat(g3)
    h_minus = (beta0 if paper else 1.0) * flat(g0) + (1 - beta0) * flat(g2)
    unit = h_plus / (h_plus.norm() + XI)
    cosine = h_minus @ h_plus / (h_minus.norm() * h_plus.norm() + XI)
    return [w, w1, w2, w3], h_plus - gamma * (h_minus - cosine * h_minus.norm() * unit)


def check(problem, method, grad_rho, grad_norm_rho, stating, parameters=None, **options):
    passes, direction = stated(problem, grad_rho, grad_norm_rho, **stating)
    sharp_backward(problem.closure(0), method, parameters or problem.net, module=problem.net, **options)
    assert len(problem.passes) == 4
    for found, expected in zip(problem.passes, passes, strict=True):
        same(found, expected)
    torch.testing.assert_close(flat(problem.grads()), direction, rtol=1e-10, atol=1e-13)


def everywhere(problem, radius):
    return dict.fromkeys(problem.weights, radius)


@pytest.mark.parametrize("numbers", [PLAIN, STRONG], ids=["plain", "strong"])
@pytest.mark.parametrize("h_minus", ["code", "paper"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_passes_and_direction_are_the_formula(numbers, h_minus, adaptive):
    problem = Problem()
    before = problem.weights
    method = GAM(grad_rho=0.1, grad_norm_rho=0.4, **numbers, h_minus=h_minus, adaptive=adaptive)
    assert method.extra_passes == 3
    stating = {**numbers, "adaptive": adaptive, "paper": h_minus == "paper"}
    check(problem, method, everywhere(problem, 0.1), everywhere(problem, 0.4), stating)
    assert identical(problem.weights, before)


def test_defaults_are_those_of_the_script():
    problem = Problem()
    check(problem, GAM(), everywhere(problem, 0.02), everywhere(problem, 0.2), PLAIN)


def test_the_code_and_the_paper_differ_in_h_minus_only():
    problem = Problem()
    grads = []
    for options in ({}, {"h_minus": "paper"}, {"h_minus": "paper", "beta0": 1.0}, {"beta0": 1.0}):
        problem.net.zero_grad()
        sharp_backward(problem.closure(0), GAM(**options), problem.net)
        grads.append(flat(problem.grads()).clone())
    assert not torch.allclose(grads[0], grads[1], rtol=1e-4)
    assert torch.equal(grads[2], grads[3])  # with beta0 = 1 both are g0


def test_of_the_first_ascent_alone_it_is_sam():
    problem, other = Problem(), Problem()
    sharp_backward(problem.closure(0), GAM(grad_rho=0.3, beta1=1.0, gamma=0.0), problem.net)
    sharp_backward(other.closure(0), SAM(rho=0.3), other.net)
    same(problem.grads(), other.grads())


def test_groups_have_their_own_radii_under_their_own_names():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    options = {"grad_rho": 0.3, "grad_norm_rho": 0.0, "rho": 7.0}  # `rho` is nobody's
    optimizer = torch.optim.SGD([{"params": biases, **options}, {"params": others}], lr=0.1)
    loss_radius = {name: 0.3 if "bias" in name else 0.05 for name in problem.weights}
    norm_radius = {name: 0.0 if "bias" in name else 0.5 for name in problem.weights}
    method = GAM(grad_rho=0.05, grad_norm_rho=0.5, **STRONG)
    check(problem, method, loss_radius, norm_radius, STRONG, parameters=optimizer)


@pytest.mark.parametrize("adaptive", [False, True])
def test_few_weights_are_perturbed_and_all_are_decomposed(adaptive):
    problem = Problem()
    chosen = ["first.weight", "batch_norm.weight"]
    method = GAM(grad_rho=0.1, grad_norm_rho=0.4, **STRONG, adaptive=adaptive)
    stating = {**STRONG, "adaptive": adaptive}
    perturb = ParameterSelection(include=chosen)
    check(problem, method, dict.fromkeys(chosen, 0.1), dict.fromkeys(chosen, 0.4), stating, perturb=perturb)


def test_radii_follow_the_learning_rate_and_the_step():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    method = GAM(
        grad_rho=ProportionalToLR(rho_max=0.04, rho_min=0.02, lr_max=0.1), grad_norm_rho=Linear(start=0.2, end=0.4)
    )
    for taken, lr, loss_radius, norm_radius in ((0, 0.1, 0.04, 0.2), (5, 0.05, 0.03, 0.3), (10, 0.0, 0.02, 0.4)):
        optimizer.param_groups[0]["lr"] = lr
        problem.net.zero_grad()
        radii = everywhere(problem, loss_radius), everywhere(problem, norm_radius)
        check(problem, method, *radii, PLAIN, parameters=optimizer, step=taken, total_steps=11)


def test_zero_gradients_give_zero_and_others_propagate():
    problem = Problem()
    for adaptive in (False, True):
        problem.net.zero_grad()
        sharp_backward(problem.closure(0, 0.0), GAM(grad_norm_rho=5.0, adaptive=adaptive), problem.net)
        assert not flat(problem.grads()).any()
        assert all(identical(each, problem.weights) for each in problem.passes)
    sharp_backward(problem.closure(0, float("nan")), GAM(), problem.net)
    assert flat(problem.grads()).isnan().all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_trainer_it_is_the_plain_loop(accumulate):
    follows_the_loop(GAM(grad_rho=0.05, gamma=0.3), accumulate=accumulate)


@pytest.mark.parametrize(("adaptive", "expected"), [(False, [0, 1, 3, 3]), (True, [0, 2, 3, 3])])
def test_no_more_sets_of_gradients_than_said_are_alive_in_a_pass(adaptive, expected):
    w = torch.nn.Parameter(torch.randn(1013, dtype=torch.float64))
    alive = []

    def closure():
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        alive.append(len({tensor.data_ptr() for tensor in tensors if tensor.numel() == 1013}))
        return (w**4).sum()

    method = GAM(adaptive=adaptive)
    sharp_backward(closure, method, [w])
    weight_and_copy = [1, 2, 2, 2]
    assert [count - others for count, others in zip(alive, weight_and_copy, strict=True)] == expected
    assert method.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    problem, exact = Problem(dtype=dtype), Problem()
    exact.net.load_state_dict(problem.net.state_dict())
    for each in (problem, exact):
        sharp_backward(each.closure(0), GAM(grad_rho=0.3, grad_norm_rho=0.5), each.net)
    rough, precise = flat(problem.grads()).double(), flat(exact.grads())
    assert problem.grads()["first.weight"].dtype == dtype
    assert (rough - precise).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * precise.norm()


@pytest.mark.parametrize("name", ["grad_rho", "grad_norm_rho", "norm_eps"])
def test_numbers_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0 but got 0"):
        GAM(**{name: 0.0})


@pytest.mark.parametrize("name", ["beta0", "beta1"])
def test_shares_outside_the_unit_interval_are_refused(name):
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be in \[0.0, 1.0\] but got 1.1"):
        GAM(**{name: 1.1})


def test_other_options_are_refused():
    with pytest.raises(ValueError, match="Expected `gamma` to be a finite number >= 0 but got -1"):
        GAM(gamma=-1)
    with pytest.raises(ValueError, match="Expected `h_minus` to be one of 'code', 'paper' but got 'both'"):
        GAM(h_minus="both")


def test_a_negative_radius_of_a_group_is_refused():
    problem = Problem()
    optimizer = torch.optim.SGD([{"params": list(problem.net.parameters()), "grad_norm_rho": -1.0}], lr=0.1)
    with pytest.raises(ValueError, match=r"group option `grad_norm_rho` to be a number >= 0 but got -1\.0"):
        sharp_backward(problem.closure(0), GAM(), optimizer)
