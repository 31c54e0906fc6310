"""Adversarial training as an objective against the loop written out."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.losses import CrossEntropy
from lightning_robust.objectives import AdversarialCrossEntropy
from support.attacked import CountingNet, images


@pytest.fixture
def net():
    return CountingNet().double().train()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradients(net, weight, soft):
    x, y = images(dtype=torch.float64)
    if soft:
        y = torch.rand(8, 4, dtype=torch.float64).softmax(1)
    objective = AdversarialCrossEntropy(attack=PGD(steps=2), clean_weight=weight)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == [8] * (2 if weight else 1)
    adv, clean = net(prepared.x_adv), net(x)
    expected = (1 - weight) * F.cross_entropy(adv, y) + weight * F.cross_entropy(clean, y)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, adv)
    torch.testing.assert_close(gradients(net, output.loss), gradients(net, expected))
    assert objective.passes(2) == 2 + 2 * (2 if weight else 1)
    assert set(output.logs) == ({"adversarial", "natural"} if weight else {"adversarial"})


@pytest.mark.parametrize(("forwards", "batches"), [("separate", [8, 8]), ("joint", [16])])
def test_forwards(net, forwards, batches):
    x, y = images(dtype=torch.float64)
    objective = AdversarialCrossEntropy(attack=PGD(steps=1), clean_weight=0.5, forwards=forwards)
    prepared = objective.prepare(net, x, y)
    net.batches.clear()
    objective(net, prepared)
    assert net.batches == batches


def test_criterion_takes_the_place_of_the_cross_entropy(net):
    x, y = images(dtype=torch.float64)
    objective = AdversarialCrossEntropy(
        attack=PGD(steps=1), clean_weight=0.25, criterion=CrossEntropy(label_smoothing=0.2)
    )
    prepared = objective.prepare(net, x, y)
    output = objective(net, prepared)
    parts = [F.cross_entropy(net(each), y, label_smoothing=0.2) for each in (prepared.x_adv, x)]
    torch.testing.assert_close(output.loss, 0.75 * parts[0] + 0.25 * parts[1])
    assert output.sample_losses is None


def test_the_attack_of_a_mode_moves_the_statistics(net):
    x, y = images(dtype=torch.float64)
    AdversarialCrossEntropy(attack=PGD(steps=3)).prepare(net, x, y)
    assert int(net.norm.num_batches_tracked) == 0
    AdversarialCrossEntropy(attack=FGSM(mode="train")).prepare(net, x, y)
    assert int(net.norm.num_batches_tracked) == 1


def test_defaults_and_refusals():
    attack = AdversarialCrossEntropy().attack
    assert (attack.eps, attack.step_size, attack.steps, attack.mode) == (8 / 255, 2 / 255, 10, "eval")
    assert "clean_weight=0.0" in repr(AdversarialCrossEntropy())
    with pytest.raises(ValueError, match=r"Expected `clean_weight` to be in \[0.0, 1.0\]"):
        AdversarialCrossEntropy(clean_weight=2)
    with pytest.raises(ValueError, match="Expected `forwards` to be one of 'separate', 'joint'"):
        AdversarialCrossEntropy(forwards="published")
