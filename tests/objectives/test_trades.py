"""TRADES against its formula, and what an objective promises."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.losses import CrossEntropy
from lightning_robust.objectives import TRADES, Objective, ObjectiveOutput, Prepared, trades_loss
from support.attacked import CLASSES, CountingNet, differences, images, snapshot


def formula(clean, adv, y, beta):
    p, q = clean.softmax(1), adv.softmax(1)
    return F.cross_entropy(clean, y) + beta * (p * (p.log() - q.log())).sum() / len(y)


@pytest.fixture
def logits():
    return [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.fixture
def net():
    return CountingNet().double().train()


Y = torch.tensor([0, 1, 2, 3, 4, 4])


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_loss_and_both_gradients(logits, beta):
    loss, natural, robust = trades_loss(*logits, Y, beta)
    expected = formula(*logits, Y, beta)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(natural + beta * robust, loss)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_soft_targets_and_criterion(logits):
    soft = F.one_hot(Y, 5).double()
    torch.testing.assert_close(trades_loss(*logits, soft)[0], trades_loss(*logits, Y)[0])
    smooth = trades_loss(*logits, Y, criterion=CrossEntropy(label_smoothing=0.2))
    torch.testing.assert_close(smooth[1], F.cross_entropy(logits[0], Y, label_smoothing=0.2))
    torch.testing.assert_close(smooth[2], trades_loss(*logits, Y)[2])


def test_half_precision_logits_are_compared_in_float32(logits):
    half = [each.detach().bfloat16() for each in logits]
    loss, _, _ = trades_loss(*half, Y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, trades_loss(*(each.float() for each in half), Y)[0])


def test_extreme_logits_stay_finite():
    clean = torch.tensor([[120.0, -120.0, 0.0]], requires_grad=True)
    adv = torch.tensor([[-120.0, 120.0, 0.0]], requires_grad=True)
    loss, _, _ = trades_loss(clean, adv, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(240 + 6 * 240)
    assert bool(clean.grad.isfinite().all())
    assert bool(adv.grad.isfinite().all())


@pytest.mark.parametrize(
    ("forwards", "batches"),
    [("separate", [8, 8]), ("joint", [16]), ("published", [8, 8, 8]), ("published-awp", [8, 8, 8])],
)
def test_forwards_of_the_loss(net, forwards, batches):
    x, y = images(dtype=torch.float64)
    objective = TRADES(forwards=forwards)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == batches
    assert output.logits.shape == (8, CLASSES)
    assert int(net.norm.num_batches_tracked) == len(batches)
    assert objective.passes(1) == objective.attack.passes + len(batches if forwards != "joint" else [8, 8])


@pytest.mark.parametrize(("forwards", "order"), [("separate", "ca"), ("published", "cac"), ("published-awp", "acc")])
def test_order_of_the_forwards(net, forwards, order):
    """BatchNorm statistics are a running mean, so the last forwards weigh most."""
    x, y = images(dtype=torch.float64)
    prepared = Prepared(x, y, x + 1)
    seen = []
    net.register_forward_pre_hook(lambda module, arguments: seen.append("c" if arguments[0] is x else "a"))
    output = TRADES(forwards=forwards)(net, prepared)
    assert "".join(seen) == order
    clean, adv = net(x), net(x + 1)
    torch.testing.assert_close(output.loss, formula(clean, adv, y, 6.0))
    torch.testing.assert_close(output.logits, clean)


def test_value_is_that_of_the_formula(net):
    x, y = images(dtype=torch.float64)
    objective = TRADES(beta=2.0)
    prepared = objective.prepare(net, x, y)
    output = objective(net, prepared)
    clean, adv = net(x), net(prepared.x_adv)
    torch.testing.assert_close(output.loss, formula(clean, adv, y, 2.0))
    torch.testing.assert_close(output.logits, clean)
    torch.testing.assert_close(output.logs["natural"] + 2.0 * output.logs["robust"], output.loss.detach())
    assert not any(value.requires_grad for value in output.logs.values())


def test_detached_clean_prediction(net):
    x, y = images(dtype=torch.float64)
    prepared = Prepared(x, y, (x + 0.02 * torch.randn_like(x)).clamp(0, 1))
    output = TRADES(detach_clean=True)(net, prepared)
    clean, adv = net(x), net(prepared.x_adv)
    expected = F.cross_entropy(clean, y) + 6 * F.kl_div(
        adv.log_softmax(1), clean.detach().softmax(1), reduction="batchmean"
    )
    for got, wanted in zip(
        torch.autograd.grad(output.loss, list(net.parameters())),
        torch.autograd.grad(expected, list(net.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_preparation_attacks_and_leaves_the_model_alone(net):
    x, y = images(dtype=torch.float64)
    before, state = snapshot(net), torch.get_rng_state()
    objective = TRADES()
    prepared = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    assert differences(net, before) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.02 < float((prepared.x_adv - x).abs().max()) <= 0.031 + 1e-12
    again = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prepared.x_adv, again.x_adv)
    with torch.no_grad():
        net.eval()
        assert float(objective(net, prepared).logs["robust"]) > float(
            objective(net, Prepared(x, y, x + 0.001)).logs["robust"]
        )


def test_l2_attack_of_the_paper(net):
    """Normalised steps of 2 eps / K, then the possible pixels, then the ball."""
    x, y = images(dtype=torch.float64)
    net.eval()
    eps, steps = 0.5, 4
    noise = 0.001 * torch.randn_like(x)
    reference = net(x).softmax(1).detach()
    moved = noise.clone()
    for _ in range(steps):
        z = (x + moved).requires_grad_()
        F.kl_div(net(z).log_softmax(1), reference, reduction="sum").backward()
        moved = moved + 2 * eps / steps * z.grad / z.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (x + moved).clamp(0, 1) - x
        lengths = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = moved * (eps / lengths).clamp(max=1)
    options = {"step_size": 2 * eps / steps, "loss": "kl", "random_start": "normal", "projection": "box-ball"}
    attack = PGD(eps=eps, norm="l2", steps=steps, **options)
    torch.testing.assert_close(attack(net, x, y, start=x + noise), x + moved, rtol=1e-6, atol=1e-9)


def test_published_defaults():
    attack = TRADES().attack
    assert (attack.eps, attack.step_size, attack.steps) == (0.031, 0.007, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("kl", "normal", "eval")
    assert TRADES(attack=PGD(steps=2)).attack.steps == 2
    assert "PGD(eps=0.031" in repr(TRADES())


def test_refusals():
    with pytest.raises(ValueError, match="Expected `beta`"):
        TRADES(beta=-1)
    with pytest.raises(ValueError, match="Expected `forwards` to be one of 'separate', 'joint', 'published'"):
        TRADES(forwards="twice")


def test_an_own_objective_needs_two_methods(net):
    class Plain(Objective):
        def prepare(self, model, x, y, *, generator=None):
            return Prepared(x, y)

        def forward(self, model, prepared):
            logits = model(prepared.x)
            return ObjectiveOutput(F.cross_entropy(logits, prepared.y), logits, {})

    x, y = images(dtype=torch.float64)
    objective = Plain()
    output = objective(net, objective.prepare(net, x, y))
    assert output.loss.requires_grad
    assert objective.passes(1) == 1
    assert not objective.attacks
    with pytest.raises(TypeError, match="abstract"):
        Objective()
