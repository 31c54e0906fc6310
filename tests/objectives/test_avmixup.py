"""AVmixup: what is mixed, with which weights, and what it is compared with."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.losses import CrossEntropy
from lightning_robust.objectives import TRADES, AVmixup, avmixup_images, avmixup_labels
from support.attacked import CLASSES, CountingNet, images


@pytest.fixture
def net():
    return CountingNet().double().train()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_lie_between_clean_ones_and_vertices():
    x, x_adv = torch.rand(3, 2, 4), torch.rand(3, 2, 4)
    weights = torch.tensor([0.0, 0.3, 1.0])
    mixed = avmixup_images(x, x_adv, weights, gamma=3.0)
    vertex = (x + 3 * (x_adv - x)).clamp(0, 1)
    torch.testing.assert_close(mixed[0], vertex[0])
    torch.testing.assert_close(mixed[1], 0.3 * x[1] + 0.7 * vertex[1])
    assert torch.equal(mixed[2], x[2])
    unbounded = avmixup_images(x, x_adv, weights, gamma=3.0, bounds=None)
    torch.testing.assert_close(unbounded[0], (x + 3 * (x_adv - x))[0])


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_labels(classes):
    y = torch.tensor([0, 1, classes - 1])
    one_hot = F.one_hot(y, classes).double()
    weights = torch.tensor([0.0, 0.25, 1.0])
    mixed = avmixup_labels(one_hot, weights, clean_confidence=0.9, vertex_confidence=0.1)
    for i, (label, weight) in enumerate(zip(y.tolist(), weights.tolist(), strict=True)):
        for k in range(classes):
            clean = 0.9 if k == label else 0.1 / (classes - 1)
            vertex = 0.1 if k == label else 0.9 / (classes - 1)
            assert float(mixed[i, k]) == pytest.approx(weight * clean + (1 - weight) * vertex)
    soft = torch.rand(3, classes, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(avmixup_labels(soft, weights).sum(1), torch.ones(3, dtype=torch.float64))


def test_value_is_that_of_the_formula(net):
    x, y = images(dtype=torch.float64)
    objective = AVmixup(attack=PGD(eps=0.1, steps=3))
    prepared = objective.prepare(net, x, y, generator=seeded())
    weights = prepared.extra["weights"]
    assert weights.shape == (8,)
    assert len(weights.unique()) == 8
    expected = avmixup_images(x, prepared.x_adv, weights)
    torch.testing.assert_close(prepared.extra["mixed"], expected)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == [8]
    logits = net(expected)
    target = avmixup_labels(F.one_hot(y, CLASSES).double(), weights)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)
    assert objective.passes(2) == 3 + 2


def test_draws_come_from_the_generator(net):
    x, y = images(dtype=torch.float64)
    state = torch.get_rng_state()
    for concentration in (1.0, 0.5):
        objective = AVmixup(attack=PGD(eps=0.1, steps=1), concentration=concentration)
        first, again, other = (objective.prepare(net, x, y, generator=seeded(seed)) for seed in (0, 0, 1))
        assert torch.equal(first.extra["mixed"], again.extra["mixed"])
        assert not torch.equal(first.extra["weights"], other.extra["weights"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("concentration", [0.5, 1.0, 4.0])
def test_distribution_of_the_weights(concentration):
    x, y = torch.rand(20_000, 1), torch.zeros(20_000, dtype=torch.long)
    objective = AVmixup(attack=PGD(steps=0), concentration=concentration)
    weights = objective.prepare(torch.nn.Linear(1, 2), x, y, generator=seeded()).extra["weights"]
    assert 0 <= float(weights.min()) <= float(weights.max()) <= 1
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(weights.var()) == pytest.approx(1 / (4 * (2 * concentration + 1)), rel=0.03)  # of Beta(a, a)


def test_vertices_of_normalised_images_stay_images(net):
    x, y = images(dtype=torch.float64)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    attack = PGD(eps=0.3, steps=2, mean=mean, std=std)
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    prepared = AVmixup(attack=attack, gamma=10.0).prepare(net, (x - shift) / scale, y, generator=seeded())
    pixels = prepared.extra["mixed"] * scale + shift
    assert -1e-6 <= float(pixels.min()) <= float(pixels.max()) <= 1 + 1e-6
    assert float((pixels - x).abs().max()) > 0.31  # beyond the budget


def test_soft_targets_criterion_and_a_batch_of_one(net):
    x, y = images(dtype=torch.float64)
    objective = AVmixup(attack=PGD(eps=0.1, steps=1))
    hard = objective.prepare(net, x, y, generator=seeded())
    soft = objective.prepare(net, x, F.one_hot(y, CLASSES).double(), generator=seeded())
    torch.testing.assert_close(objective(net, soft).loss, objective(net, hard).loss)
    other = AVmixup(attack=PGD(eps=0.1, steps=1), criterion=CrossEntropy(label_smoothing=0.5))(net, hard)
    assert other.sample_losses is None
    target = avmixup_labels(F.one_hot(y, CLASSES).double(), hard.extra["weights"])
    expected = F.cross_entropy(net(hard.extra["mixed"]), target, label_smoothing=0.5)
    torch.testing.assert_close(other.loss, expected)
    net.eval()
    assert objective(net, objective.prepare(net, x[:1], y[:1])).sample_losses.shape == (1,)


def test_images_keep_their_type():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, CLASSES)).bfloat16()
    x, y = images(dtype=torch.bfloat16)
    objective = AVmixup(attack=PGD(eps=0.1, steps=1))
    prepared = objective.prepare(net, x, y)
    assert prepared.extra["mixed"].dtype == torch.bfloat16
    assert objective(net, prepared).loss.dtype == torch.float32


def test_published_defaults():
    objective = AVmixup()
    attack = objective.attack
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert (attack.loss, attack.random_start, attack.mode) == ("ce", "uniform", "train")
    assert (objective.gamma, objective.clean_confidence, objective.vertex_confidence) == (2.0, 1.0, 0.1)
    assert "gamma=2.0" in repr(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "Expected `gamma`"),
        ({"clean_confidence": 1.1}, r"Expected `clean_confidence` to be in \[0.0, 1.0\]"),
        ({"vertex_confidence": -0.1}, r"Expected `vertex_confidence` to be in \[0.0, 1.0\]"),
        ({"concentration": 0}, "Expected `concentration` to be a finite number > 0"),
        ({"attack": PGD(loss="kl")}, "attack on the label, which loss='kl' ignores"),
        ({"attack": PGD(loss="lse")}, "attack on the label, which loss='lse' ignores"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        AVmixup(**options)


def test_objectives_are_no_criterion():
    with pytest.raises(TypeError, match="got TRADES; AVmixup trains on mixed images alone, so there is no clean"):
        AVmixup(criterion=TRADES())
