"""GSAM against explicit vectors: passes, decomposition, radii, selection, and what it is without its own term."""

import pytest
import torch

from lightning_robust.sharpness import (
    ASAM,
    GSAM,
    SAM,
    ParameterSelection,
    ProportionalToLR,
    inner_product,
    sharp_backward,
    subtract_perpendicular,
)
from support.explicit import Problem, flat, identical, norm, plus, same
from support.sharp_loop import follows_the_loop

EPS = 1e-12


def stated(problem, rho, alpha, adaptive=False, index=0):
    """The perturbation and the direction; rho by name, of the perturbed weights only."""
    weights = problem.weights
    g0 = problem.gradient(weights, index)
    scale = {name: weights[name].abs() if adaptive else torch.ones_like(weights[name]) for name in rho}
    length = norm({name: scale[name] * g0[name] for name in rho})
    offsets = {name: rho[name] * scale[name] ** 2 * g0[name] / (length + EPS) for name in rho}
    g1 = problem.gradient(plus(weights, offsets), index)
    along = flat(g1) / (flat(g1).norm() + EPS)
    cosine = flat(g0) @ flat(g1) / (flat(g0).norm() * flat(g1).norm() + EPS)
    perpendicular = flat(g0) - cosine * flat(g0).norm() * along
    return offsets, flat(g1) - alpha * perpendicular


def check(problem, method, rho, alpha, adaptive=False, parameters=None, **options):
    offsets, direction = stated(problem, rho, alpha, adaptive)
    sharp_backward(problem.closure(0), method, parameters or problem.net, module=problem.net, **options)
    found = problem.offsets()
    same({name: found[name] for name in rho}, offsets)
    assert not any(value.any() for name, value in found.items() if name not in rho)
    torch.testing.assert_close(flat(problem.grads()), direction, rtol=1e-10, atol=1e-13)
    assert len(problem.passes) == 2


@pytest.mark.parametrize("alpha", [0.4, 3.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_direction_is_the_formula(alpha, adaptive):
    problem = Problem()
    before = problem.weights
    rho = dict.fromkeys(problem.weights, 0.7)
    check(problem, GSAM(rho=0.7, alpha=alpha, adaptive=adaptive), rho, alpha, adaptive)
    assert identical(problem.weights, before)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GSAM(rho=0.3, alpha=0.0), SAM(rho=0.3)),
        (GSAM(rho=0.3, alpha=0.0, adaptive=True), ASAM(rho=0.3, eta=0.0, scaling="all")),
    ],
)
def test_without_its_term_it_is_sam(ours, theirs):
    first, second = Problem(), Problem()
    sharp_backward(first.closure(0), ours, first.net)
    sharp_backward(second.closure(0), theirs, second.net)
    same(first.grads(), second.grads())


def test_the_term_closes_the_gap_between_the_two_losses():
    problem = Problem()
    grads = []
    for alpha in (0.0, 0.4):
        problem.net.zero_grad()
        sharp_backward(problem.closure(0), GSAM(rho=0.5, alpha=alpha), problem.net)
        grads.append(flat(problem.grads()).clone())
    sam, ours = grads
    clean = flat(problem.gradient(problem.weights, 0))
    # to first order the term does nothing to the perturbed loss and raises the clean one
    assert sam @ (ours - sam) == pytest.approx(0.0, abs=1e-12)
    assert clean @ (ours - sam) < 0


def test_groups_have_their_own_radius():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD([{"params": biases, "rho": 0.0}, {"params": others, "rho": 0.4}], lr=0.1)
    rho = {name: 0.0 if "bias" in name else 0.4 for name in problem.weights}
    check(problem, GSAM(rho=9.0), rho, 0.4, parameters=optimizer)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_decomposition_is_over_all_weights_where_few_are_perturbed(adaptive):
    problem = Problem()
    rho = dict.fromkeys(["first.weight", "batch_norm.weight"], 0.3)
    method = GSAM(rho=0.3, alpha=0.8, adaptive=adaptive)
    check(problem, method, rho, 0.8, adaptive, perturb=ParameterSelection(include=list(rho)))


def test_the_radius_follows_the_learning_rate_of_each_group():
    problem = Problem()
    parameters = dict(problem.net.named_parameters())
    groups = [{"params": [parameters[name]], "lr": 0.1} for name in parameters if "bias" in name]
    groups += [{"params": [parameters[name]], "lr": 0.05} for name in parameters if "bias" not in name]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    method = GSAM(rho=ProportionalToLR(rho_max=0.6, rho_min=0.2, lr_max=0.1), alpha=0.4)
    for share in (1.0, 0.5):
        rho = {name: 0.2 + 0.4 * share * (1.0 if "bias" in name else 0.5) for name in parameters}
        problem.net.zero_grad()
        check(problem, method, rho, 0.4, parameters=optimizer)
        optimizer.step()
        scheduler.step()


def test_zero_gradients_give_zero_and_others_propagate():
    problem = Problem()
    for adaptive in (False, True):
        problem.net.zero_grad()
        sharp_backward(problem.closure(0, 0.0), GSAM(rho=5.0, adaptive=adaptive), problem.net)
        assert not flat(problem.grads()).any()
        assert not flat(problem.offsets()).any()
    sharp_backward(problem.closure(0, float("nan")), GSAM(), problem.net)
    assert flat(problem.grads()).isnan().all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_trainer_it_is_the_plain_loop(accumulate):
    follows_the_loop(GSAM(rho=0.3), accumulate=accumulate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    problem, exact = Problem(dtype=dtype), Problem()
    exact.net.load_state_dict(problem.net.state_dict())
    for each in (problem, exact):
        sharp_backward(each.closure(0), GSAM(rho=0.5), each.net)
    rough, precise = flat(problem.grads()).double(), flat(exact.grads())
    assert problem.grads()["first.weight"].dtype == dtype
    assert (rough - precise).norm() < (0.1 if dtype == torch.bfloat16 else 0.01) * precise.norm()


@pytest.mark.parametrize("name", ["rho", "norm_eps"])
def test_numbers_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0 but got 0"):
        GSAM(**{name: 0.0})


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"Expected `alpha` to be a finite number >= 0 but got -0\.1"):
        GSAM(alpha=-0.1)


@pytest.mark.parametrize("formats", ["cc", "ll", "cl", "tt"])
def test_inner_products_in_any_memory_format(formats):
    def laid_out(tensor, form):
        if form == "t":
            return tensor.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
        return tensor.contiguous(memory_format=torch.channels_last if form == "l" else torch.contiguous_format)

    tensors = [torch.randn(3, 4, 2, 5, dtype=torch.float64) for _ in range(2)]
    first, second = (laid_out(tensor, form) for tensor, form in zip(tensors, formats, strict=True))
    expected = (tensors[0] * tensors[1]).sum() + 6.0
    ones = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(inner_product([first, ones], [second, ones]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inner_products_of_half_precision_are_computed_in_float32(dtype):
    ones = [torch.full((4097,), 0.5, dtype=dtype)]
    product = inner_product(ones, ones)
    assert product.dtype == torch.float32
    assert product == 4097 / 4


def test_a_perpendicular_part_is_taken_off():
    direction = [torch.tensor([2.0, 0.0]), torch.zeros(1)]
    other = [torch.tensor([3.0, 4.0]), torch.full((1,), 8.0)]
    assert subtract_perpendicular(direction, other, 0.5, 1e-12) is direction
    torch.testing.assert_close(direction, [torch.tensor([2.0, -2.0]), torch.tensor([-4.0])])
    torch.testing.assert_close(other, [torch.tensor([3.0, 4.0]), torch.tensor([8.0])])
