"""Points of a budget in every precision."""

import pytest
import torch

from lightning_robust.attacks.region import add_inwards, region
from lightning_robust.attacks.space import InputSpace

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NORMALISED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def pair(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(64, 3, 8, 8, generator=generator, dtype=torch.float64)
    x[:8] = x[:8].round()
    x[8:12] *= 1e-4
    step = scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype).to(working), step.to(working)


def sizes(delta, norm):
    flat = delta.double().flatten(1)
    return {"linf": flat.abs().amax(1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(1)}[norm]


@pytest.mark.parametrize("scale", [1.0, 0.03, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_never_adds_distance(dtype, scale):
    x, step = pair(dtype, scale)
    moved = add_inwards(x, step, dtype, InputSpace())
    assert moved.dtype == x.dtype
    assert torch.equal(moved.to(dtype).to(x.dtype), moved)
    assert bool(((moved.double() - x.double()).abs() <= step.double().abs() * (1 + 1e-6)).all())
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    exact = (x.double() + step.double()).clamp(0, 1)
    # at most two numbers away, and at zero a whole step of the numbers below one
    spacing = torch.finfo(dtype).eps * torch.maximum(moved.double().abs(), exact.abs())
    assert bool(((moved.double() - exact).abs() <= 2 * spacing + torch.finfo(dtype).eps * 1e-3).all())


def test_no_step_no_change():
    x, _ = pair(torch.float32)
    assert torch.equal(add_inwards(x, torch.zeros_like(x), torch.float32, InputSpace()), x)


def test_images_out_of_bounds_by_a_rounding_error_come_back():
    x = torch.tensor([[1 + 5e-7, -5e-7]])
    assert torch.equal(add_inwards(x, torch.zeros_like(x), torch.float32, InputSpace()), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("arguments", [{}, NORMALISED], ids=["pixels", "normalised"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("linf", 1e-3), ("l2", 0.5), ("l1", 3.0), ("l1", 1e-3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projected_points_are_in_the_budget_and_stay(dtype, norm, eps, arguments):
    space = InputSpace(**arguments)
    pixels, step = pair(dtype)
    std = torch.tensor(arguments.get("std", [1.0] * 3), dtype=torch.float64).view(1, 3, 1, 1)
    mean = torch.tensor(arguments.get("mean", [0.0] * 3), dtype=torch.float64).view(1, 3, 1, 1)
    x = ((pixels.double() - mean) / std).to(dtype).to(pixels.dtype)
    around = region(norm, x, eps, space, dtype)
    moved = around.project(x + step)
    assert bool((sizes((moved.to(dtype).double() - x.double()) * std, norm) <= eps * (1 + 1e-6)).all())
    outside = ((x.double() * std + mean) - 0.5).abs().amax() - 0.5
    assert float(((moved.to(dtype).double() * std + mean) - 0.5).abs().amax() - 0.5) <= float(outside) + 1e-6
    assert float(sizes((moved - x).double() * std, norm).max()) > (0.3 * eps if dtype.itemsize > 2 else 0)
    torch.testing.assert_close(around.project(moved), moved, rtol=0, atol=8 * torch.finfo(dtype).eps)

    rows = torch.tensor([5, 2, 40])
    around.keep(rows)
    assert torch.equal(around.project((x + step)[rows]), moved[rows])


def test_linf_is_the_clipped_box():
    x, step = pair(torch.float64, 0.2)
    expected = (x + step.clamp(-0.1, 0.1)).clamp(0, 1)
    moved = region("linf", x, 0.1, InputSpace(), torch.float64).project(x + step)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-15)
