import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import SRSTAWR, srst_awr_loss
from support.attacked import SIZE, CountingNet, images

ATTACK = PGD(eps=0.1, steps=2, loss="kl")
LABELS = torch.tensor([-100, 2, -1, 0, 3, -100, -100, 1])
KNOWN = [1, 3, 4, 7]
UNKNOWN = [0, 2, 5, 6]


def seeded():
    return torch.Generator().manual_seed(0)


def naive(labelled, labels, clean, adv, teacher, lam, gamma, beta, temperature, smoothing):
    supervised = F.cross_entropy(labelled, labels, label_smoothing=smoothing)
    regularizer = knowledge = 0.0
    for z, z_adv, t in zip(clean, adv, teacher, strict=True):
        p, p_adv, q = z.softmax(0), z_adv.softmax(0), t.softmax(0)
        weight = beta * (q @ p) + (1 - beta) * (1 - q @ p_adv)
        regularizer = regularizer + weight * (p * (p / p_adv).log()).sum() / len(clean)
        hot, hot_q = (z / temperature).softmax(0), (t / temperature).softmax(0)
        knowledge = knowledge + (hot_q * (hot_q / hot).log()).sum() / len(clean)
    return supervised + lam * regularizer + gamma * knowledge, supervised, regularizer, knowledge


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_a_loop_over_samples(beta):
    generator = torch.Generator().manual_seed(0)
    labelled, clean, adv, teacher = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64).mul(2).requires_grad_() for n in (4, 6, 6, 6)
    )
    labels = torch.tensor([0, 4, 2, 2])
    parts = srst_awr_loss(
        labelled, labels, clean, adv, teacher, lam=3.0, gamma=2.0, beta=beta, temperature=1.5, label_smoothing=0.1
    )
    reference = naive(labelled, labels, clean, adv, teacher.detach(), 3.0, 2.0, beta, 1.5, 0.1)
    ours = (parts.loss, parts.supervised, parts.regularizer, parts.knowledge)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    inputs = [labelled, clean, adv]
    gradients = [torch.autograd.grad(loss, inputs) for loss in (parts.loss, reference[0])]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    assert teacher.grad is None


@pytest.mark.parametrize("forwards", ["separate", "published"])
def test_labels_that_are_negative_are_none(forwards):
    x, _ = images(dtype=torch.float64)
    net, teacher = CountingNet().double().train(), CountingNet().double().eval()
    objective = SRSTAWR(teacher=teacher, attack=ATTACK, forwards=forwards)
    reference = copy.deepcopy(net)
    prepared = objective.prepare(net, x, LABELS, generator=seeded())
    answers = teacher(x[UNKNOWN]).detach()
    x_adv = ATTACK(reference, x[UNKNOWN], answers.argmax(1), generator=seeded())
    assert torch.equal(prepared.x_adv, x_adv)
    net.batches.clear()
    output = objective(net, prepared)
    assert net.batches == ([4, 4, 4] if forwards == "separate" else [4, 4, 4, 4])
    labelled, clean, adv = reference(x[KNOWN]), reference(x[UNKNOWN]), reference(x_adv)
    if forwards == "published":
        reference(x[UNKNOWN])
    expected = naive(labelled, LABELS[KNOWN], clean, adv, answers, 20.0, 4.0, 0.5, 1.2, 0.2)
    torch.testing.assert_close(output.loss, expected[0], rtol=1e-8, atol=1e-9)
    for name, value in zip(("supervised", "regularizer", "knowledge"), expected[1:], strict=True):
        torch.testing.assert_close(output.logs[name], value.detach(), rtol=1e-8, atol=1e-9)
    assert torch.equal(output.logits[KNOWN], labelled)
    assert torch.equal(output.logits[UNKNOWN], clean)
    assert torch.equal(net.norm.running_mean, reference.norm.running_mean)


def test_pseudo_labels_are_what_the_attack_moves_away_from():
    x, _ = images()
    net, teacher = CountingNet().eval(), CountingNet().eval()
    attack = PGD(eps=0.1, steps=2)
    prepared = SRSTAWR(teacher=teacher, attack=attack).prepare(net, x, LABELS, generator=seeded())
    pseudo = teacher(x[UNKNOWN]).argmax(1)
    assert torch.equal(prepared.x_adv, attack(net, x[UNKNOWN], pseudo, generator=seeded()))


@pytest.mark.parametrize("labels", [torch.full((8,), -100), torch.arange(8) % 4, torch.rand(8, 4).softmax(1)])
def test_batches_without_a_part(labels):
    x, _ = images()
    net = CountingNet()
    objective = SRSTAWR(teacher=CountingNet(), attack=ATTACK)
    output = objective(net, objective.prepare(net, x, labels))
    assert output.logits.shape == (8, 4)
    assert bool(output.loss.isfinite())
    output.loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())
    none = "supervised" if (labels == -100).all() else "regularizer"
    assert float(output.logs[none]) == 0.0
    if none == "regularizer":
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels, label_smoothing=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits(dtype):
    extreme = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]], dtype=dtype, requires_grad=True)
    parts = srst_awr_loss(extreme, torch.tensor([1, 1]), extreme, extreme.flip(1), extreme.flip(0))
    assert parts.loss.dtype == torch.float32
    assert bool(parts.loss.isfinite())
    parts.loss.backward()
    assert bool(extreme.grad.isfinite().all())


def test_a_teacher_of_other_classes_is_refused():
    x, _ = images()
    net = CountingNet()
    objective = SRSTAWR(teacher=CountingNet(classes=7), attack=ATTACK)
    with pytest.raises(ValueError, match="teacher of SRSTAWR has 7 classes but the model has 4"):
        objective(net, objective.prepare(net, x, LABELS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "`lam` to be a finite number >= 0"),
        ({"gamma": -1.0}, "`gamma` to be a finite number >= 0"),
        ({"beta": 2.0}, r"`beta` to be in \[0.0, 1.0\]"),
        ({"temperature": 0.0}, "`temperature` to be a finite number > 0"),
        ({"label_smoothing": -0.1}, r"`label_smoothing` to be in \[0.0, 1.0\]"),
        ({"forwards": "joint"}, "`forwards`"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SRSTAWR(teacher=nn.Linear(3 * SIZE * SIZE, 4), **options)


def test_an_epoch_without_unlabelled_samples_is_warned_about():
    objective = SRSTAWR(torch.nn.Linear(4, 3), attack=PGD(eps=0.1, steps=1, loss="kl"))
    model, x = torch.nn.Linear(4, 3), torch.rand(3, 4)
    objective.epoch_starts(0, 3)
    objective.prepare(model, x, torch.tensor([0, 1, -100]))
    objective.prepare(model, x, torch.tensor([0, 1, 2]))
    objective.epoch_ends(0, lambda tensor: tensor)
    objective.epoch_starts(1, 3)
    objective.prepare(model, x, torch.tensor([0, 1, 2]))
    objective.epoch_ends(1, lambda tensor: tensor + 1)  # another process had some
    with pytest.warns(UserWarning, match=r"No sample of epoch 1 was without label.* give the unlabelled ones"):
        objective.epoch_ends(1, lambda tensor: tensor)
