"""DAFA against its formulas, and the life of its weights."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD, Attack
from lightning_robust.objectives import DAFA, TRADES, dafa_loss, dafa_sums, dafa_weights, trades_loss
from support.attacked import CLASSES, CountingNet, images

Y = torch.tensor([0, 1, 2, 3, 4, 4])


def official(similarity, strength):
    """The two loops of the authors' code."""
    classes = len(similarity)
    weights = [1.0] * classes
    for i in range(classes):
        for j in range(classes):
            if i == j:
                continue
            if similarity[i][i] < similarity[j][j]:
                weights[i] += strength * similarity[i][j] * similarity[j][j]
            else:
                weights[i] -= strength * similarity[j][i] * similarity[i][i]
    return torch.tensor(weights, dtype=torch.float64)


def alone(tensor):
    return tensor


@pytest.fixture
def net():
    return CountingNet().double().train()


def objective(**options):
    attack = PGD(eps=0.05, steps=2, loss="kl", random_start="normal")
    return DAFA(**{"num_classes": CLASSES, "warmup": 2, "attack": attack, **options})


def epoch(dafa, net, number, total=alone, batches=((0, 4), (4, 8))):
    x, y = images(dtype=torch.float64)
    dafa.epoch_starts(number, 4)
    outputs = []
    for first, last in batches:
        generator = torch.Generator().manual_seed(first)
        outputs.append(dafa(net, dafa.prepare(net, x[first:last], y[first:last], generator=generator)))
        dafa.batch_ends(outputs[-1], total)
    dafa.epoch_ends(number, total)
    return outputs


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("strength", [0.0, 1.0, 1.5])
def test_weights(classes, strength):
    probabilities = (2 * torch.randn(40, classes, dtype=torch.float64)).softmax(1)
    labels = torch.arange(40) % classes
    sums, counts = dafa_sums(probabilities.log(), labels)
    similarity = torch.stack([probabilities[labels == k].mean(0) for k in range(classes)])
    torch.testing.assert_close(sums / counts.unsqueeze(1), similarity)
    weights = dafa_weights(sums, counts, strength, min_weight=-math.inf)
    torch.testing.assert_close(weights, official(similarity.tolist(), strength))
    assert float(weights.sum()) == pytest.approx(classes)


def test_ties():
    sums, counts = torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.1, 0.1, 0.8]]).double(), torch.ones(3).double()
    weights = dafa_weights(sums, counts, ties="both-lose")
    torch.testing.assert_close(weights, official(sums.tolist(), 1.0))
    assert float(weights.sum()) < 2.9
    assert float(dafa_weights(sums, counts).sum()) == pytest.approx(3)


def test_classes_that_were_not_seen_keep_their_weight():
    sums, counts = torch.tensor([[6.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 8.0]]), torch.tensor([10.0, 0.0, 10.0])
    weights = dafa_weights(sums, counts)
    assert float(weights[1]) == 1
    assert weights.tolist() == pytest.approx([1 + 0.2 * 0.8, 1, 1 - 0.2 * 0.8])


def test_weights_stay_positive():
    sums, counts = torch.tensor([[1.0, 9.0], [0.0, 10.0]]), torch.tensor([10.0, 10.0])
    assert dafa_weights(sums, counts, 3.0, min_weight=0.2).tolist() == pytest.approx([3.7, 0.2])


def test_sums_of_soft_labels():
    z = torch.randn(6, 5)
    hard, soft = dafa_sums(z, Y), dafa_sums(z, F.one_hot(Y, 5).float())
    torch.testing.assert_close(hard, soft)


def test_loss_and_both_gradients():
    pair = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = torch.rand(5, dtype=torch.float64) + 0.5
    loss, natural, robust = dafa_loss(*pair, Y, weights, 6.0)
    divergence = F.kl_div(pair[1].log_softmax(1), pair[0].softmax(1), reduction="batchmean")
    expected = (weights[Y] * F.cross_entropy(pair[0], Y, reduction="none")).mean() + 6 * divergence
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(natural + 6 * robust, loss)
    torch.testing.assert_close(torch.autograd.grad(loss, pair), torch.autograd.grad(expected, pair))
    torch.testing.assert_close(dafa_loss(*pair, Y, torch.ones(5)), trades_loss(*pair, Y))
    torch.testing.assert_close(dafa_loss(*pair, F.one_hot(Y, 5).double(), weights), dafa_loss(*pair, Y, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(dtype):
    clean = torch.tensor([[120.0, -120.0]], dtype=dtype, requires_grad=True)
    adv = torch.tensor([[-120.0, 120.0]], dtype=dtype, requires_grad=True)
    loss, _, _ = dafa_loss(clean, adv, torch.tensor([1]), torch.tensor([0.5, 1.5]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.5 * 240 + 6 * 240)
    assert bool(clean.grad.isfinite().all())
    assert bool(adv.grad.isfinite().all())
    sums, _ = dafa_sums(adv, torch.tensor([1]))
    assert sums.tolist() == [[0, 0], [0, 1]]


def test_warm_up_is_trades(net):
    dafa, trades = objective(), TRADES(attack=objective().attack)
    x, y = images(dtype=torch.float64)
    net.eval()  # so that the order of the forwards does not matter
    for number in range(2):
        dafa.epoch_starts(number, 4)
        ours, theirs = (each.prepare(net, x, y, generator=torch.Generator().manual_seed(0)) for each in (dafa, trades))
        assert torch.equal(ours.x_adv, theirs.x_adv)
        output = dafa(net, ours)
        torch.testing.assert_close(output.loss, trades(net, theirs).loss)
        assert float(output.logs["smallest_weight"]) == float(output.logs["largest_weight"]) == 1


def test_weights_are_those_of_the_predictions_in_the_last_epoch_of_the_warm_up(net):
    dafa = objective(strength=2.0)
    seen = []
    net.register_forward_hook(lambda _, inputs, logits: seen.append((inputs[0], logits.detach())))
    epoch(dafa, net, 0)
    assert float(dafa.counts.sum()) == 0
    seen.clear()
    epoch(dafa, net, 1)
    assert torch.equal(dafa.weights, torch.ones(CLASSES))
    _, y = images()
    # of each batch the last forwards are those of the attacked and of the clean images
    attacked = torch.cat([seen[3][1], seen[8][1]]) if len(seen) == 10 else None
    assert attacked is not None
    sums, counts = dafa_sums(attacked, y)
    torch.testing.assert_close(dafa.sums.double(), sums, rtol=1e-6, atol=1e-6)
    epoch(dafa, net, 2)
    torch.testing.assert_close(dafa.weights.double(), dafa_weights(sums, counts, 2.0), rtol=1e-5, atol=1e-6)
    frozen = dafa.weights.clone()
    assert len(frozen.unique()) > 1
    epoch(dafa, net, 3)
    assert torch.equal(dafa.weights, frozen)


def test_budgets_and_losses_differ_after_the_warm_up(net):
    dafa = objective(warmup=1)
    epoch(dafa, net, 0)
    dafa.epoch_starts(1, 4)
    dafa.weights.copy_(torch.tensor([2.0, 0.5, 1.0, 0.1]))
    x, y = images(dtype=torch.float64)
    prepared = dafa.prepare(net, x, y)
    radius = (prepared.x_adv - x).abs().flatten(1).amax(1)
    budgets = 0.05 * dafa.weights.double()[y]
    assert bool((radius <= budgets + 1e-9).all())
    assert bool((radius > 0.9 * budgets).all())
    output = dafa(net, prepared)
    torch.testing.assert_close(output.loss, dafa_loss(net(x), net(prepared.x_adv), y, dafa.weights, 6.0)[0])
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    torch.testing.assert_close(output.logs["natural"] + 6 * output.logs["robust"], output.loss.detach())
    assert float(output.logs["smallest_weight"]) == pytest.approx(0.1)
    soft = dafa.prepare(net, x, F.one_hot(y, CLASSES).double())
    assert bool(((soft.x_adv - x).abs().flatten(1).amax(1) <= budgets + 1e-9).all())
    net.eval()
    assert dafa(net, dafa.prepare(net, x[:1], y[:1])).sample_losses.shape == (1,)


def test_two_processes_are_one(net):
    """Sums over processes: each sees half of the samples, and both end with the weights of the whole."""
    whole = objective(warmup=1)
    net.eval()
    outputs = epoch(whole, net, 0)
    first, second = objective(warmup=1), objective(warmup=1)
    for mine, batch in ((first, 0), (second, 1)):
        mine.epoch_starts(0, 4)
        theirs = outputs[1 - batch].sums
        other = torch.cat([theirs[0], theirs[1].unsqueeze(1)], 1)
        mine.batch_ends(outputs[batch], lambda tensor, other=other: tensor + other)
        mine.epoch_starts(1, 4)
    whole.epoch_starts(1, 4)
    torch.testing.assert_close(first.weights, whole.weights)
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("where", ["in the last epoch of the warm-up", "after it", "at its end"])
def test_state_survives_a_restart(net, where):
    net.eval()
    whole = objective(warmup=1)
    half = objective(warmup=1)
    if where == "in the last epoch of the warm-up":
        epoch(whole, net, 0)
        epoch(half, net, 0, batches=((0, 4),))
    else:
        epoch(whole, net, 0)
        epoch(half, net, 0)
        if where == "after it":
            half.epoch_starts(1, 4)
    resumed = objective(warmup=1)
    resumed.load_state_dict(half.state_dict())
    if where == "in the last epoch of the warm-up":
        epoch(resumed, net, 0, batches=((4, 8),))
    for each in (whole, resumed):
        each.epoch_starts(1, 4)
    assert torch.equal(resumed.weights, whole.weights)
    assert float(resumed.counts.sum()) == 8
    assert len(resumed.weights.unique()) > 1


def test_a_second_training_begins_anew(net):
    dafa = objective(warmup=1)
    epoch(dafa, net, 0)
    epoch(dafa, net, 1)
    dafa.epoch_starts(0, 4)
    assert torch.equal(dafa.weights, torch.ones(CLASSES))
    assert float(dafa.counts.sum()) == 0
    epoch(dafa, net, 0)
    assert float(dafa.counts.sum()) == 8


def test_training_that_begins_after_the_warm_up_watches_its_first_epoch(net):
    dafa = objective(warmup=1)
    epoch(dafa, net, 5)
    assert float(dafa.counts.sum()) == 8
    epoch(dafa, net, 6)
    assert len(dafa.weights.unique()) > 1


def test_counting_is_exact_when_the_loss_is_evaluated_more_than_once(net):
    dafa = objective(warmup=1)
    x, y = images(dtype=torch.float64)
    dafa.epoch_starts(0, 4)
    prepared = dafa.prepare(net, x, y)
    outputs = [dafa(net, prepared) for _ in range(3)]
    assert float(dafa.counts.sum()) == 0
    dafa.batch_ends(outputs[1], alone)
    assert float(dafa.counts.sum()) == 8


def test_pgd_form(net):
    dafa = objective(form="pgd", warmup=1)
    x, y = images(dtype=torch.float64)
    dafa.weights.copy_(torch.tensor([2.0, 0.5, 1.0, 0.1]))
    prepared = dafa.prepare(net, x, y)
    net.batches.clear()
    output = dafa(net, prepared)
    assert net.batches == [8]
    expected = (dafa.weights.double()[y] * F.cross_entropy(net(prepared.x_adv), y, reduction="none")).mean()
    torch.testing.assert_close(output.loss, expected)
    assert dafa.passes(2) == dafa.attack.passes + 2
    assert DAFA(num_classes=3, form="pgd").attack.loss == "ce"


@pytest.mark.parametrize(("forwards", "order"), [("separate", "ac"), ("joint", "b")])
def test_order_of_the_forwards(net, forwards, order):
    dafa = objective(forwards=forwards)
    x, y = images(dtype=torch.float64)
    prepared = dafa.prepare(net, x, y)
    seen = []
    kinds = {id(x): "c", id(prepared.x_adv): "a"}
    net.register_forward_pre_hook(lambda _, inputs: seen.append(kinds.get(id(inputs[0]), "b")))
    output = dafa(net, prepared)
    assert "".join(seen) == order
    assert output.logits.shape == (8, CLASSES)


def test_published_defaults():
    dafa = DAFA(num_classes=10)
    attack = dafa.attack
    assert (attack.eps, attack.step_size, attack.steps) == (0.031, 0.007, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("kl", "normal", "eval")
    assert (dafa.beta, dafa.warmup, dafa.strength) == (6.0, 70, 1.0)
    assert dafa.passes(2) == 10.5 + 4
    assert "warmup=70" in repr(dafa)
    assert copy.deepcopy(dafa).warmup == 70


class OneBudget(Attack):
    def draw_start(self, x, draws, scale=None):
        return x

    def run(self, problem, x_adv):
        return x_adv

    run_passes = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "Expected `num_classes` to be an integer >= 2"),
        ({"warmup": 0}, "Expected `warmup` to be an integer >= 1"),
        ({"beta": -1}, "Expected `beta`"),
        ({"strength": -1}, "Expected `strength`"),
        ({"min_weight": 0}, "Expected `min_weight` to be a finite number > 0"),
        ({"form": "at"}, "Expected `form` to be one of 'trades', 'pgd'"),
        ({"forwards": "published"}, "Expected `forwards`"),
        ({"attack": OneBudget(eps=0.1)}, "a budget of its own, which OneBudget cannot; use PGD"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_another_number_of_classes_is_refused(net):
    x, y = images(dtype=torch.float64)
    for classes in (3, 7):
        dafa = objective(num_classes=classes)
        with pytest.raises(ValueError, match=rf"Expected logits of {classes} classes \(`num_classes`\) but got 4"):
            dafa(net, dafa.prepare(net, x, y))
    with pytest.raises(ValueError, match="Expected `ties` to be one of"):
        dafa_weights(torch.ones(2, 2), torch.ones(2), ties="first")
