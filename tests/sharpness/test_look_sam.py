"""LookSAM against explicit vectors over several intervals, batches that add up, and what it remembers."""

import pytest
import torch

from lightning_robust.schedules import Piecewise
from lightning_robust.sharpness import SAM, LookSAM, ParameterSelection, sharp_backward
from lightning_robust.sharpness.look_sam import orthogonal_part_
from support.explicit import Problem, check_continued, identical, norm, plus, same, through_file


def parts(vectors, per_tensor):
    """What counts as one vector: each tensor, or all of them."""
    return [{name: value} for name, value in vectors.items()] if per_tensor else [vectors]


def orthogonal(gradient, ascended, per_tensor):
    """By the cosine, as it is written."""
    found = {}
    for part in parts(gradient, per_tensor):
        inner = sum(float((value * ascended[name]).sum()) for name, value in part.items())
        length, reach = norm(part), norm({name: ascended[name] for name in part})
        cosine = inner / (length * reach)
        found |= {name: ascended[name] - reach * cosine * value / length for name, value in part.items()}
    return found


def reused(gradient, flat, alpha, per_tensor):
    found = {}
    for part in parts(gradient, per_tensor):
        factor = alpha * norm(part) / (norm({name: flat[name] for name in part}) + 1e-8)
        found |= {name: value + factor * flat[name] for name, value in part.items()}
    return found


def ascend(problem, index, rho, per_tensor=True):
    """The ascended gradient of a batch and its orthogonal part."""
    gradient = problem.gradient(problem.weights, index)
    ascended = problem.gradient(plus(problem.weights, gradient, rho / norm(gradient)), index)
    return ascended, orthogonal(gradient, ascended, per_tensor)


def mean(*many):
    return {name: sum(each[name] for each in many) / len(many) for name in many[0]}


def memory(method):
    return {key.removeprefix("flat/"): value for key, value in method.state_dict().items()}


@pytest.mark.parametrize("per_tensor", [True, False])
def test_steps_are_the_formula(per_tensor):
    problem = Problem()
    method = LookSAM(rho=0.2, interval=5, alpha=0.7, per_tensor=per_tensor)
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1, momentum=0.9)
    for step in range(len(problem.batches)):
        if step % 5 == 0:
            expected, flat = ascend(problem, step, 0.2, per_tensor)
        else:
            expected = reused(problem.gradient(problem.weights, step), flat, 0.7, per_tensor)
        optimizer.zero_grad()
        sharp_backward(problem.closure(step), method, optimizer, module=problem.net, step=step)
        assert len(problem.passes) == (2 if step % 5 == 0 else 1)
        same(problem.grads(), expected, atol=1e-12)
        same(memory(method), flat, atol=1e-12)
        optimizer.step()


def test_the_orthogonal_part():
    first, second = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    others = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    found = orthogonal_part_([first.clone(), second.clone()], others)
    for gradient, ascended, part in zip((first, second), others, found, strict=True):
        assert abs(float((gradient * part).sum())) < 1e-13
        along = (ascended - part) / gradient
        torch.testing.assert_close(along, along.flatten()[0].expand_as(along))
    whole = orthogonal_part_([first.clone(), second.clone()], others, per_tensor=False)
    inner = [float((gradient * part).sum()) for gradient, part in zip((first, second), whole, strict=True)]
    assert abs(sum(inner)) < 1e-13 < abs(inner[0])


def test_where_the_gradient_is_zero_everything_is_orthogonal():
    others = [torch.ones(2), torch.full((3,), 2.0)]
    for per_tensor in (True, False):
        found = orthogonal_part_([torch.zeros(2), torch.zeros(3)], others, per_tensor=per_tensor)
        assert all(torch.equal(part, other) for part, other in zip(found, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_summed_in_float32(dtype):
    gradient, ascended = torch.full((4096,), 7.0), torch.full((4096,), 5.0)
    (part,) = orthogonal_part_([gradient.to(dtype)], [ascended.to(dtype)])
    assert part.dtype == dtype
    assert part.abs().max() < 0.05  # float16 would overflow, bfloat16 stop adding


def test_an_interval_of_one_is_sam():
    method = LookSAM(rho=0.1, interval=1)
    for step in range(3):
        ours, theirs = Problem(), Problem()
        sharp_backward(ours.closure(step), method, ours.net, step=step)
        sharp_backward(theirs.closure(step), SAM(rho=0.1), theirs.net)
        assert identical(ours.grads(), theirs.grads())


def test_without_alpha_the_other_steps_are_plain():
    problem = Problem()
    method = LookSAM(alpha=0.0, interval=2)
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    problem.net.zero_grad()
    sharp_backward(problem.closure(1), method, problem.net, step=1)
    same(problem.grads(), problem.gradient(problem.weights, 1))


def test_batches_that_add_up_give_their_mean():
    problem = Problem()
    method = LookSAM(rho=0.2, interval=3)
    found = [ascend(problem, index, 0.2) for index in range(3)]
    for index in range(3):
        sharp_backward(problem.closure(index), method, problem.net, step=0, accumulate=3)
    same(problem.grads(), mean(*[ascended for ascended, _ in found]))
    flat = mean(*[part for _, part in found])
    same(memory(method), flat, atol=1e-12)
    problem.net.zero_grad()
    for index in (3, 4):
        sharp_backward(problem.closure(index), method, problem.net, step=1, accumulate=2)
    plain = [reused(problem.gradient(problem.weights, index), flat, 0.7, True) for index in (3, 4)]
    same(problem.grads(), mean(*plain), atol=1e-12)
    sharp_backward(problem.closure(5), method, problem.net, step=3)  # the next interval begins anew
    same(memory(method), ascend(problem, 5, 0.2)[1], atol=1e-12)


def test_training_that_begins_between_two_ascents_begins_with_one():
    problem = Problem()
    method = LookSAM(interval=5)
    passes = []
    for step, index in ((3, 0), (3, 1), (4, 2), (4, 3), (5, 4), (5, 5), (6, 6)):  # two batches a step
        sharp_backward(problem.closure(index), method, problem.net, step=step)
        passes.append(len(problem.passes))
    assert passes == [2, 2, 1, 1, 2, 2, 1]


def test_a_weight_that_joins_later_is_plain_until_the_next_ascent():
    problem = Problem()
    method = LookSAM(interval=2, rho=0.2)
    problem.net.last.requires_grad_(False)
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    problem.net.last.requires_grad_(True)
    gradient = problem.gradient(problem.weights, 1)
    problem.net.zero_grad()
    sharp_backward(problem.closure(1), method, problem.net, step=1)
    assert len(problem.passes) == 1
    for name, value in problem.grads().items():
        assert torch.equal(value, gradient[name]) == ("last" in name)
    sharp_backward(problem.closure(2), method, problem.net, step=2)
    same(memory(method), ascend(problem, 2, 0.2)[1], atol=1e-12)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_what_is_not_finite_is_not_remembered(per_tensor):
    problem = Problem()
    method = LookSAM(interval=2, per_tensor=per_tensor)
    sharp_backward(problem.closure(0, float("inf")), method, problem.net, step=0)
    assert not any(value.isfinite().all() for value in problem.grads().values())  # but it is delivered
    problem.net.zero_grad()
    sharp_backward(problem.closure(1), method, problem.net, step=1)
    assert len(problem.passes) == 1
    same(problem.grads(), problem.gradient(problem.weights, 1))
    sharp_backward(problem.closure(2), method, problem.net, step=2)
    known = {name: value.clone() for name, value in memory(method).items()}
    sharp_backward(problem.closure(3, float("nan")), method, problem.net, step=4)
    assert identical(memory(method), known)


def test_zero_gradient_gives_zero():
    problem = Problem()
    method = LookSAM(interval=2)
    for step in (0, 1):
        sharp_backward(problem.closure(step, 0.0), method, problem.net, step=step)
        assert identical(problem.passes[0], problem.passes[-1])
        assert not any(value.any() for value in problem.grads().values())


def test_groups_and_schedules_have_their_radius():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD([{"params": biases, "rho": 0.0}, {"params": others}], lr=0.1)
    gradient = problem.gradient(problem.weights, 0)
    method = LookSAM(rho=Piecewise(values={0: 0.1, 10: 0.3}))
    for step, rho in ((0, 0.1), (10, 0.3)):
        sharp_backward(problem.closure(0), method, optimizer, module=problem.net, step=step)
        expected = {n: g * (0.0 if "bias" in n else rho) / norm(gradient) for n, g in gradient.items()}
        same(problem.offsets(), expected)


def test_weights_that_stay_in_place_have_an_orthogonal_part_too():
    problem = Problem()
    method, perturb = LookSAM(rho=0.5, interval=2), ParameterSelection(include="weight", exclude="norm")
    gradient = problem.gradient(problem.weights, 0)
    steep = {name: value for name, value in gradient.items() if "weight" in name and "norm" not in name}
    ascended = problem.gradient(plus(problem.weights, steep, 0.5 / norm(steep)), 0)
    sharp_backward(problem.closure(0), method, problem.net, step=0, perturb=perturb)
    same(problem.grads(), ascended)
    same(memory(method), orthogonal(gradient, ascended, True), atol=1e-12)
    assert memory(method)["last.bias"].any()


def test_it_needs_to_know_the_step():
    problem = Problem()
    with pytest.raises(ValueError, match=r"LookSAM needs to know the step.*pass step="):
        sharp_backward(problem.closure(0), LookSAM(), problem.net)


def test_the_memory_survives_a_checkpoint():
    check_continued(lambda: LookSAM(interval=4, rho=0.3), first=2, steps=7)


def test_going_back_to_a_checkpoint_forgets_the_batches_since():
    problem = Problem()
    method = LookSAM(interval=4)
    sharp_backward(problem.closure(0), method, problem.net, step=0)
    state = through_file(method.state_dict())
    sharp_backward(problem.closure(1), method, problem.net, step=4)
    method.load_state_dict(state)
    sharp_backward(problem.closure(2), method, problem.net, step=4)
    same(memory(method), ascend(problem, 2, 0.1)[1], atol=1e-12)
    method.reset()
    assert not method.state_dict()


def test_its_cost_and_name():
    assert LookSAM(interval=4).extra_passes == 0.25
    method = LookSAM()
    assert repr(method) == "LookSAM(rho=0.1, interval=10, alpha=0.7, per_tensor=True, norm_eps=1e-12)"


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="Expected `rho` to be a finite number > 0 but got 0"):
        LookSAM(rho=0)
    with pytest.raises(ValueError, match="Expected `interval` to be an integer >= 1 but got 0"):
        LookSAM(interval=0)
    with pytest.raises(ValueError, match=r"Expected `alpha` to be a finite number >= 0 but got -0\.1"):
        LookSAM(alpha=-0.1)
    with pytest.raises(ValueError, match="Expected `norm_eps` to be a finite number > 0 but got 0"):
        LookSAM(norm_eps=0)


def test_sparse_gradients_are_refused():
    net = torch.nn.Embedding(4, 2, sparse=True)
    with pytest.raises(
        ValueError, match=r"LookSAM needs dense gradients, but that of 'weight' is sparse; use Embedding"
    ):
        sharp_backward(lambda: net(torch.tensor([1])).sum(), LookSAM(), net, step=0)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_rounding_is_not_remembered(per_tensor):
    """One entry per tensor: everything is parallel, and what floating point leaves of it must not be scaled up."""
    gradient, ascended = [torch.tensor([0.3]), torch.tensor([0.7])], [torch.tensor([0.9]), torch.tensor([2.1])]
    parts = orthogonal_part_(gradient, ascended, per_tensor=per_tensor)
    assert all(torch.equal(part, torch.zeros(1)) for part in parts)
