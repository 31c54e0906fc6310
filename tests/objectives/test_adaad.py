"""AdaAD and AdaIAD against their formulas and their attack on both networks."""

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.objectives import AdaAD, AdaIAD, adaad_loss, iad_i_loss, iad_trust
from support.attacked import CountingNet, images


def nets(seed=3):
    torch.manual_seed(seed)
    return CountingNet().double().train(), CountingNet().double()


def attack(**options):
    return PGD(**{"eps": 0.1, "step_size": 0.03, "steps": 3, "loss": "kl", "random_start": "normal", **options})


def seeded():
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("reduction", ["elementmean", "batchmean"])
def test_loss_and_gradients(alpha, reduction):
    clean, adv, t_clean, t_adv = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(4))
    loss, robust, natural = adaad_loss(clean, adv, t_clean, t_adv, alpha=alpha, reduction=reduction, loss_factor=3.0)
    by_hand = []
    for student, teacher in ((adv, t_adv), (clean, t_clean)):
        q = teacher.softmax(1).detach()
        by_hand.append(3 * (q * (q.log() - student.log_softmax(1))).sum(1).mean() / (5 if reduction[0] == "e" else 1))
    torch.testing.assert_close([robust, natural], by_hand)
    whole = alpha * by_hand[0] + (1 - alpha) * by_hand[1]
    torch.testing.assert_close(loss, whole)
    expected = torch.autograd.grad(whole, [clean, adv], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [clean, adv], retain_graph=True), expected)
    assert torch.autograd.grad(loss, [t_clean, t_adv], allow_unused=True) == (None, None)


@pytest.mark.parametrize("kind", [AdaAD, AdaIAD])
def test_attack_climbs_the_divergence_of_both_networks(kind):
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    prepared = kind(teacher, attack=attack()).prepare(student, x, y, generator=seeded())
    assert student.training
    assert int(student.norm.num_batches_tracked) == 0
    student.eval()
    teacher.eval()
    x_adv = x + 0.001 * torch.randn(x.shape, dtype=torch.float64, generator=seeded())
    for _ in range(3):
        point = x_adv.clone().requires_grad_()
        q = teacher(point).softmax(1)
        divergence = (q * (q.log() - student(point).log_softmax(1))).sum()
        (gradient,) = torch.autograd.grad(divergence, point)
        x_adv = (x + (x_adv + 0.03 * gradient.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(prepared.x_adv, x_adv)
    assert all(parameter.grad is None for parameter in (*student.parameters(), *teacher.parameters()))


def test_objective_is_the_formula_with_the_clean_images_first():
    student, teacher = nets()
    student.eval()
    x, y = images(dtype=torch.float64)
    adaad = AdaAD(teacher, alpha=0.75, attack=attack())
    prepared = adaad.prepare(student, x, y)
    seen = []
    output = adaad(lambda images: seen.append(images) or student(images), prepared)
    assert [images is part for images, part in zip(seen, (x, prepared.x_adv), strict=True)] == [True, True]
    teacher.eval()
    on_clean, on_adv = teacher(x), teacher(prepared.x_adv)
    expected, robust, natural = adaad_loss(student(x), student(prepared.x_adv), on_clean, on_adv, alpha=0.75)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.sample_losses.mean(), expected)
    torch.testing.assert_close(output.logits, student(x))
    torch.testing.assert_close(output.logs, {"robust": robust.detach(), "natural": natural.detach()})


def test_introspective_variant():
    student, teacher = nets()
    student.eval()
    x, y = images(dtype=torch.float64)
    adaiad = AdaIAD(teacher, alpha=0.75, beta=0.5, begin=2, temperature=3.0, attack=attack())
    prepared = adaiad.prepare(student, x, y)
    seen = []
    adaiad(lambda images: seen.append(images) or student(images), prepared)
    assert [images is part for images, part in zip(seen, (x, prepared.x_adv), strict=True)] == [True, True]
    on_adv = teacher.eval()(prepared.x_adv)
    for epoch, trust in ((1, None), (2, iad_trust(on_adv, y, 0.5))):
        adaiad.epoch_starts(epoch, 3)
        expected, _ = iad_i_loss(student(x), student(prepared.x_adv), on_adv, y, trust, alpha=0.75, temperature=3.0)
        torch.testing.assert_close(adaiad(student, prepared).loss, expected)


def test_defaults_and_cost():
    teacher = torch.nn.Linear(4, 3)
    for kind in (AdaAD, AdaIAD):
        assert (kind(teacher).attack.eps, kind(teacher).attack.step_size) == (8 / 255, 2 / 255)
    assert AdaAD(teacher).passes(2) == 10 + 2 * 1.5
    assert AdaAD(teacher, alpha=0.5).passes(2) == 10 + 2 * 2
    assert AdaIAD(teacher).passes(2) == 10 + 2 * 2
    assert AdaIAD(teacher).temperature == 30


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AdaAD, {"alpha": 2.0}, r"`alpha` to be in \[0, 1\]"),
        (AdaAD, {"loss_factor": 0.0}, "`loss_factor` to be a finite number > 0"),
        (AdaAD, {"reduction": "mean"}, "`reduction` to be one of"),
        (AdaAD, {"attack": PGD()}, "The attack of AdaAD moves away .* set loss='kl'"),
        (AdaIAD, {"attack": PGD()}, "The attack of AdaIAD moves away .* set loss='kl'"),
    ],
)
def test_refusals(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(torch.nn.Linear(4, 3), **options)
