"""RSLAD against its formula, its attack and its order of passes."""

import pytest
import torch

from lightning_robust.attacks import PGD
from lightning_robust.objectives import RSLAD, rslad_loss
from support.attacked import CountingNet, images


def nets(seed=3):
    torch.manual_seed(seed)
    return CountingNet().double().train(), CountingNet().double()


def attack(**options):
    return PGD(**{"eps": 0.1, "step_size": 0.03, "steps": 3, "loss": "kl", "random_start": "normal", **options})


@pytest.mark.parametrize("reduction", ["elementmean", "batchmean"])
@pytest.mark.parametrize("eps_log", [0.0, 1e-5, 1e-2])
def test_loss_and_gradients(reduction, eps_log):
    clean, adv = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teacher = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    options = {"adv_weight": 0.7, "clean_weight": 0.2, "eps_log": eps_log, "loss_factor": 10.0, "reduction": reduction}
    loss, robust, natural = rslad_loss(clean, adv, teacher, **options)
    q = teacher.softmax(1).detach()
    by_hand = [10 * (q * ((q + eps_log).log() - logits.log_softmax(1))).sum(1).mean() for logits in (adv, clean)]
    if reduction == "elementmean":
        by_hand = [value / 5 for value in by_hand]
    torch.testing.assert_close([robust, natural], by_hand)
    whole = 0.7 * by_hand[0] + 0.2 * by_hand[1]
    torch.testing.assert_close(loss, whole)
    expected = torch.autograd.grad(whole, [clean, adv], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [clean, adv], retain_graph=True), expected)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_sure_teachers_have_finite_losses():
    teacher, student = torch.tensor([[500.0, 0.0]]), torch.tensor([[-500.0, 0.0]], requires_grad=True)
    loss, *_ = rslad_loss(student, student, teacher, eps_log=0.0, reduction="batchmean")
    torch.testing.assert_close(loss, torch.tensor(500.0))
    assert bool(torch.autograd.grad(loss, student)[0].isfinite().all())


def test_attack_leads_away_from_the_soft_labels():
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    prepared = RSLAD(teacher, attack=attack()).prepare(student, x, y, generator=generators[0])
    soft = teacher.eval()(x).softmax(1)
    # with fixed probabilities the cross entropy has the same gradient as the divergence
    expected = attack(loss="ce")(student, x, soft, generator=generators[1])
    torch.testing.assert_close(prepared.x_adv, expected)
    assert student.training
    assert int(student.norm.num_batches_tracked) == 0
    assert teacher.batches == [8]  # by this test: the objective has a copy


def test_objective_is_the_formula_with_the_attacked_images_first():
    student, teacher = nets()
    student.eval()
    x, y = images(dtype=torch.float64)
    rslad = RSLAD(teacher, attack=attack())
    prepared = rslad.prepare(student, x, y)
    seen = []
    output = rslad(lambda images: seen.append(images) or student(images), prepared)
    assert [images is part for images, part in zip(seen, (prepared.x_adv, x), strict=True)] == [True, True]
    expected, robust, natural = rslad_loss(student(x), student(prepared.x_adv), teacher.eval()(x))
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.sample_losses.mean(), expected)
    torch.testing.assert_close(output.logits, student(x))
    torch.testing.assert_close(output.logs, {"robust": robust.detach(), "natural": natural.detach()})


def test_labels_are_not_used():
    student, teacher = nets()
    x, y = images(dtype=torch.float64)
    found = [
        RSLAD(teacher, attack=attack()).prepare(student, x, target, generator=torch.Generator().manual_seed(0)).x_adv
        for target in (y, (y + 1) % 4)
    ]
    assert torch.equal(*found)


def test_defaults_are_the_published_ones():
    rslad = RSLAD(torch.nn.Linear(4, 3))
    assert (rslad.attack.eps, rslad.attack.step_size, rslad.attack.steps) == (8 / 255, 2 / 255, 10)
    assert (rslad.attack.mode, rslad.attack.random_start) == ("eval", "normal")
    assert rslad.passes(1) == 12
    assert rslad.passes(2) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adv_weight": -0.1}, "`adv_weight` to be a finite number >= 0"),
        ({"clean_weight": -0.1}, "`clean_weight` to be a finite number >= 0"),
        ({"eps_log": -1e-5}, "`eps_log` to be a finite number >= 0"),
        ({"loss_factor": 0.0}, "`loss_factor` to be a finite number > 0"),
        ({"reduction": "sum"}, "`reduction` to be one of"),
        ({"attack": PGD()}, "The attack of RSLAD moves away .* looks at the labels; set loss='kl'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        RSLAD(torch.nn.Linear(4, 3), **options)
