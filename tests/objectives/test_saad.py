"""SAAD against its formula and its attack on a linearised teacher."""

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.objectives import SAAD, saad_loss, saad_weights
from support.attacked import CountingNet, images


def nets(seed=3):
    torch.manual_seed(seed)
    return CountingNet().double().train(), CountingNet().double()


def attack(**options):
    return PGD(**{"eps": 0.1, "step_size": 0.03, "steps": 3, "loss": "kl", "random_start": "normal", **options})


def random_logits(count, requires_grad=True):
    return [torch.randn(6, 5, dtype=torch.float64, requires_grad=requires_grad) for _ in range(count)]


def entropies(logits, gamma):
    found = []
    for row in logits.softmax(1):
        total = (
            -sum(p * torch.log(p) for p in row) if gamma == 1 else torch.log(sum(p**gamma for p in row)) / (1 - gamma)
        )
        found.append(total)
    return torch.stack(found)


def kl(teacher, student):
    q = teacher.softmax(1).detach()
    return (q * (q.log() - student.log_softmax(1))).sum(1)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_weights(gamma):
    (teacher,) = random_logits(1)
    expected = entropies(teacher, gamma)
    weights = saad_weights(teacher, gamma=gamma, scale=3.0)
    torch.testing.assert_close(weights, 3 * (expected - expected.min()).detach())
    assert not weights.requires_grad
    sure = torch.tensor([[1000.0, 0.0], [0.0, 0.0]])
    assert bool(saad_weights(sure, gamma=gamma).isfinite().all())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 6.0])
def test_the_constant_of_the_published_entropies(gamma):
    teacher = 0.1 * torch.randn(4, 100, dtype=torch.float64)
    q = teacher.softmax(1)
    sums = (q**gamma).sum(1) + 1e-12
    expected = -(q * (q + 1e-12).log()).sum(1) if gamma == 1 else sums.log() / (1 - gamma)
    published, exact = (saad_weights(teacher, gamma=gamma, eps_log=eps) for eps in (1e-12, 0.0))
    torch.testing.assert_close(published, 5 * (expected - expected.min()), rtol=1e-7, atol=1e-12)
    if gamma == 6:  # sums of sixth powers of a hundredth are as small as the constant
        assert bool((published[exact > 0] < exact[exact > 0]).all())
    plus, minus, clean = (torch.randn(4, 100, dtype=torch.float64) for _ in range(3))
    loss, parts = saad_loss(clean, plus, minus, clean, teacher, minus, gamma=gamma, igdm_weight=0.0, eps_log=1e-12)
    torch.testing.assert_close(parts["robust"], published * kl(teacher, plus))
    torch.testing.assert_close(loss, parts["robust"].mean())


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_and_gradients(gamma, beta):
    clean, plus, minus = student = random_logits(3)
    t_clean, t_plus, t_minus = random_logits(3, requires_grad=False)
    loss, parts = saad_loss(clean, plus, minus, t_clean, t_plus, t_minus, beta=beta, gamma=gamma, igdm_weight=0.3)
    weights = 5 * (entropies(t_plus, gamma) - entropies(t_plus, gamma).min())
    spread = weights / (weights.max() + 1e-8)
    expected = weights * (kl(t_plus, plus) + 0.3 * kl(t_plus - t_minus, plus - minus))
    expected = (expected + beta * (1 - spread) * kl(t_clean, clean)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student, retain_graph=True), torch.autograd.grad(expected, student, retain_graph=True)
    )
    torch.testing.assert_close(sum(parts.values()).mean(), loss)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_attack_holds_the_teacher_but_for_a_linear_logit_of_the_label(slope):
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    saad = SAAD(teacher, slope=slope, attack=attack())
    prepared = saad.prepare(student, x, y, generator=torch.Generator().manual_seed(2))
    student.eval()
    teacher.eval()
    clean = x.clone().requires_grad_()
    logits = teacher(clean)
    (slopes,) = torch.autograd.grad(logits[torch.arange(8), y].sum(), clean)
    logits = logits.detach()
    x_adv = x + 0.001 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        point = x_adv.clone().requires_grad_()
        moved = logits.clone()
        moved[torch.arange(8), y] += slope * (slopes * (point - x)).flatten(1).sum(1)
        q = moved.softmax(1)
        (gradient,) = torch.autograd.grad((q * (q.log() - student(point).log_softmax(1))).sum(), point)
        x_adv = (x + (x_adv + 0.03 * gradient.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(prepared.x_adv, x_adv)
    torch.testing.assert_close(prepared.extra["teacher"], logits)


def test_objective_is_the_formula():
    student, teacher = nets()
    student.eval()
    x, y = images(dtype=torch.float64)
    saad = SAAD(teacher, beta=0.5, gamma=2.0, scale=3.0, igdm_alpha=4.0, attack=attack())
    prepared = saad.prepare(student, x, y)
    saad.epoch_starts(1, 4)
    order = []
    output = saad(lambda images: order.append(images) or student(images), prepared)
    mirror = x - (prepared.x_adv - x)
    torch.testing.assert_close(order, [prepared.x_adv, mirror, x])
    teacher.eval()
    answers = [network(images) for network in (student, teacher) for images in (x, prepared.x_adv, mirror)]
    expected, parts = saad_loss(*answers, beta=0.5, gamma=2.0, scale=3.0, igdm_weight=2.0)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.sample_losses, sum(parts.values()))
    torch.testing.assert_close(output.logits, student(x))


def test_works_in_inference_mode():
    student, teacher = nets()
    saad = SAAD(teacher, attack=attack())
    with torch.inference_mode():
        x, y = images(dtype=torch.float64)
        found = saad.prepare(student, x, y, generator=torch.Generator().manual_seed(2)).x_adv
    expected = saad.prepare(student, x.clone(), y.clone(), generator=torch.Generator().manual_seed(2)).x_adv
    assert torch.equal(found, expected)


def test_defaults_and_cost():
    saad = SAAD(torch.nn.Linear(4, 3))
    assert (saad.beta, saad.gamma, saad.scale, saad.ramp.alpha) == (0.0, 1.0, 5.0, 1.0)
    assert saad.passes(2) == 10 + 2 * 2.5
    assert SAAD(torch.nn.Linear(4, 3), beta=1.0).passes(2) == 10 + 2 * 3
    with pytest.raises(ValueError, match="A weight of SAAD grows over the epochs, of unknown number; set `epochs`"):
        saad.epoch_starts(0, -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "`beta` to be a finite number >= 0"),
        ({"slope": -1.0}, "`slope` to be a finite number >= 0"),
        ({"gamma": 0.0}, "`gamma` to be a finite number > 0"),
        ({"scale": 0.0}, "`scale` to be a finite number > 0"),
        ({"igdm_alpha": -1.0}, "`igdm_alpha` to be a finite number >= 0"),
        ({"ramp": "cosine"}, "`ramp` to be one of"),
        ({"attack": PGD()}, "The attack of SAAD moves away .* set loss='kl'"),
        ({"attack": attack(early_stop=True)}, "SAAD follows one run of its attack"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SAAD(torch.nn.Linear(4, 3), **options)
