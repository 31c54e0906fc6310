"""ELLE against its formula."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD, ScheduledAttack
from lightning_robust.objectives import ELLE, ELLEA, elle_loss
from lightning_robust.schedules import Linear
from support.attacked import CountingNet, images

EPS = 8 / 255


@pytest.fixture
def net():
    return CountingNet().double().train()


def errors(model, a, b, c, y, alpha):
    at_a, at_b, at_c = (F.cross_entropy(model(each), y, reduction="none") for each in (a, b, c))
    return (at_c - (1 - alpha) * at_a - alpha * at_b) ** 2


@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradients(soft):
    adv = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    triplet = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(4, dtype=torch.float64)
    y = torch.rand(4, 5, dtype=torch.float64).softmax(1) if soft else torch.tensor([0, 1, 2, 4])
    loss, adversarial, linearity, samples = elle_loss(adv, triplet, y, alpha, 7.0)
    expected = errors(lambda rows: rows, *triplet.chunk(3), y, alpha)
    ce = F.cross_entropy(adv, y, reduction="none")
    torch.testing.assert_close(linearity, expected.mean())
    torch.testing.assert_close(adversarial, ce.mean())
    torch.testing.assert_close(samples, ce + 7 * expected)
    torch.testing.assert_close(loss, samples.mean())
    grads = [
        torch.autograd.grad(value, [adv, triplet], retain_graph=True) for value in (loss, (ce + 7 * expected).mean())
    ]
    torch.testing.assert_close(*grads)
    assert bool((grads[0][1].abs().sum(1) > 0).all())  # through all three points


def test_objective_is_the_formula(net):
    net.eval()  # one forward of the triplet is then three
    x, y = images(dtype=torch.float64)
    objective = ELLE(attack=FGSM(eps=EPS), weight=50.0)
    prepared = objective.prepare(net, x, y)
    torch.testing.assert_close(prepared.x_adv, FGSM(eps=EPS)(net, x, y))
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == [8, 24]
    expected = errors(net, *prepared.extra["triplet"].chunk(3), y, prepared.extra["alpha"])
    torch.testing.assert_close(output.logs["linearity"], expected.mean().detach())
    torch.testing.assert_close(output.loss, F.cross_entropy(net(prepared.x_adv), y) + 50 * expected.mean())
    assert objective.passes(1) == 5


@pytest.mark.parametrize("clamp", [False, True])
def test_points_lie_in_the_ball(net, clamp):
    x, y = images(64, dtype=torch.float64)
    prepared = ELLE(clamp=clamp).prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    a, b, c = prepared.extra["triplet"].chunk(3)
    alpha = prepared.extra["alpha"].view(-1, 1, 1, 1)
    torch.testing.assert_close(c, (1 - alpha) * a + alpha * b)
    for point in (a, b):
        assert 0.9 * EPS < float((point - x).abs().max()) <= EPS + 1e-12
    assert not torch.equal(a, b)
    assert 0 <= float(alpha.min()) < 0.2 < 0.8 < float(alpha.max()) < 1
    inside = all(float(point.min()) >= 0 and float(point.max()) <= 1 for point in (a, b, c))
    assert inside is clamp


def test_draws_come_from_the_generator(net):
    x, y = images(dtype=torch.float64)
    state = torch.get_rng_state()
    first, second, third = (
        ELLE().prepare(net, x, y, generator=torch.Generator().manual_seed(seed)).extra["triplet"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_radius_is_that_of_the_epoch_and_in_pixels(net):
    x, y = images(dtype=torch.float64)
    std = [0.5, 0.25, 0.2]
    attack = PGD(eps=0.4, steps=1, step_size=0.4, random_start=False, mean=[0.0] * 3, std=std)
    objective = ELLE(attack=ScheduledAttack(attack, eps=Linear(start=0.0, end=0.4, epochs=5)))
    objective.epoch_starts(2, 5)
    prepared = objective.prepare(net, x / torch.tensor(std, dtype=x.dtype).view(1, 3, 1, 1), y)
    moved = prepared.extra["triplet"][:8] - prepared.x
    pixels = moved.abs().amax((0, 2, 3)) * torch.tensor(std, dtype=x.dtype)
    assert bool(((pixels > 0.18) & (pixels <= 0.2)).all())


def test_one_sample_and_half_precision():
    x, y = images(1)
    model = CountingNet().bfloat16().eval()
    objective = ELLE()
    output = objective(model, objective.prepare(model, x.bfloat16(), y))
    assert output.loss.dtype == torch.float32
    assert bool(output.loss.isfinite())


@pytest.mark.parametrize("kind", [ELLE, ELLEA])
def test_refusals(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} draws its points from the linf ball .* in l2"):
        kind(attack=PGD(norm="l2"))
    objective = kind(attack=ScheduledAttack(PGD(norm="l2"), eps=Linear(start=0.0, end=0.4, epochs=5)))
    with pytest.raises(ValueError, match=f"{kind.__name__} draws its points from the linf ball"):
        objective.epoch_starts(0, 5)
    with pytest.raises(ValueError, match=r"Expected `(max_)?weight`"):
        kind(**{"weight" if kind is ELLE else "max_weight": -1})
    with pytest.raises(ValueError, match="3 points for each of 2 targets but got 5"):
        elle_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1]), torch.rand(2))


def test_published_defaults():
    objective = ELLE()
    assert (objective.weight, objective.clamp) == (1000.0, False)
    assert (objective.attack.eps, objective.attack.step_size, objective.attack.mode) == (EPS, EPS, "train")
    assert "weight=1000.0" in repr(objective)
