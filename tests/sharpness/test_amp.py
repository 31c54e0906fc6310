"""AMP against explicit vectors, tensor by tensor."""

import pytest
import torch
from torch import nn

from lightning_robust.schedules import Piecewise
from lightning_robust.sharpness import AMP, ParameterSelection, sharp_backward
from lightning_robust.sharpness.amp import clip_tensor_norms_
from support.explicit import Problem, plus, same


def stated(problem, index, rho, inner_lr=1.0, inner_iter=1, moved=None):
    """The perturbation and the direction, from Python numbers and one tensor at a time."""
    weights = problem.weights
    radius = rho if callable(rho) else lambda name: rho
    delta = {name: torch.zeros_like(value) for name, value in weights.items() if moved is None or name in moved}
    for _ in range(inner_iter):
        gradient = problem.gradient(plus(weights, delta), index)
        for name, value in delta.items():
            longer = value + inner_lr * gradient[name]
            length = float(longer.square().sum()) ** 0.5
            delta[name] = longer if length <= radius(name) else longer * (radius(name) / length)
    return delta, problem.gradient(plus(weights, delta), index)


@pytest.mark.parametrize(("inner_lr", "inner_iter"), [(1.0, 1), (0.7, 1), (1.0, 3), (0.4, 4)])
def test_direction_is_the_formula(inner_lr, inner_iter):
    problem = Problem()
    rho = 0.3
    delta, expected = stated(problem, 0, rho, inner_lr, inner_iter)
    lengths = [float(value.norm()) for value in delta.values()]
    assert min(lengths) < 0.9 * rho  # one is clipped, another is not
    assert max(lengths) == pytest.approx(rho)
    method = AMP(rho=rho, inner_lr=inner_lr, inner_iter=inner_iter)
    sharp_backward(problem.closure(0), method, problem.net)
    assert len(problem.passes) == 1 + inner_iter == 1 + method.extra_passes
    same(problem.offsets(-1), delta)
    same(problem.grads(), expected)
    assert not method.state_dict()


def test_a_large_radius_is_never_normalised():
    problem = Problem()
    gradient = problem.gradient(problem.weights, 0)
    sharp_backward(problem.closure(0), AMP(rho=1e6), problem.net)
    same(problem.offsets(), gradient)


def test_groups_have_their_own_radius():
    problem = Problem()
    biases = [p for name, p in problem.net.named_parameters() if "bias" in name]
    others = [p for name, p in problem.net.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD([{"params": biases, "rho": 0.0}, {"params": others, "rho": 0.02}], lr=0.1)
    delta, expected = stated(problem, 0, lambda name: 0.0 if "bias" in name else 0.02, inner_iter=2)
    sharp_backward(problem.closure(0), AMP(rho=9.0, inner_iter=2), optimizer, module=problem.net)
    same(problem.offsets(-1), delta)
    same(problem.grads(), expected)


def test_only_chosen_parameters_move():
    problem = Problem()
    delta, expected = stated(problem, 0, 0.03, inner_iter=2, moved={"first.weight", "last.weight"})
    perturb = ParameterSelection(include=["first.weight", "last.weight"])
    sharp_backward(problem.closure(0), AMP(rho=0.03, inner_iter=2), problem.net, perturb=perturb)
    offsets = problem.offsets(-1)
    same({name: offsets[name] for name in delta}, delta)
    assert not any(value.any() for name, value in offsets.items() if name not in delta)
    same(problem.grads(), expected)


def test_the_radius_may_be_a_schedule():
    method = AMP(rho=Piecewise(values={0: 0.01, 5: 0.02}))
    for step, rho in ((4, 0.01), (5, 0.02)):
        problem = Problem()
        sharp_backward(problem.closure(0), method, problem.net, step=step)
        same(problem.offsets(), stated(problem, 0, rho)[0])


def test_part_of_a_batch_may_lead_every_ascent_step():
    problem, other = Problem(), Problem()
    led = other.closure(1)
    weights = problem.weights
    delta, _ = stated(problem, 1, 0.03, inner_iter=3)
    expected = problem.gradient(plus(weights, delta), 0)

    def ascent():
        with torch.no_grad():
            for theirs, ours in zip(other.net.parameters(), problem.net.parameters(), strict=True):
                theirs.copy_(ours)
        led()
        x, y = problem.batches[1]
        return nn.functional.cross_entropy(problem.net(x), y)

    closure = problem.closure(0)
    sharp_backward(closure, AMP(rho=0.03, inner_iter=3), problem.net, ascent_closure=ascent)
    assert (len(other.passes), len(problem.passes)) == (3, 1)
    same(problem.grads(), expected)


def test_zero_gradient_gives_no_perturbation():
    problem = Problem()
    sharp_backward(problem.closure(0, factor=0.0), AMP(inner_iter=2), problem.net)
    assert not any(value.any() for value in problem.offsets(-1).values())
    assert not any(value.any() for value in problem.grads().values())


def test_non_finite_gradients_propagate():
    problem = Problem()
    sharp_backward(problem.closure(0, factor=float("inf")), AMP(), problem.net)
    assert not any(value.isfinite().all() for value in problem.grads().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clipping(dtype):
    tensors = [torch.tensor([[3.0, 4.0]]), torch.tensor([0.3, 0.4]), torch.zeros(2), torch.full((1000,), 60.0)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    clip_tensor_norms_(tensors, [0.5, 0.6, 1.0, 1.0])
    expected = [[[0.3, 0.4]], [0.3, 0.4], [0.0, 0.0], [1000**-0.5] * 1000]
    for tensor, value in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, torch.tensor(value, dtype=dtype))


@pytest.mark.parametrize("name", ["rho", "inner_lr", "norm_eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number > 0"):
        AMP(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_counts_are_refused(value):
    with pytest.raises(ValueError, match="Expected `inner_iter` to be an integer >= 1"):
        AMP(inner_iter=value)
