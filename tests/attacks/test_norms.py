"""Norms against NumPy, definitions and distributions."""

import pytest
import torch

from lightning_robust.attacks import L1, L2, InputSpace, Linf
from lightning_robust.attacks.draws import GeneratorDraws
from lightning_robust.attacks.norms import NORMS

SHAPE = (5, 3, 4, 4)


def draws():
    return GeneratorDraws(generator())


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("norm", "order"), [(Linf(), float("inf")), (L2(), 2), (L1(), 1)])
def test_size_is_the_vector_norm(norm, order):
    delta = torch.randn(SHAPE, dtype=torch.float64)
    expected = torch.stack([torch.linalg.vector_norm(each, order) for each in delta])
    torch.testing.assert_close(norm.size(delta), expected)


@pytest.mark.parametrize("norm", [Linf(), L2(), L1(fraction=0)], ids=repr)
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
    eps = float(size.median()) * (1 + 1e-6)
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
    radius = norm.size(norm.uniform(like, eps, draws())) / eps
    # P(radius <= r) = r^d in any norm, so r^d is uniform
    assert bool((radius <= 1).all())
    levels = radius.pow(d)
    assert abs(float(levels.mean()) - 0.5) < 0.01
    assert abs(float(levels.var()) - 1 / 12) < 0.005


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_radial_start_has_a_uniform_radius(norm):
    radius = norm.size(norm.radial(torch.zeros(20000, 2, 2, dtype=torch.float64), 0.5, draws())) / 0.5
    assert bool((radius <= 1).all())
    assert abs(float(radius.mean()) - 0.5) < 0.01
    assert abs(float(radius.var()) - 1 / 12) < 0.005


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("draw", ["uniform", "radial"])
def test_draws_come_from_the_generator_alone(norm, draw):
    like = torch.zeros(SHAPE)
    before = torch.get_rng_state()
    first, again = (getattr(norm, draw)(like, 0.1, draws()) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert bool((getattr(norm, draw)(like, 0.0, draws()) == 0).all())


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_l2_direction_of_very_small_and_large_gradients_has_length_one(scale):
    gradient = scale * torch.randn(SHAPE, generator=generator())
    length = NORMS["l2"].size(NORMS["l2"].direction(gradient))
    torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("fraction", "moved"), [(0.0, 1), (0.1, 5), (0.5, 24), (1.0, 48)])
def test_l1_direction_moves_the_largest_entries_alike(fraction, moved):
    gradient = torch.randn(SHAPE, generator=generator(), dtype=torch.float64)
    for step, g in zip(L1(fraction).direction(gradient), gradient, strict=True):
        order = g.abs().flatten().argsort(descending=True)
        expected = torch.zeros(48, dtype=torch.float64)
        expected[order[:moved]] = g.flatten()[order[:moved]].sign() / moved
        torch.testing.assert_close(step.flatten(), expected)


def test_l1_direction_leaves_zeros_out_of_the_number_of_moved_entries():
    gradient = torch.tensor([[0.0, 2.0, 0.0, -3.0]])
    torch.testing.assert_close(L1(1.0).direction(gradient), torch.tensor([[0.0, 0.5, 0.0, -0.5]]))


@pytest.mark.parametrize("normalised", [False, True])
def test_l1_moves_only_what_can_move(normalised):
    space = InputSpace(mean=[0.4], std=[0.2]) if normalised else InputSpace()
    pixels = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).view(1, 1, 2, 2)
    x = (pixels - 0.4) / 0.2 if normalised else pixels
    gradient = torch.tensor([[4.0, -3.0, -2.0, 1.0]]).view(1, 1, 2, 2)
    step = L1(0.25).direction_on_images(x, gradient, space)
    torch.testing.assert_close(step.flatten(), torch.tensor([0.0, 0.0, -1.0, 0.0]))
    assert torch.equal(Linf().direction_on_images(x, gradient, space), gradient.sign())


def test_l1_uniform_entries_have_the_moments_of_the_ball():
    # the entries of a uniform point of the ball in d dimensions have E|x| = 1 / (d + 1), E x^2 = 2 / ((d + 1)(d + 2))
    drawn = L1().uniform(torch.zeros(40000, 3, dtype=torch.float64), 1.0, draws())
    torch.testing.assert_close(drawn.abs().mean(0), torch.full((3,), 1 / 4, dtype=torch.float64), rtol=0, atol=0.005)
    torch.testing.assert_close(drawn.pow(2).mean(0), torch.full((3,), 1 / 10, dtype=torch.float64), rtol=0, atol=0.004)
    assert abs(float((drawn > 0).double().mean()) - 0.5) < 0.01


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_l1_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=rf"Expected `fraction` to be in \[0, 1\] but got {fraction}"):
        L1(fraction)


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_a_radius_per_sample_is_that_of_each_sample(norm):
    delta = torch.randn(SHAPE, generator=generator(), dtype=torch.float64)
    eps = torch.tensor([0.0, 0.1, 0.5, 2.0, 100.0], dtype=torch.float64)
    together = norm.project(delta, eps)
    for row in range(len(delta)):
        alone = norm.project(delta[row : row + 1], float(eps[row]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-12)
