"""Projections against linear programs, bisection in float64, and the definition of a projection."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_robust.attacks.projections import (
    project_hyperplane_l1,
    project_hyperplane_l2,
    project_hyperplane_linf,
    project_l1_box,
)

HYPERPLANES = {"linf": project_hyperplane_linf, "l2": project_hyperplane_l2, "l1": project_hyperplane_l1}
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
SEEDS = st.integers(0, 10**6)
SIZES = st.integers(1, 12)


def points(seed, entries, dtype=torch.float64, rows=4):
    """Images of which some entries lie on a bound."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, entries, generator=generator, dtype=torch.float64)
    x[torch.rand(x.shape, generator=generator) < 0.2] = 0.0
    x[torch.rand(x.shape, generator=generator) < 0.2] = 1.0
    return x.to(dtype), generator


def normal(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def bisect(function, low, high):
    """Where each row's falling function crosses zero."""
    for _ in range(200):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high


def l1_by_bisection(x, delta, eps):
    """The minimiser as its optimality conditions state it: clip(shrink(delta, lam)), lam bisected."""

    def step(lam):
        return (delta.sign() * (delta.abs() - lam[:, None]).clamp(min=0)).clamp(-x, 1 - x)

    lam = bisect(lambda lam: step(lam).abs().sum(1) - eps, torch.zeros_like(delta[:, 0]), delta.abs().amax(1))
    inside = delta.clamp(-x, 1 - x)
    return torch.where((inside.abs().sum(1) <= eps)[:, None], inside, step(lam))


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, st.floats(0, 4), st.floats(0.01, 3))
def test_l1_box_is_the_bisected_minimiser(seed, entries, eps, spread):
    x, generator = points(seed, entries)
    delta = spread * normal(x.shape, generator)
    torch.testing.assert_close(
        project_l1_box(x, delta, eps), l1_by_bisection(x, delta, eps), rtol=1e-9, atol=1e-12, check_dtype=True
    )


@settings(max_examples=40, deadline=None)
@given(SEEDS, SIZES, st.floats(0, 3))
def test_no_feasible_point_is_nearer_than_the_l1_box_projection(seed, entries, eps):
    x, generator = points(seed, entries)
    delta = normal(x.shape, generator)
    projected = project_l1_box(x, delta, eps)
    for _ in range(20):
        other = normal(x.shape, generator).clamp(-x, 1 - x)
        other = other * (eps / other.abs().sum(1, keepdim=True).clamp(min=eps + 1e-300)).clamp(max=1)
        # the obtuse angle at a projection, which implies that nothing feasible is nearer
        assert bool((((delta - projected) * (other - projected)).sum(1) <= 1e-12).all())


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.sampled_from([1, 7, 300]),
    st.floats(0, 20),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_l1_box_is_within_the_budget_and_the_box_in_every_type(seed, entries, eps, spread, dtype):
    x, generator = points(seed, entries, dtype)
    delta = (spread * normal(x.shape, generator)).to(dtype)
    projected = project_l1_box(x, delta, eps)
    assert projected.dtype == dtype
    assert bool((projected.double().abs().sum(1) <= eps).all())
    moved = x.double() + projected.double()
    slack = torch.finfo(torch.float32).eps if dtype != torch.float64 else torch.finfo(dtype).eps
    assert bool((moved >= -slack).all() and (moved <= 1 + slack).all())


def test_l1_box_is_idempotent_and_keeps_the_inside():
    x, generator = points(3, 50, torch.float32)
    delta = normal(x.shape, generator, torch.float32)
    once = project_l1_box(x, delta, 5.0)
    assert torch.equal(project_l1_box(x, once, 5.0), once)
    small = (0.01 * delta).clamp(-x, 1 - x)
    assert torch.equal(project_l1_box(x, small, 5.0), small)


def test_l1_box_takes_a_budget_and_bounds_per_sample():
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    delta = torch.tensor([[0.4, -0.2], [0.4, -0.2], [3.0, -0.2]])
    projected = project_l1_box(x, delta, torch.tensor([0.0, 0.3, math.inf]))
    torch.testing.assert_close(projected, torch.tensor([[0.0, 0.0], [0.25, -0.05], [0.5, -0.2]]))
    low, high = torch.tensor([0.0, 0.4]), torch.tensor([[0.6, 1.0], [1.0, 1.0], [2.0, 1.0]])
    projected = project_l1_box(x, delta, 5.0, low, high)
    torch.testing.assert_close(projected, torch.tensor([[0.1, -0.1], [0.4, -0.1], [1.5, -0.1]]))


def test_l1_box_of_images_outside_the_bounds_and_of_no_images():
    assert torch.equal(project_l1_box(torch.tensor([[1.2]]), torch.tensor([[0.3]]), 1.0), torch.zeros(1, 1))
    assert project_l1_box(torch.zeros(0, 3, 2), torch.zeros(0, 3, 2), 1.0).shape == (0, 3, 2)
    assert project_l1_box(torch.zeros(2, 3, 2), torch.ones(2, 3, 2), 1.0).shape == (2, 3, 2)


def reachable(x, w, generator):
    """Offsets of planes through a random point of the box."""
    return (w * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum(1)


def step_of(name, x, w, b):
    """The optimal step: bisected for linf and l2, a linear program's greedy solution for l1."""
    gap = (w * x).sum(1) - b
    direction = -w.sign() * torch.where(gap >= 0, 1.0, -1.0)[:, None]
    room = torch.where(direction > 0, 1 - x, x)
    if name == "l1":
        step = torch.zeros_like(x)
        for row in range(len(x)):
            left = float(gap[row].abs())
            for entry in w[row].abs().argsort(descending=True).tolist():
                weight = float(w[row, entry].abs())
                if weight > 0:
                    step[row, entry] = min(float(room[row, entry]), left / weight)
                    left = max(left - weight * float(step[row, entry]), 0.0)
        return direction * step
    rate = torch.ones_like(w) if name == "linf" else w.abs()

    def length(lam):
        return torch.minimum(rate * lam[:, None], room)

    lam = bisect(lambda lam: gap.abs() - (w.abs() * length(lam)).sum(1), torch.zeros_like(b), torch.full_like(b, 1e6))
    return direction * length(lam)


@pytest.mark.parametrize("name", HYPERPLANES)
@settings(max_examples=50, deadline=None)
@given(SEEDS, SIZES)
def test_hyperplane_step_is_the_optimum_within_the_box(name, seed, entries):
    x, generator = points(seed, entries)
    w = normal(x.shape, generator)
    w[torch.rand(x.shape, generator=generator) < 0.2] = 0.0
    b = reachable(x, w, generator)
    step = HYPERPLANES[name](x, w, b)
    torch.testing.assert_close((w * (x + step)).sum(1), b, rtol=1e-9, atol=1e-12)
    assert bool((x + step >= -1e-12).all() and (x + step <= 1 + 1e-12).all())
    torch.testing.assert_close(step, step_of(name, x, w, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", HYPERPLANES)
@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 12))
def test_no_point_of_the_plane_within_the_box_is_nearer(name, seed, entries):
    x, generator = points(seed, entries)
    w = normal(x.shape, generator)
    b = reachable(x, w, generator)
    size = torch.linalg.vector_norm(HYPERPLANES[name](x, w, b), ORDERS[name], dim=1)
    for _ in range(10):
        # a feasible point: another norm's projection of a random point of the box
        start = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        other = start + project_hyperplane_l2(start, w, b)
        assert bool((size <= torch.linalg.vector_norm(other - x, ORDERS[name], dim=1) + 1e-9).all())


@pytest.mark.parametrize("name", HYPERPLANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_an_unreachable_plane_leads_to_the_nearest_corner(name, dtype, offset):
    x, generator = points(5, 20, dtype)
    w = normal(x.shape, generator, dtype)
    w[:, 0] = 0.0
    corner = ((w > 0) == (offset > 0)).to(dtype)
    corner[:, 0] = x[:, 0]
    torch.testing.assert_close(x + HYPERPLANES[name](x, w, torch.full((4,), offset, dtype=dtype)), corner)


@pytest.mark.parametrize("name", HYPERPLANES)
def test_points_on_the_plane_stay_and_so_do_those_without_a_direction(name):
    x = torch.tensor([[0.25, 0.5], [0.25, 0.5], [0.25, 0.5]])
    w = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    step = HYPERPLANES[name](x, w, torch.tensor([1.25, 0.0, 7.0]))
    assert torch.equal(step, torch.zeros(3, 2))


@pytest.mark.parametrize("name", HYPERPLANES)
@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_scale_of_the_equation_does_not_matter(name, scale):
    x, generator = points(6, 30, torch.float32)
    w = normal(x.shape, generator, torch.float32)
    b = reachable(x, w, generator)
    step = HYPERPLANES[name](x, w, b)
    torch.testing.assert_close(HYPERPLANES[name](x, scale * w, scale * b), step, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", HYPERPLANES)
def test_widely_spread_weights_end_exactly(name):
    # the order in which entries reach their bounds is as long as it can be
    x = torch.zeros(1, 40, dtype=torch.float64)
    w = 2.0 ** -torch.arange(40, dtype=torch.float64)[None]
    high = 2.0 ** -torch.arange(39, -1, -1, dtype=torch.float64)[None]
    b = 0.99 * (w * high).sum(1)
    step = HYPERPLANES[name](x, w, b, 0.0, high)
    torch.testing.assert_close((w * step).sum(1), b, rtol=1e-12, atol=0)
    assert bool((step >= 0).all() and (step <= high).all())


@pytest.mark.parametrize("name", HYPERPLANES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shape_and_type_are_those_of_the_points(name, dtype):
    x = torch.rand(3, 2, 4, 4).to(dtype)
    step = HYPERPLANES[name](x, torch.randn(3, 2, 4, 4).to(dtype), torch.zeros(3, dtype=dtype))
    assert (step.shape, step.dtype) == (x.shape, dtype)
    assert HYPERPLANES[name](x[:0], x[:0], torch.zeros(0, dtype=dtype)).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("name", HYPERPLANES)
def test_many_entries_of_equal_weight_do_not_make_a_sample_depend_on_its_batch(name):
    x, generator = points(7, 300, torch.float32, rows=6)
    w = normal(x.shape, generator, torch.float32).round()
    # from planes close by to planes that need most of the entries
    b = torch.lerp((w * x).sum(1), (w * (w > 0)).sum(1), torch.tensor([0.0, 0.01, 0.1, 0.5, 0.9, 1.5]))
    together = HYPERPLANES[name](x, w, b)
    for row in range(6):
        alone = HYPERPLANES[name](x[row : row + 1], w[row : row + 1], b[row : row + 1])
        assert torch.equal(alone[0], together[row])
    torch.testing.assert_close((w * (x + together)).sum(1)[:5], b[:5], rtol=1e-5, atol=1e-4)
