"""FGSM and its randomised variants."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import FGSM
from support.attacked import CountingNet, images

EPS = 8 / 255


@pytest.fixture
def net():
    return CountingNet().double().eval()


def sign_at(net, x, y):
    z = x.clone().requires_grad_()
    F.cross_entropy(net(z), y).backward()
    return z.grad.sign()


def test_one_signed_step(net):
    x, y = images(dtype=torch.float64)
    torch.testing.assert_close(FGSM(eps=EPS)(net, x, y), (x + EPS * sign_at(net, x, y)).clamp(0, 1))
    assert FGSM().passes == 1


def test_random_start(net):
    x, y = images(dtype=torch.float64)
    start = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    expected = x + (start - x + 1.25 * EPS * sign_at(net, start, y)).clamp(-EPS, EPS)
    attacked = FGSM(eps=EPS, step_size=1.25 * EPS, random_start=True)(net, x, y, start=start)
    torch.testing.assert_close(attacked, expected.clamp(0, 1))


def test_wide_noise_is_not_projected(net):
    x = torch.full((16, 3, 6, 6), 0.5, dtype=torch.float64)
    y = torch.zeros(16, dtype=torch.long)
    attack = FGSM(eps=EPS, random_start=True, start_scale=2, projection="box")
    size = (attack(net, x, y) - x).abs()
    assert 2.5 * EPS < float(size.max()) <= 3 * EPS + 1e-12


def test_repr_and_refusals():
    attack = FGSM(eps=0.1, random_start=True, start_scale=2.0, projection="box")
    assert repr(eval(repr(attack))) == repr(attack)
    assert "steps" not in repr(attack)
    with pytest.raises(ValueError, match="Expected `start_scale`"):
        FGSM(start_scale=-1)
