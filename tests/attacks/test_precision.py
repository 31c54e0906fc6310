"""Attacks without gradients switched on, in inference mode and in low precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD
from support.attacked import CountingNet, images

ATTACKS = [
    PGD(steps=3),
    PGD(steps=3, loss="kl"),
    FGSM(),
    PGD(steps=3, restarts=2, early_stop=True),
    PGD(steps=2, norm="l2"),
]


@pytest.fixture
def net():
    return CountingNet().eval()


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("attack", [*ATTACKS, PGD(steps=2, mean=[0.5] * 3, std=[0.5] * 3)], ids=repr)
def test_works_in_inference_mode_with_statistics_from_there(net, attack):
    with torch.inference_mode():
        x, y = images()
        if attack.mean is not None:
            x = 2 * x - 1
        for _ in range(2):
            attacked = attack(net, x, y)
    again = attack(net, attacked.clone(), y.clone())
    assert bool(again.isfinite().all())


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast(net, attack, dtype, grad):
    x, y = images()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        net(x)  # fills the cache of weight copies
        attacked = attack(net, x, y, generator=seeded())
    assert attacked.dtype == torch.float32
    with torch.no_grad():
        clean, moved = net(x), net(attacked)
    if attack.loss == "kl":
        assert (
            float(F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="sum")) > 0.004
        )  # random noise gives 0.0001
    else:
        assert float(F.cross_entropy(moved, y)) > float(F.cross_entropy(clean, y))


@pytest.mark.parametrize("attack", [PGD(steps=3, loss="kl"), PGD(steps=2, restarts=2)], ids=repr)
def test_training_after_an_attack_under_autocast_still_reaches_the_weights(net, attack):
    x, y = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attacked = attack(net, x, y)
        loss = F.cross_entropy(net(attacked).float(), y)
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_and_model_in_half_precision(dtype, norm):
    net = CountingNet().eval().to(dtype)
    x, y = images(dtype=dtype)
    eps = 0.1 if norm == "linf" else 1.0
    attacked = PGD(eps=eps, norm=norm, steps=5)(net, x, y)
    assert attacked.dtype == dtype
    delta = (attacked.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert float(size.max()) <= eps * (1 + 1e-6)
    with torch.no_grad():
        assert float(F.cross_entropy(net(attacked).float(), y)) > float(F.cross_entropy(net(x).float(), y))


def test_confident_float16_models_still_give_gradients():
    # a probability of 1 - 3e-8: the gradient at the logits is below the smallest float16 number
    net = nn.Linear(6, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [-1.0]]) * torch.tensor([[0.01, -0.01, 0.01, 0.01, -0.01, 0.01]]))
        net.bias.copy_(torch.tensor([9.0, -9.0]))
    x = torch.full((3, 6), 0.5)
    y = torch.zeros(3, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        z = x.clone().requires_grad_()
        (plain,) = torch.autograd.grad(F.cross_entropy(net(z).float(), y), z)
        attacked = PGD(eps=0.1, steps=1, step_size=0.1, random_start=False)(net, x, y)
    assert bool((plain == 0).all())
    assert bool(((attacked - x).sign() == -net.weight[0].sign()).all())


def test_an_overflow_of_float16_keeps_its_sign():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.stack([x.sum(1), -x.sum(1)], 1)

        @staticmethod
        def backward(ctx, gradient):
            return torch.tensor([[float("inf"), float("-inf"), float("nan")]]).expand(len(gradient), 3)

    x = torch.full((2, 3), 0.5)
    y = torch.zeros(2, dtype=torch.long)
    for norm in ("linf", "l2"):
        with torch.autocast("cpu", dtype=torch.float16):
            attacked = PGD(eps=0.1, norm=norm, steps=1, step_size=0.1, random_start=False)(Steep.apply, x, y)
        assert (attacked - x).sign().tolist() == [[1.0, -1.0, 0.0]] * 2
