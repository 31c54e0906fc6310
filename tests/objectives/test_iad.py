"""IAD-I and IAD-II against loops over samples, and when their trust begins."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import IADI, IADII, iad_i_loss, iad_ii_loss, iad_trust
from support.attacked import CountingNet, images


def nets(count=3, seed=3):
    torch.manual_seed(seed)
    return [CountingNet().double().train() for _ in range(count)]


def attack(**options):
    return PGD(**{"eps": 0.1, "steps": 2, "mode": "train", **options})


def kl(teacher, student, temperature=1.0):
    """Of one sample; gradients flow to both."""
    q = (teacher / temperature).softmax(0)
    return (q * (q.log() - (student / temperature).log_softmax(0))).sum()


def random_logits():
    clean, adv = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teachers = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3)]
    return clean, adv, teachers, torch.randint(5, (6,))


def same(loss, expected, logits):
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_trust_is_a_power_of_the_probability_of_the_label():
    *_, (teacher, *_), y = random_logits()
    expected = torch.stack([row.softmax(0)[label] ** 0.3 for row, label in zip(teacher, y, strict=True)])
    torch.testing.assert_close(iad_trust(teacher, y, 0.3), expected)
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(iad_trust(teacher, soft, 0.3), (soft * teacher.softmax(1)).sum(1) ** 0.3)
    assert not iad_trust(teacher.requires_grad_(), y).requires_grad
    assert torch.equal(iad_trust(torch.tensor([[-500.0, 500.0]]), torch.tensor([0]), 0.0), torch.ones(1))


@pytest.mark.parametrize("trusting", [True, False])
def test_first_variant(trusting):
    clean, adv, (teacher, guide, _), y = random_logits()
    trust = iad_trust(guide, y, 0.5) if trusting else None
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        own = (1 - trust[i]) * kl(clean[i], adv[i]) if trusting else 0
        expected = expected + 0.7 * (9 * kl(teacher[i], adv[i], 3.0) + own) + 0.3 * F.cross_entropy(clean[i], y[i])
    loss, parts = iad_i_loss(clean, adv, teacher, y, trust, alpha=0.7, temperature=3.0)
    same(loss, expected / 6, [clean, adv])
    torch.testing.assert_close(sum(parts.values()).mean(), loss)
    assert list(parts) == ["distilled", "introspective", "natural"]


@pytest.mark.parametrize("trusting", [True, False])
def test_second_variant(trusting):
    clean, adv, (teacher, guide, natural), y = random_logits()
    trust = iad_trust(guide, y, 0.5) if trusting else None
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        a = trust[i] if trusting else 1.0
        expected = expected + 0.5 * 9 * (a * kl(teacher[i], adv[i], 3.0) + (1 - a) * kl(clean[i], adv[i]))
        expected = expected + 0.2 * 9 * kl(natural[i], adv[i], 3.0) + 0.3 * F.cross_entropy(adv[i], y[i])
    options = {"alpha": 0.5, "clean_alpha": 0.2, "temperature": 3.0}
    loss, parts = iad_ii_loss(clean, adv, teacher, natural, y, trust, **options)
    if trusting:
        same(loss, expected / 6, [clean, adv])
    else:
        torch.testing.assert_close(loss, expected / 6)
        assert not torch.autograd.grad(loss, clean, allow_unused=True)[0]
    torch.testing.assert_close(sum(parts.values()).mean(), loss)
    assert list(parts) == ["distilled", "introspective", "distilled_clean", "robust"]


def seen_by(student, objective, prepared):
    order = []
    output = objective(lambda images: order.append(images) or student(images), prepared)
    assert [images is part for images, part in zip(order, (prepared.x_adv, prepared.x), strict=True)] == [True, True]
    return output


def test_first_objective():
    student, teacher, _ = nets()
    x, y = images(dtype=torch.float64)
    objective = IADI(teacher, alpha=0.75, beta=0.5, begin=2, temperature=2.0, attack=attack())
    prepared = objective.prepare(student, x, y)
    assert int(student.norm.num_batches_tracked) == 2  # the attack runs in training mode
    student.eval()
    teacher.eval()
    trust = iad_trust(teacher(prepared.x_adv), y, 0.5)
    for epoch, expected in ((0, None), (1, None), (2, trust), (5, trust)):
        objective.epoch_starts(epoch, 6)
        output = seen_by(student, objective, prepared)
        loss, parts = iad_i_loss(
            student(x), student(prepared.x_adv), teacher(x), y, expected, alpha=0.75, temperature=2.0
        )
        torch.testing.assert_close(output.loss, loss)
        torch.testing.assert_close(output.sample_losses, sum(parts.values()))
        torch.testing.assert_close(output.logs["introspective"], parts["introspective"].mean().detach())
        torch.testing.assert_close(output.logits, student(x))


def test_second_objective():
    student, teacher, natural = nets()
    x, y = images(dtype=torch.float64)
    options = {"alpha": 0.4, "clean_alpha": 0.3, "temperature": 2.0}
    objective = IADII(teacher, clean_teacher=natural, beta=0.5, begin=1, attack=attack(), **options)
    prepared = objective.prepare(student, x, y)
    student.eval()
    on_adv, on_adv_natural = (each.eval()(prepared.x_adv) for each in (teacher, natural))
    for epoch, trust in ((0, None), (1, iad_trust(on_adv, y, 0.5))):
        objective.epoch_starts(epoch, 2)
        output = seen_by(student, objective, prepared)
        loss, parts = iad_ii_loss(student(x), student(prepared.x_adv), on_adv, on_adv_natural, y, trust, **options)
        torch.testing.assert_close(output.loss, loss)
        torch.testing.assert_close(output.sample_losses, sum(parts.values()))


def test_defaults_and_cost():
    first, second = IADI(torch.nn.Linear(4, 3)), IADII(torch.nn.Linear(4, 3), clean_teacher=torch.nn.Linear(4, 3))
    assert (first.alpha, first.beta, first.begin, first.temperature) == (1.0, 0.1, 60, 1.0)
    assert (second.alpha, second.clean_alpha, second.beta, second.begin) == (0.5, 0.25, 0.1, 40)
    for objective in (first, second):
        assert objective.attack.mode == "train"
        assert objective.passes(2) == 10 + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"`alpha` to be in \[0, 1\]"),
        ({"beta": -1.0}, "`beta` to be a finite number >= 0"),
        ({"begin": -1}, "`begin` to be an integer >= 0"),
        ({"temperature": 0.0}, "`temperature` to be a finite number > 0"),
        ({"clean_alpha": 1.5}, r"`clean_alpha` to be in \[0, 1\]"),
        ({"alpha": 0.8, "clean_alpha": 0.3}, "add up to at most 1 but got 0.8 and 0.3; what is left"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        IADII(torch.nn.Linear(4, 3), clean_teacher=torch.nn.Linear(4, 3), **options)


def test_a_natural_teacher_of_other_classes_is_named():
    student, teacher, _ = nets()
    x, y = images(dtype=torch.float64)
    objective = IADII(teacher, clean_teacher=CountingNet(3).double(), attack=attack())
    with pytest.raises(ValueError, match="clean teacher of IADII has 3 classes but the model has 4"):
        objective(student, objective.prepare(student, x, y))
