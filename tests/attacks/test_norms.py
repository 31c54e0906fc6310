"""Norms against NumPy, definitions and distributions."""

import pytest
import torch

from lightning_robust.attacks import L2, Linf
from lightning_robust.attacks.norms import NORMS

SHAPE = (5, 3, 4, 4)


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("norm", "order"), [(Linf(), float("inf")), (L2(), 2)])
def test_size_is_the_vector_norm(norm, order):
    delta = torch.randn(SHAPE, dtype=torch.float64)
    expected = torch.stack([torch.linalg.vector_norm(each, order) for each in delta])
    torch.testing.assert_close(norm.size(delta), expected)


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_direction_is_the_steepest_of_all_unit_steps(norm):
    gradient = torch.randn(SHAPE, dtype=torch.float64)
    step = norm.direction(gradient)
    torch.testing.assert_close(norm.size(step), torch.ones(5, dtype=torch.float64))
    gain = (step * gradient).flatten(1).sum(1)
    for _ in range(50):
        other = torch.randn(SHAPE, dtype=torch.float64)
        other = other / norm.size(other).view(-1, 1, 1, 1)
        assert bool((gain >= (other * gradient).flatten(1).sum(1)).all())


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_direction_of_a_vanishing_gradient_is_finite(norm, scale):
    step = norm.direction(torch.full(SHAPE, scale))
    assert bool(step.isfinite().all())
    if scale == 0:
        assert bool((step == 0).all())


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_projection_keeps_the_inside_and_reaches_the_surface(norm):
    delta = torch.randn(SHAPE)
    size = norm.size(delta)
    eps = float(size.median())
    projected = norm.project(delta, eps)
    inside = size <= eps
    assert torch.equal(projected[inside], delta[inside])
    torch.testing.assert_close(
        norm.size(projected)[~inside], torch.full((int((~inside).sum()),), eps), rtol=1e-5, atol=0
    )
    assert bool((norm.size(projected) <= eps * (1 + 1e-6)).all())
    assert bool((norm.project(delta, 0.0) == 0).all())


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_uniform_start_has_the_moments_of_the_ball(norm):
    count, d, eps = 20000, 4, 0.5
    like = torch.zeros(count, 2, 2, dtype=torch.float64)
    radius = norm.size(norm.uniform(like, eps, generator())) / eps
    # P(radius <= r) = r^d in any norm, so r^d is uniform
    assert bool((radius <= 1).all())
    levels = radius.pow(d)
    assert abs(float(levels.mean()) - 0.5) < 0.01
    assert abs(float(levels.var()) - 1 / 12) < 0.005


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_radial_start_has_a_uniform_radius(norm):
    radius = norm.size(norm.radial(torch.zeros(20000, 2, 2, dtype=torch.float64), 0.5, generator())) / 0.5
    assert bool((radius <= 1).all())
    assert abs(float(radius.mean()) - 0.5) < 0.01
    assert abs(float(radius.var()) - 1 / 12) < 0.005


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("draw", ["uniform", "radial"])
def test_draws_come_from_the_generator_alone(norm, draw):
    like = torch.zeros(SHAPE)
    before = torch.get_rng_state()
    first, again = (getattr(norm, draw)(like, 0.1, generator()) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert bool((getattr(norm, draw)(like, 0.0, generator()) == 0).all())


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_l2_direction_of_very_small_and_large_gradients_has_length_one(scale):
    gradient = scale * torch.randn(SHAPE, generator=generator())
    length = NORMS["l2"].size(NORMS["l2"].direction(gradient))
    torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-3, atol=0)
