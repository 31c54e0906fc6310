"""PGD in the l1 norm: the loop written out with SciPy's projection, its budget, and what exactness is good for."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, MIM, PGD
from support.attacked import CLASSES, CountingNet, images

EPS = 3.0


@pytest.fixture
def net():
    return CountingNet().double().eval()


def losses(net, x, y):
    with torch.no_grad():
        return F.cross_entropy(net(x), y, reduction="none")


def projected(x, delta, eps):
    def step(lam):
        return np.clip(np.sign(delta) * np.maximum(np.abs(delta) - lam, 0), -x, 1 - x)

    if np.abs(step(0.0)).sum() <= eps:
        return step(0.0)
    return step(brentq(lambda lam: np.abs(step(lam)).sum() - eps, 0, np.abs(delta).max(), xtol=1e-14))


def written_out(net, x, y, eps, alpha, steps, count):
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
        x_adv = x_adv.detach()
        for i in range(len(x)):
            g, at, clean = (value.flatten().numpy() for value in (gradient[i], x_adv[i], x[i]))
            g = np.where((g > 0) & (at >= 1 - 1e-6) | (g < 0) & (at <= 1e-6), 0, g)
            step = np.zeros_like(g)
            order = np.argsort(-np.abs(g))[:count]
            step[order] = np.sign(g[order]) / count
            x_adv[i] = torch.from_numpy(clean + projected(clean, at - clean + alpha * step, eps)).view_as(x[i])
    return x_adv


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.05, 5), (0.3, 32)])
def test_same_as_the_loop_written_out(net, fraction, count):
    x, y = images(dtype=torch.float64)
    attack = PGD(eps=EPS, norm="l1", steps=6, step_size=1.0, random_start=False, top_fraction=fraction)
    torch.testing.assert_close(attack(net, x, y), written_out(net, x, y, EPS, 1.0, 6, count), rtol=0, atol=1e-7)


@pytest.mark.parametrize("random_start", [True, False, "uniform", "radial", "normal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("normalised", [False, True])
def test_stays_in_the_budget_and_raises_the_loss(random_start, dtype, normalised):
    net = CountingNet().to(dtype).eval()
    pixels, y = images(dtype=torch.float64)
    mean, std = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]) if normalised else (None, None)
    scale = torch.tensor(std or [1.0] * 3, dtype=torch.float64).view(3, 1, 1)
    x = ((pixels - torch.tensor(mean or [0.0] * 3, dtype=torch.float64).view(3, 1, 1)) / scale).to(dtype)
    attack = PGD(eps=EPS, norm="l1", steps=8, random_start=random_start, mean=mean, std=std)
    x_adv = attack(net, x, y)
    size = ((x_adv.double() - x.double()) * scale).abs().flatten(1).sum(1)
    rounding = 4 * torch.finfo(dtype).eps * x[0].numel()
    assert bool((size <= EPS * (1 + 1e-6) + (0 if dtype == torch.float64 else rounding)).all())
    assert bool((size > 0.9 * EPS).all())
    assert bool((losses(net, x_adv, y) > losses(net, x, y)).all())


def test_steps_at_a_bound_are_not_wasted(net):
    # the steepest entry of each image is at its bound after a step; the attack must turn to the others
    x, y = images(dtype=torch.float64)
    x_adv = PGD(eps=EPS, norm="l1", steps=30, random_start=False, top_fraction=0)(net, x, y)
    moved = ((x_adv - x).abs() > 1e-9).flatten(1).sum(1)
    assert bool((moved >= 3).all())
    assert bool(((x_adv - x).abs().flatten(1).sum(1) > 0.99 * EPS).all())


def test_budget_of_a_scaled_sample(net):
    x, y = images(dtype=torch.float64)
    scale = torch.linspace(0, 2, len(x), dtype=torch.float64)
    x_adv = PGD(eps=EPS, norm="l1", steps=10)(net, x, y, scale=scale)
    torch.testing.assert_close((x_adv - x).abs().flatten(1).sum(1), EPS * scale, rtol=1e-3, atol=1e-9)


def test_same_alone_as_in_a_batch(net):
    x, y = images(dtype=torch.float64)
    attack = PGD(eps=EPS, norm="l1", steps=4, restarts=2, early_stop=True)
    together = attack(net, x, y, indices=torch.arange(len(x)))
    alone = torch.cat([attack(net, x[i : i + 1], y[i : i + 1], indices=torch.tensor([i])) for i in range(len(x))])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attack", [FGSM(eps=EPS, norm="l1"), MIM(eps=EPS, norm="l1")], ids=repr)
def test_kin_attack_in_l1_too(net, attack):
    x, y = images(dtype=torch.float64)
    x_adv = attack(net, x, y)
    assert bool(((x_adv - x).abs().flatten(1).sum(1) <= EPS * (1 + 1e-6)).all())
    assert bool((losses(net, x_adv, y) > losses(net, x, y)).all())


def test_other_bounds_and_one_pixel_per_image():
    net = torch.nn.Linear(1, CLASSES).double()
    x, y = torch.full((5, 1), 100.0, dtype=torch.float64), torch.arange(5) % CLASSES
    x_adv = PGD(eps=200.0, norm="l1", steps=5, bounds=(0.0, 255.0))(net, x, y)
    assert bool(((x_adv >= 0) & (x_adv <= 255)).all())


def test_refuses_a_fraction_out_of_range():
    with pytest.raises(ValueError, match=r"Expected `top_fraction` to be in \[0, 1\] but got 2"):
        PGD(top_fraction=2)
