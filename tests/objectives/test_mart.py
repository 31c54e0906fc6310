"""MART against its formula."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import MART, mart_loss
from support.attacked import CLASSES, CountingNet, images

Y = torch.tensor([0, 1, 2, 3, 4, 4])


def formula(clean, adv, y, beta, prob_eps=1e-12, margin_eps=1e-4, weight_eps=1e-7):
    p, q = clean.softmax(1), adv.softmax(1)
    total = 0
    for i, label in enumerate(y.tolist()):
        strongest = max(q[i, k] for k in range(q.shape[1]) if k != label)
        boosted = -q[i, label].log() - (1 + margin_eps - strongest + prob_eps).log()
        divergence = (p[i] * (p[i].log() - (q[i] + prob_eps).log())).sum()
        total = total + boosted + beta * divergence * (1 + weight_eps - p[i, label])
    return total / len(y)


@pytest.fixture
def logits():
    return [(2 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("options", [{}, {"prob_eps": 0.0, "margin_eps": 0.0, "weight_eps": 0.0}, {"margin_eps": 0.1}])
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_loss_and_both_gradients(logits, beta, options):
    loss, boosted, robust = mart_loss(*logits, Y, beta, **options)
    expected = formula(*logits, Y, beta, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(boosted + beta * robust, loss)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, logits, allow_unused=True, materialize_grads=True),
    )


def test_soft_targets_are_means_over_labels(logits):
    torch.testing.assert_close(mart_loss(*logits, F.one_hot(Y, 5).double()), mart_loss(*logits, Y))
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    one_by_one = torch.stack([mart_loss(*logits, torch.full((6,), k))[0] for k in range(5)])
    # the same soft label for all samples, so that the loss is a mean of losses of hard ones
    expected = (soft[0] * one_by_one).sum()
    torch.testing.assert_close(mart_loss(*logits, soft[:1].expand(6, 5), weight_eps=1e-7)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_extreme_logits_stay_finite(dtype, exact):
    clean = torch.tensor([[120.0, -120.0, 0.0], [120.0, -120.0, 0.0]], dtype=dtype, requires_grad=True)
    adv = torch.tensor([[-120.0, 120.0, 0.0], [120.0, 120.0, -120.0]], dtype=dtype, requires_grad=True)
    options = {"prob_eps": 0.0, "margin_eps": 0.0} if exact else {}
    loss, boosted, _ = mart_loss(clean, adv, torch.tensor([0, 2]), **options)
    loss.backward()
    assert loss.dtype == torch.float32
    # cross entropies 240 and 240 + log 2; margins 120 (9.2 with the constants) and log 2
    expected = (240 + 240 + 2 * 0.6931 + (120 if exact else 9.2103)) / 2
    assert float(boosted.detach()) == pytest.approx(expected, rel=1e-4)
    assert bool(clean.grad.isfinite().all())
    assert bool(adv.grad.isfinite().all())


def test_of_equal_logits_the_later_class_is_the_margin():
    adv = torch.tensor([[1.0, -3.0, 1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mart_loss(torch.zeros_like(adv), adv, torch.tensor([3]), beta=0.0)[0], adv)
    assert gradient[0, 2] > gradient[0, 0] > 0


def test_two_classes():
    clean, adv = torch.randn(4, 2), torch.randn(4, 2)
    y = torch.tensor([0, 1, 1, 0])
    _, boosted, _ = mart_loss(clean, adv, y, prob_eps=0.0, margin_eps=0.0)
    torch.testing.assert_close(boosted, 2 * F.cross_entropy(adv, y))  # the other class is the only rival


@pytest.mark.parametrize(("forwards", "batches"), [("separate", [8, 8]), ("joint", [16])])
def test_objective(forwards, batches):
    net = CountingNet().double().train()
    x, y = images(dtype=torch.float64)
    objective = MART(forwards=forwards, beta=2.0)
    prepared = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    assert 0.02 < float((prepared.x_adv - x).abs().max()) <= 0.031 + 1e-12
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == batches
    assert int(net.norm.num_batches_tracked) == len(batches)
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    torch.testing.assert_close(output.logs["boosted"] + 2.0 * output.logs["robust"], output.loss.detach())
    assert objective.passes(2) == 10 + 4
    if forwards == "separate":
        clean, adv = net(x), net(prepared.x_adv)
        torch.testing.assert_close(output.loss, formula(clean, adv, y, 2.0))
        torch.testing.assert_close(output.logits, clean)
        alone = objective(net.eval(), objective.prepare(net, x[:1], y[:1]))
        assert alone.sample_losses.shape == (1,)
        assert alone.logits.shape == (1, CLASSES)


def test_published_defaults():
    objective = MART()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps) == (0.031, 0.007, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("ce", "normal", "eval")
    assert objective.beta == 5.0
    assert MART(attack=PGD(steps=2)).attack.steps == 2
    assert "beta=5.0" in repr(objective)


@pytest.mark.parametrize("name", ["beta", "prob_eps", "margin_eps", "weight_eps"])
def test_refusals(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number >= 0"):
        MART(**{name: -1})
    with pytest.raises(ValueError, match="Expected `forwards` to be one of 'separate', 'joint'"):
        MART(forwards="published")
