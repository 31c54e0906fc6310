"""SCORE against its formulas."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.attacks.losses import ATTACK_LOSSES
from lightning_robust.losses import probability_distance
from lightning_robust.losses.probability_distance import DISTANCES
from lightning_robust.objectives import SCORE, score_bound, score_loss, score_pgd_loss, trades_loss
from support.attacked import CLASSES, CountingNet, images

Y = torch.tensor([0, 1, 2, 3, 4, 4])


@pytest.fixture
def logits():
    return [(2 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]


@pytest.fixture
def net():
    return CountingNet().double().train()


def lse(clean, adv, y, beta, bound=0.0, smoothing=0.0):
    p, q = clean.softmax(1), adv.softmax(1)
    classes = p.shape[1]
    labels = torch.full_like(p, smoothing / (classes - 1))
    labels[torch.arange(len(y)), y] = 1 - smoothing
    return ((p - labels) ** 2).sum(1), F.relu(((q - p) ** 2).sum(1) - bound)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_loss_and_both_gradients(logits, bound, smoothing):
    loss, natural, robust = score_loss(*logits, Y, 3.0, bound=bound, label_smoothing=smoothing)
    expected_natural, expected_robust = lse(*logits, Y, 3.0, bound, smoothing)
    torch.testing.assert_close(natural, expected_natural.mean())
    torch.testing.assert_close(robust, expected_robust.mean())
    expected = (expected_natural + 3.0 * expected_robust).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_bound_on_the_whole_loss(logits):
    whole, natural, robust = score_loss(*logits, Y, 2.0, clip_on="whole", reduction="none")
    torch.testing.assert_close(whole, natural + 2.0 * robust)
    bound = float(whole.detach().median())
    samples, _, _ = score_loss(*logits, Y, 2.0, bound=bound, clip_on="whole", reduction="none")
    torch.testing.assert_close(samples, (whole - bound).clamp(min=0))
    assert bool((samples == 0).any())
    assert bool((samples > 0).any())


def test_pgd_form(logits):
    expected = F.relu(((logits[1].softmax(1) - F.one_hot(Y, 5)) ** 2).sum(1) - 0.3)
    torch.testing.assert_close(score_pgd_loss(logits[1], Y, bound=0.3, reduction="none"), expected)
    torch.testing.assert_close(score_pgd_loss(logits[1], Y, bound=0.3), expected.mean())


def test_kl_is_trades(logits):
    torch.testing.assert_close(score_loss(*logits, Y, 6.0, distance="kl"), trades_loss(*logits, Y, 6.0))


@pytest.mark.parametrize("distance", DISTANCES)
def test_soft_targets(logits, distance):
    one_hot = F.one_hot(Y, 5).double()
    torch.testing.assert_close(
        score_loss(*logits, one_hot, distance=distance), score_loss(*logits, Y, distance=distance)
    )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("classes", [2, 10])
def test_bound_is_the_distance_of_a_smoothed_prediction(distance, classes):
    prediction = torch.tensor([[0.7] + [0.3 / (classes - 1)] * (classes - 1)], dtype=torch.float64)
    label = F.one_hot(torch.tensor([0]), classes).double()
    assert score_bound(distance, 0.3, classes) == pytest.approx(
        float(probability_distance(prediction.log(), label.log(), distance))
    )
    assert score_bound(distance, 0.0, classes) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("distance", DISTANCES)
def test_extreme_logits_stay_finite(distance, dtype):
    clean = torch.tensor([[120.0, -120.0], [-120.0, -120.0]], dtype=dtype, requires_grad=True)
    adv = torch.tensor([[-120.0, 120.0], [-120.0, -120.0]], dtype=dtype, requires_grad=True)
    loss, _, _ = score_loss(clean, adv, torch.tensor([0, 1]), distance=distance, bound=0.1)
    (loss + score_pgd_loss(adv, torch.tensor([0, 1]), distance=distance)).backward()
    assert float(loss.detach()) > 0
    assert bool(clean.grad.isfinite().all())
    assert bool(adv.grad.isfinite().all())


@pytest.mark.parametrize(("forwards", "batches"), [("separate", [8, 8]), ("joint", [16])])
def test_objective(net, forwards, batches):
    x, y = images(dtype=torch.float64)
    objective = SCORE(forwards=forwards, clip=0.2)
    prepared = objective.prepare(net, x, y, generator=torch.Generator().manual_seed(0))
    assert int(net.norm.num_batches_tracked) == 0  # statistics are frozen in the attack
    assert net.batches == [8] * 11
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == batches
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    torch.testing.assert_close(output.logs["natural"] + 3.0 * output.logs["robust"], output.loss.detach())
    assert objective.passes(2) == 10.5 + 4
    if forwards == "separate":
        natural, robust = lse(net(x), net(prepared.x_adv), y, 3.0, score_bound("lse", 0.2, CLASSES))
        torch.testing.assert_close(output.loss, (natural + 3.0 * robust).mean())
        torch.testing.assert_close(
            SCORE(bound=score_bound("lse", 0.2, CLASSES))(net, prepared).loss, objective(net, prepared).loss
        )
    net.eval()
    assert objective(net, objective.prepare(net, x[:1], y[:1])).sample_losses.shape == (1,)


def test_pgd_objective(net):
    x, y = images(dtype=torch.float64)
    objective = SCORE(form="pgd", label_smoothing=0.1)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == [8]
    torch.testing.assert_close(output.loss, score_pgd_loss(net(prepared.x_adv), y, label_smoothing=0.1))
    torch.testing.assert_close(output.logits, net(prepared.x_adv))
    assert objective.passes(2) == 10 + 2


@pytest.mark.parametrize("form", ["trades", "pgd"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_attack_climbs_the_distance(net, distance, form):
    """The default attack moves along the gradient of the objective's own distance."""
    attack = SCORE(distance=distance, form=form).attack
    assert attack.loss in ATTACK_LOSSES
    x, y = images(dtype=torch.float64)
    net.eval()
    start = x + 0.01 * torch.randn_like(x)
    reference = net(x).log_softmax(1).detach() if form == "trades" else F.one_hot(y, CLASSES).double().log()
    z = start.clone().requires_grad_()
    probability_distance(net(z), reference, distance).sum().backward()
    moved = attack.replaced(steps=1, eps=1.0, step_size=0.01, bounds=(-9.0, 9.0), mode="eval")(net, x, y, start=start)
    torch.testing.assert_close(moved, start + 0.01 * z.grad.sign())


def test_published_defaults():
    objective = SCORE()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("lse", True, "train-frozen-stats")
    assert (objective.beta, objective.clip, objective.distance) == (3.0, 0.0, "lse")
    assert (SCORE(form="pgd").attack.loss, SCORE(form="pgd").attack.mode) == ("brier", "train")
    assert SCORE(attack=PGD(steps=2)).attack.steps == 2
    assert "distance='lse'" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "Expected `beta`"),
        ({"distance": "RKLsqrt"}, "Expected `distance` to be one of 'lse', 'l1'"),
        ({"form": "at"}, "Expected `form` to be one of 'trades', 'pgd'"),
        ({"clip": 1.5}, r"Expected `clip` to be in \[0.0, 1.0\]"),
        ({"bound": -1}, "Expected `bound`"),
        ({"bound": 0.1, "clip": 0.1}, "two ways to say the same"),
        ({"clip_on": "all"}, "Expected `clip_on` to be one of 'penalty', 'whole'"),
        ({"label_smoothing": 2}, "Expected `label_smoothing`"),
        ({"forwards": "published"}, "Expected `forwards`"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SCORE(**options)


def test_functions_refuse_too(logits):
    with pytest.raises(ValueError, match="Expected `clip_on`"):
        score_loss(*logits, Y, clip_on="all")
    with pytest.raises(ValueError, match="Expected `reduction`"):
        score_loss(*logits, Y, reduction="sum")
    with pytest.raises(ValueError, match="Expected `reduction`"):
        score_pgd_loss(logits[0], Y, reduction="sum")
