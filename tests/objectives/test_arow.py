"""ARoW against its formula."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.losses import CrossEntropy
from lightning_robust.objectives import ARoW, Prepared, arow_loss
from support.attacked import CLASSES, CountingNet, differences, images, snapshot

Y = torch.tensor([0, 1, 2, 3, 4, 4])


def formula(clean, adv, y, beta, smoothing=0.2, eps=1e-12, weighting="arow"):
    p, q = clean.softmax(1), adv.softmax(1)
    divergence = (p * (p.log() - (q + eps).log())).sum(1)
    index = torch.arange(len(y))
    weight = 1 - q[index, y] if weighting == "arow" else p[index, y]
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + beta * (divergence * weight).mean()


@pytest.fixture
def logits():
    return [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.fixture
def net():
    return CountingNet().double().train()


@pytest.mark.parametrize("weighting", ["arow", "cow"])
@pytest.mark.parametrize(("beta", "smoothing", "eps"), [(7.0, 0.2, 1e-12), (1.0, 0.0, 0.0), (0.0, 0.1, 1e-3)])
def test_loss_and_both_gradients(logits, weighting, beta, smoothing, eps):
    loss, natural, robust = arow_loss(*logits, Y, beta, label_smoothing=smoothing, prob_eps=eps, weighting=weighting)
    expected = formula(*logits, Y, beta, smoothing, eps, weighting)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(natural + beta * robust, loss)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("weighting", ["arow", "cow"])
def test_soft_targets(logits, weighting):
    one_hot = F.one_hot(Y, 5).double()
    torch.testing.assert_close(
        arow_loss(*logits, one_hot, weighting=weighting), arow_loss(*logits, Y, weighting=weighting)
    )
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    _, natural, robust = arow_loss(*logits, soft, weighting=weighting)
    torch.testing.assert_close(natural, F.cross_entropy(logits[0], soft, label_smoothing=0.2))
    p, q = (each.softmax(1) for each in logits)
    weight = 1 - (soft * q).sum(1) if weighting == "arow" else (soft * p).sum(1)
    torch.testing.assert_close(robust, ((p * (p / (q + 1e-12)).log()).sum(1) * weight).mean())


def test_criterion_takes_the_place_of_the_cross_entropy(logits):
    ours = arow_loss(*logits, Y, criterion=CrossEntropy(label_smoothing=0.5))
    torch.testing.assert_close(ours[1], F.cross_entropy(logits[0], Y, label_smoothing=0.5))
    torch.testing.assert_close(ours[2], arow_loss(*logits, Y)[2])


def test_half_precision_logits_are_compared_in_float32(logits):
    half = [each.detach().bfloat16() for each in logits]
    loss, _, _ = arow_loss(*half, Y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, arow_loss(*(each.float() for each in half), Y)[0])


@pytest.mark.parametrize(("eps", "divergence"), [(0.0, 240.0), (1e-12, 27.631)])
def test_extreme_logits_stay_finite(eps, divergence):
    clean = torch.tensor([[120.0, -120.0, 0.0]], requires_grad=True)
    adv = torch.tensor([[-120.0, 120.0, 0.0]], requires_grad=True)
    _, _, robust = arow_loss(clean, adv, torch.tensor([0]), prob_eps=eps)
    robust.backward()
    assert float(robust.detach()) == pytest.approx(divergence, rel=1e-4)
    assert bool(clean.grad.isfinite().all())
    assert bool(adv.grad.isfinite().all())


@pytest.mark.parametrize(("forwards", "batches"), [("separate", [8, 8]), ("joint", [16])])
def test_forwards_of_the_loss(net, forwards, batches):
    x, y = images(dtype=torch.float64)
    objective = ARoW(forwards=forwards)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == batches
    assert output.logits.shape == (8, CLASSES)
    assert int(net.norm.num_batches_tracked) == len(batches)
    assert objective.passes(1) == objective.attack.passes + 2
    assert objective.passes(2) == objective.attack.passes + 4


def test_value_is_that_of_the_formula(net):
    x, y = images(dtype=torch.float64)
    objective = ARoW(beta=2.0, label_smoothing=0.1, weighting="cow", prob_eps=1e-6)
    prepared = objective.prepare(net, x, y)
    output = objective(net, prepared)
    clean, adv = net(x), net(prepared.x_adv)
    torch.testing.assert_close(output.loss, formula(clean, adv, y, 2.0, 0.1, 1e-6, "cow"))
    torch.testing.assert_close(output.logits, clean)
    torch.testing.assert_close(output.logs["natural"] + 2.0 * output.logs["robust"], output.loss.detach())
    assert not any(value.requires_grad for value in output.logs.values())


def test_preparation_attacks_and_leaves_the_model_alone(net):
    x, y = images(dtype=torch.float64)
    before, state = snapshot(net), torch.get_rng_state()
    objective = ARoW()
    prepared = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    assert differences(net, before) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.02 < float((prepared.x_adv - x).abs().max()) <= 8 / 255 + 1e-12
    with torch.no_grad():
        net.eval()
        attacked, near = (objective(net, Prepared(x, y, x_adv)) for x_adv in (prepared.x_adv, x + 0.001))
    assert float(attacked.logs["robust"]) > float(near.logs["robust"])


def test_published_defaults():
    objective = ARoW()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("kl", "uniform", "eval")
    assert (objective.beta, objective.label_smoothing) == (7.0, 0.2)
    assert ARoW(attack=PGD(steps=2, loss="ce")).attack.steps == 2
    assert "weighting='arow'" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "Expected `beta`"),
        ({"label_smoothing": 1.5}, r"Expected `label_smoothing` to be in \[0.0, 1.0\]"),
        ({"weighting": "sow"}, "Expected `weighting` to be one of 'arow', 'cow'"),
        ({"forwards": "published"}, "Expected `forwards` to be one of 'separate', 'joint'"),
        ({"prob_eps": -1e-12}, "Expected `prob_eps`"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ARoW(**options)
    if "weighting" in options:
        with pytest.raises(ValueError, match=message):
            arow_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), **options)
