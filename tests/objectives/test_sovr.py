"""SOVR and TSOVR against a loop over samples."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import SOVR, TSOVR, Prepared, important_samples, one_vs_rest, sovr_loss
from support.attacked import CountingNet, images


@pytest.fixture
def net():
    return CountingNet().double().train()


def ovr(row, label):
    return sum(math.log1p(math.exp(-z if k == label else z)) for k, z in enumerate(row))


def formula(logits, y, percent, weight):
    """Per sample, by sorting margins in Python."""
    rows = logits.detach().tolist()
    margins = [max(z for k, z in enumerate(row) if k != label) - row[label] for row, label in zip(rows, y, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -margins[i])
    chosen = set(order[: math.floor(len(rows) * percent / 100)])
    losses = []
    for i, label in enumerate(y.tolist()):
        z = logits[i]
        others = [z[k] for k in range(len(z)) if k != label]
        independent = F.softplus(-z[label]) + sum(F.softplus(other) for other in others)
        losses.append(weight * independent if i in chosen else z.logsumexp(0) - z[label])
    return torch.stack(losses), torch.tensor([i in chosen for i in range(len(rows))])


@pytest.mark.parametrize(("percent", "weight"), [(40.0, 0.4), (0.0, 1.0), (100.0, 0.7), (33.0, 0.0)])
def test_loss_and_gradient(percent, weight):
    logits = (3 * torch.randn(10, 5, dtype=torch.float64)).requires_grad_()
    y = torch.randint(5, (10,))
    loss, samples = sovr_loss(logits, y, percent, weight)
    expected, chosen = formula(logits, y, percent, weight)
    assert torch.equal(important_samples(logits, y, percent), chosen)
    torch.testing.assert_close(samples, expected)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected.mean(), logits)[0])


def test_soft_targets():
    logits, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 0])
    one_hot = F.one_hot(y, 4).double()
    torch.testing.assert_close(sovr_loss(logits, one_hot), sovr_loss(logits, y))
    soft = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    expected = F.binary_cross_entropy(logits.sigmoid(), soft, reduction="none").sum(1)
    torch.testing.assert_close(one_vs_rest(logits, soft), expected)
    assert torch.equal(important_samples(logits, soft, 50), important_samples(logits, soft.argmax(1), 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype):
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([0, 0])
    values = one_vs_rest(logits, y)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([ovr([120.0, -120.0, 0.0], 0), 240.0 + math.log(2)]))
    loss, _ = sovr_loss(logits, y, 50)
    loss.backward()
    assert bool(logits.grad.isfinite().all())


def test_a_confident_sample_keeps_its_small_loss():
    torch.testing.assert_close(
        one_vs_rest(torch.tensor([[18.0, -30.0]]), torch.tensor([0])), torch.tensor([1.523e-8]), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("count", "percent", "expected"), [(1, 40, 0), (1, 100, 1), (2, 50, 1), (100, 29, 29), (0, 40, 0)]
)
def test_number_of_important_samples(count, percent, expected):
    assert (
        int(important_samples(torch.randn(count, 2), torch.zeros(count, dtype=torch.long), percent).sum()) == expected
    )


def test_of_equal_samples_the_first_are_important():
    chosen = important_samples(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long), 40)
    assert chosen.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("kind", [SOVR, TSOVR])
def test_objective_is_the_formula(net, kind):
    x, y = images(dtype=torch.float64)
    loss = "ce" if kind is SOVR else "kl"
    objective = kind(attack=PGD(steps=2, loss=loss), percent=50, weight=0.6)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    output = objective(net, prepared)
    assert len(net.batches) == (1 if kind is SOVR else 2)
    clean, adv = net(x), net(prepared.x_adv)
    samples, _ = formula(adv if kind is SOVR else clean, y, 50, 0.6)
    if kind is TSOVR:
        samples = samples + 6 * F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(output.loss, samples.mean())
    torch.testing.assert_close(output.sample_losses, samples)
    torch.testing.assert_close(output.logits, adv if kind is SOVR else clean)
    assert objective.passes(1) == objective.attack.passes + len(net.batches) - 2


@pytest.mark.parametrize(("forwards", "batches"), [("separate", [8, 8]), ("joint", [16])])
def test_forwards_of_tsovr(net, forwards, batches):
    x, y = images(dtype=torch.float64)
    TSOVR(forwards=forwards)(net, Prepared(x, y, x))
    assert net.batches == batches


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SOVR, {"percent": 101}, r"Expected `percent` to be in \[0.0, 100.0\]"),
        (SOVR, {"weight": -1}, "Expected `weight`"),
        (TSOVR, {"percent": -1}, r"Expected `percent` to be in \[0.0, 100.0\]"),
        (TSOVR, {"weight": -1}, "Expected `weight`"),
        (TSOVR, {"beta": -1}, "Expected `beta`"),
        (TSOVR, {"forwards": "published"}, "Expected `forwards` to be one of 'separate', 'joint'"),
    ],
)
def test_refusals(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
    assert "percent=40.0, weight=0.4" in repr(kind())
