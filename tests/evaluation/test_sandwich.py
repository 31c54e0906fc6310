"""Sample by sample: what is verified withstands AutoAttack, and what withstands AutoAttack withstands PGD."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.attacks.autoattack import AutoAttack
from support.defences import digits
from support.intervals import box, interval_bounds, verified

EPS = 0.05


@cache
def small(kind: str, seed: int = 0) -> nn.Sequential:
    """A network trained against its interval bounds, so that many samples can be verified."""
    torch.manual_seed(seed)
    conv = [
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    ]
    mlp = [nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)]
    model = nn.Sequential(*(conv if kind == "conv" else mlp))
    x, y, _, _ = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(12):
        radius = EPS * min(1.0, epoch / 6)
        for rows in torch.randperm(len(x)).split(100):
            low, high = (side.float() for side in interval_bounds(model, *box(x[rows], radius)))
            worst = torch.where(F.one_hot(y[rows], 10).bool(), low, high)
            loss = 0.5 * F.cross_entropy(model(x[rows]), y[rows]) + 0.5 * F.cross_entropy(worst, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def withstands(model, attack, x, y):
    x_adv = attack(model, x, y, indices=torch.arange(len(x)))
    assert (x_adv - x).abs().max() <= EPS * (1 + 1e-6) + 1e-7
    assert (x_adv.min() >= 0, x_adv.max() <= 1) == (True, True)
    return (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)


def samples(count=80):
    _, _, x, y = digits()
    return x[:count], y[:count]


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_verified_below_autoattack_below_pgd(kind):
    x, y = samples()
    model = small(kind)
    certain = verified(model, x, y, EPS)
    strongest = withstands(model, AutoAttack(eps=EPS), x, y)
    weaker = withstands(model, PGD(eps=EPS, steps=10), x, y)
    clean = model(x).argmax(1) == y
    assert not (certain & ~strongest).any()
    assert not (strongest & ~weaker).any()
    assert not (weaker & ~clean).any()
    # none of the slices is empty, so that the comparisons say something
    counts = [int(each.sum()) for each in (certain, strongest, weaker, clean)]
    assert 25 < counts[0] < counts[1] <= counts[2] < counts[3], counts


def test_bounds_hold_for_all_images_of_the_box():
    x, y = samples(20)
    model = small("conv")
    low, high = interval_bounds(model, *box(x, EPS))
    corner, other = box(x, EPS)
    for _ in range(200):
        logits = model.double()(corner + (other - corner) * torch.rand_like(corner).round())
        assert (logits >= low - 1e-9).all()
        assert (logits <= high + 1e-9).all()
    model.float()
    assert torch.allclose(interval_bounds(model, x, x)[0], model(x).double(), atol=1e-4)
    assert not verified(model, x, (y + 1) % 10, EPS).any()
