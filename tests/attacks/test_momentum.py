"""Momentum attacks against a loop written out."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import MIM
from support.attacked import CountingNet, images

EPS = 8 / 255


@pytest.fixture
def net():
    return CountingNet().double().eval()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_same_as_the_loop_written_out(net, nesterov, decay):
    x, y = images(dtype=torch.float64)
    x_adv, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        z = (x_adv + decay * EPS / 6 * velocity if nesterov else x_adv).detach().requires_grad_()
        F.cross_entropy(net(z), y).backward()
        mean = torch.stack([each.abs().mean() for each in z.grad]).view(-1, 1, 1, 1)
        velocity = decay * velocity + z.grad / mean
        x_adv = (x + (x_adv + EPS / 6 * velocity.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    net.batches.clear()
    attack = MIM(eps=EPS, steps=6, decay=decay, nesterov=nesterov)
    torch.testing.assert_close(attack(net, x, y), x_adv)
    assert len(net.batches) == 6 == attack.passes


def test_normalised_images(net):
    x, y = images(dtype=torch.float64)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    shift, scale = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
    inside = MIM(eps=EPS, steps=1)(lambda z: net((z - shift) / scale), x, y)
    outside = MIM(eps=EPS, steps=1, mean=mean, std=std)(net, (x - shift) / scale, y)
    torch.testing.assert_close(outside, (inside - shift) / scale)


def test_vanishing_gradient_and_refusal(net):
    x, y = images(dtype=torch.float64)
    assert torch.equal(MIM(steps=2)(lambda z: net(z) * 0, x, y), x)
    with pytest.raises(ValueError, match="Expected `decay`"):
        MIM(decay=-1)
    attack = MIM(eps=0.1, nesterov=True)
    assert repr(eval(repr(attack))) == repr(attack)
