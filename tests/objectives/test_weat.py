"""WEAT against its formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import WEAT, energy_weights, trades_loss, weat_loss
from support.attacked import CountingNet, images

Y = torch.tensor([0, 1, 2, 3, 4, 4])


def formula(clean, adv, y, beta, form="adv", normalize=False):
    weights = torch.tensor(
        [1 / math.log(1 + math.exp(abs(math.log(sum(math.exp(v) for v in row))))) for row in clean.tolist()],
        dtype=torch.float64,
    )
    if normalize:
        weights = weights / weights.mean()
    p, q = clean.softmax(1), adv.softmax(1)
    divergence = (p * (p.log() - (q + 1e-12).log())).sum(1)
    supervised = F.cross_entropy(adv if form == "adv" else clean, y, reduction="none")
    return (weights * (supervised + beta * divergence)).mean()


@pytest.fixture
def logits():
    return [(2 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", ["nat", "adv"])
def test_loss_and_both_gradients(logits, form, normalize):
    loss, supervised, robust = weat_loss(*logits, Y, 6.0, form=form, normalize=normalize)
    expected = formula(*logits, Y, 6.0, form, normalize)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(supervised + 6.0 * robust, loss)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_equal_weights_are_trades(logits):
    # normalised weights of one sample are 1
    pair = [each[:1] for each in logits]
    ours = weat_loss(*pair, Y[:1], 6.0, form="nat", normalize=True, prob_eps=0.0)
    torch.testing.assert_close(ours, trades_loss(*pair, Y[:1], 6.0))


def test_soft_targets(logits):
    torch.testing.assert_close(weat_loss(*logits, F.one_hot(Y, 5).double()), weat_loss(*logits, Y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_extreme_logits_stay_finite_and_count(dtype, eps):
    clean = torch.tensor([[120.0, -120.0], [-120.0, -120.0]], dtype=dtype, requires_grad=True)
    adv = torch.tensor([[-120.0, 120.0], [120.0, -120.0]], dtype=dtype, requires_grad=True)
    weights = energy_weights(clean)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([1 / 120, 1 / (120 - math.log(2))])  # theirs are 0
    loss, _, robust = weat_loss(clean, adv, torch.tensor([0, 1]), prob_eps=eps)
    loss.backward()
    assert float(robust.detach()) > 0.1
    assert bool(clean.grad.isfinite().all())
    assert bool(adv.grad.isfinite().all())


@pytest.mark.parametrize(("form", "beta"), [("adv", 7.0), ("nat", 6.0)])
def test_objective(form, beta):
    net = CountingNet().double().train()
    x, y = images(dtype=torch.float64)
    objective = WEAT(form=form)
    prepared = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == [8, 8]
    clean, adv = net(x), net(prepared.x_adv)
    torch.testing.assert_close(output.loss, formula(clean, adv, y, beta, form))
    torch.testing.assert_close(output.logits, clean)
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    torch.testing.assert_close(output.logs["supervised"] + beta * output.logs["robust"], output.loss.detach())
    net.batches.clear()
    WEAT(form=form, forwards="joint")(net, prepared)
    assert net.batches == [16]
    assert objective.passes(2) == 10.5 + 4
    assert objective(net.eval(), objective.prepare(net, x[:1], y[:1])).sample_losses.shape == (1,)


def test_published_defaults():
    objective = WEAT()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("kl", "normal", "eval")
    assert (objective.form, objective.beta, WEAT(form="nat").beta, WEAT(beta=1.0).beta) == ("adv", 7.0, 6.0, 1.0)
    assert WEAT(attack=PGD(steps=2)).attack.steps == 2
    assert "form='adv'" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "Expected `beta`"),
        ({"prob_eps": -1}, "Expected `prob_eps`"),
        ({"form": "both"}, "Expected `form` to be one of 'nat', 'adv'"),
        ({"forwards": "published"}, "Expected `forwards` to be one of 'separate', 'joint'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        WEAT(**options)
    if "form" in options:
        with pytest.raises(ValueError, match=message):
            weat_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), **options)
